#!/usr/bin/env bash
# Save a checkpoint and end the run, on every worker: stop.sh NAME ZONE. To end run.sh alone would leave it running.
set -euo pipefail

if (($# != 2)); then
  echo "usage: $0 NAME ZONE" >&2
  exit 2
fi

gcloud compute tpus tpu-vm ssh "$1" --zone "$2" --worker=all --command 'kill -TERM "$(cat disttrain/torchrun.pid)"'
