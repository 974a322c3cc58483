#!/usr/bin/env bash
# Run as a Slurm job that saves and is queued again when its time is up: sbatch [OPTION...] job.sh CFG.PY [WORD...]
#
# WORDs are the arguments of `disttrain launch`. The run directory must be on a file system that all nodes see.
# These variables change the job (default):
#
# RANKS      ranks on each node (the number of its GPUs, or 1)
# PYTHON     the interpreter (python3)
# RDZV_HOST  an address of the first node that all other nodes reach (its name)
# GRACE      seconds that ranks have to save (110); change it together with --signal below, or with the GraceTime of a
#            partition whose jobs are preempted
#SBATCH --job-name=disttrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if (($# < 1)) || [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "usage: sbatch [OPTION...] $0 CFG.PY [WORD...]" >&2
  echo "such as: sbatch --nodes 2 --time 4:00:00 $0 examples/digits.py" >&2
  exit 2
fi

unset PET_SHUTDOWN_TIMEOUT # torchrun would prefer it
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE:-110}" # without it torchrun kills ranks after 30 s
words=(--ranks "${RANKS:-${SLURM_GPUS_ON_NODE:-1}}")
if ((SLURM_NNODES > 1)); then
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  words+=(--nodes "$SLURM_NNODES" --rdzv "${RDZV_HOST:-${hosts[0]}}:$((20000 + SLURM_JOB_ID % 10000))")
fi

# A signal to this shell ends its `wait`. srun passes each signal on to the ranks.
signalled=0
step=
trap 'signalled=1; [[ -z $step ]] || kill -USR1 "$step"' USR1
trap 'signalled=1; [[ -z $step ]] || kill -TERM "$step"' TERM
srun --kill-on-bad-exit=0 "${PYTHON:-python3}" -m disttrain launch "${words[@]}" "$@" &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2> /dev/null; do
  code=0
  wait "$step" || code=$?
done

# 75: a signal came and the run has saved. Above 128: the signal ended the ranks while they were still importing. Slurm
# would count the job as failed, so this script queues it again.
if ((code == 75 || (signalled && code > 128))) && scontrol requeue "$SLURM_JOB_ID"; then
  sleep 60 # until Slurm ends this script
fi
exit "$code"
