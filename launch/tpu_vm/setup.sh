#!/usr/bin/env bash
# Copy this checkout, with its cfg files, to every worker and install it there: setup.sh NAME ZONE
set -euo pipefail

if (($# != 2)); then
  echo "usage: $0 NAME ZONE" >&2
  exit 2
fi
name=$1 zone=$2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ ! -f $root/pyproject.toml ]]; then
  echo "expected this script in launch/tpu_vm of a checkout of disttrain, which it copies, got $0" >&2
  exit 2
fi
archive=$(mktemp -t disttrain.XXXXXX.tgz)
trap 'rm -f "$archive"' EXIT

tar --create --gzip --file "$archive" --directory "$root" \
  --exclude './.*' --exclude ./runs --exclude __pycache__ .
gcloud compute tpus tpu-vm scp "$archive" "$name:disttrain.tgz" --zone "$zone" --worker=all
unpack='mkdir -p disttrain && tar --extract --gzip --file disttrain.tgz --directory disttrain'
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command \
  "$unpack && bash disttrain/launch/tpu_vm/on_worker_setup.sh"
