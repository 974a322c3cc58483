#!/usr/bin/env bash
# A run as a Slurm job that is saved and queued again when its time is up: sbatch [OPTION...] job.sh CFG.PY [WORD...]
#
# WORDs are those of `disttrain launch`. RANKS is the number of ranks a node (its GPUs, or 1), PYTHON the interpreter
# (python3), RDZV_HOST an address of the first node that all others reach (its name). GRACE is how many seconds ranks
# have to save (110): change it with --signal below, or with the GraceTime of a partition whose jobs are preempted. The
# run directory must be on a file system that all nodes see.
#SBATCH --job-name=disttrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if (($# < 1)) || [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "usage: sbatch [OPTION...] $0 CFG.PY [WORD...]   such as: sbatch --nodes 2 --time 4:00:00 $0 examples/digits.py" >&2
  exit 2
fi

unset PET_SHUTDOWN_TIMEOUT # which would win
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE:-110}" # torchrun would kill ranks after 30 s
words=(--ranks "${RANKS:-${SLURM_GPUS_ON_NODE:-1}}")
if ((SLURM_NNODES > 1)); then
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  words+=(--nodes "$SLURM_NNODES" --rdzv "${RDZV_HOST:-${hosts[0]}}:$((20000 + SLURM_JOB_ID % 10000))")
fi

# A signal to this shell ends its `wait`; srun passes on what it is sent.
told=0
step=
trap 'told=1; [[ -z $step ]] || kill -USR1 "$step"' USR1
trap 'told=1; [[ -z $step ]] || kill -TERM "$step"' TERM
srun --kill-on-bad-exit=0 "${PYTHON:-python3}" -m disttrain.cli launch "${words[@]}" "$@" &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2> /dev/null; do
  code=0
  wait "$step" || code=$?
done

# 75: saved because of a signal; above 128: ended by it while it was still importing. Slurm would call the job failed,
# so it is queued again from here.
if ((code == 75 || (told && code > 128))) && scontrol requeue "$SLURM_JOB_ID"; then
  sleep 60 # until Slurm ends this script
fi
exit "$code"
