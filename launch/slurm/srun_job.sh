#!/usr/bin/env bash
# Run as a Slurm job whose tasks are the ranks, without torchrun: sbatch --ntasks N srun_job.sh CFG.PY [WORD...]
#
# Choose it where one launcher is enough: Slurm starts, binds and ends the ranks itself. job.sh starts dead ranks again
# on their nodes; here the job is queued again as a whole when a rank or a node is lost, at most RESTARTS times.
#
# WORDs are the arguments of `python -m disttrain.launch`. The run directory must be on a file system that all nodes
# see.
# These variables change the job (default):
#
# PYTHON       the interpreter (python3)
# MASTER_ADDR  an address of rank 0's node that all other nodes reach (its name)
# GRACE        seconds that ranks have to save (110); change it together with --signal below
# RESTARTS     how often a job whose ranks failed is queued again (3)
#SBATCH --job-name=disttrain
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if (($# < 1)) || [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "usage: sbatch --ntasks N [OPTION...] $0 CFG.PY [WORD...]" >&2
  echo "such as: sbatch --nodes 2 --ntasks-per-node 8 --time 4:00:00 $0 examples/digits.py" >&2
  exit 2
fi

# A signal to this shell ends its `wait`. srun passes each signal on to the ranks.
signalled=0
step=
trap 'signalled=1; [[ -z $step ]] || kill -USR1 "$step"' USR1
trap 'signalled=1; [[ -z $step ]] || kill -TERM "$step"' TERM
srun --kill-on-bad-exit=0 "${PYTHON:-python3}" -m disttrain.launch --grace "${GRACE:-110}" "$@" &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2> /dev/null; do
  code=0
  wait "$step" || code=$?
done

# 75: a signal came and the run has saved. 1, or above 128: a rank failed or was killed, or a signal ended the ranks
# while they were still importing.
again=0
if ((code == 75 || (signalled && code > 128))); then
  again=1
elif ((code == 1 || code > 128)) && ((${SLURM_RESTART_COUNT:-0} < ${RESTARTS:-3})); then
  again=1
fi
if ((again)) && scontrol requeue "$SLURM_JOB_ID"; then
  sleep 60 # until Slurm ends this script
fi
exit "$code"
