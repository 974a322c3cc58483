#!/usr/bin/env bash
# Train on every chip of a TPU VM or a slice: run.sh NAME ZONE CFG.PY [KEY=VALUE or option of the launcher...]
#
# CFG.PY and --runs are paths on the workers, relative to the checkout there. The same command again resumes the run.
set -euo pipefail

if (($# < 3)); then
  echo "usage: $0 NAME ZONE CFG.PY [KEY=VALUE...]   such as: $0 t1 us-west4-a examples/digits.py max_epochs=2" >&2
  exit 2
fi
name=$1 zone=$2
shift 2

addresses=$(gcloud compute tpus tpu-vm describe "$name" --zone "$zone" --format 'value(networkEndpoints[].ipAddress)')
if [[ -z $addresses ]]; then
  echo "$name in $zone has no address; see: gcloud compute tpus tpu-vm describe $name --zone $zone" >&2
  exit 1
fi
printf -v words '%q ' "${addresses//;/,}" "$@"
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command \
  "bash disttrain/launch/tpu_vm/on_worker_run.sh $words"
