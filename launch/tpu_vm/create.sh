#!/usr/bin/env bash
# Create a TPU VM, or a slice of several: create.sh NAME ZONE TYPE VERSION [options of gcloud, such as --spot]
set -euo pipefail

if (($# < 4)); then
  echo "usage: $0 NAME ZONE TYPE VERSION [OPTION...]" >&2
  echo "such as: $0 t1 us-west4-a v5litepod-8 v2-alpha-tpuv5-lite --spot" >&2
  exit 2
fi
name=$1 zone=$2 type=$3 version=$4
shift 4

gcloud compute tpus tpu-vm create "$name" --zone "$zone" --accelerator-type "$type" --version "$version" "$@"
