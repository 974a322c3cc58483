#!/usr/bin/env bash
# Delete a TPU VM or slice with everything on its disks: delete.sh NAME ZONE
set -euo pipefail

if (($# != 2)); then
  echo "usage: $0 NAME ZONE" >&2
  exit 2
fi

gcloud compute tpus tpu-vm delete "$1" --zone "$2"
