#!/usr/bin/env bash
# Start torchrun on one worker, with a rank for each chip: on_worker_run.sh ADDRESS,ADDRESS,... CFG.PY [KEY=VALUE...]
#
# The addresses are those of all workers, in their order. The ranks meet at the first one. Set CHIPS to the number of
# this worker's chips if they cannot be counted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

IFS=, read -ra addresses <<< "$1"
shift
read -ra mine <<< "$(hostname -I)"
node_rank=
for i in "${!addresses[@]}"; do
  for address in "${mine[@]}"; do
    if [[ $address == "${addresses[i]}" ]]; then
      node_rank=$i
    fi
  done
done
if [[ -z $node_rank ]]; then
  echo "expected one of this worker's addresses (${mine[*]}) among those of the slice (${addresses[*]})" >&2
  exit 1
fi

if [[ -z ${CHIPS:-} ]]; then
  shopt -s nullglob
  chips=(/dev/accel[0-9]* /dev/vfio/[0-9]*)
  CHIPS=${#chips[@]}
fi
if ((CHIPS == 0)); then
  echo "expected TPU chips (/dev/accel*, /dev/vfio/*), found none; set CHIPS to their number" >&2
  exit 1
fi

export PJRT_DEVICE=${PJRT_DEVICE:-TPU}
echo $$ > torchrun.pid
exec .venv/bin/torchrun --nnodes "${#addresses[@]}" --node-rank "$node_rank" --nproc-per-node "$CHIPS" \
  --master-addr "${addresses[0]}" --master-port "${MASTER_PORT:-29500}" -m disttrain.launch "$@"
