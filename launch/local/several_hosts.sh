#!/usr/bin/env bash
# Trains on several hosts, or on as many as there are: several_hosts.sh HOSTS ADDRESS RANKS CFG.PY [WORD...], on each
#
# HOSTS is their number, or MIN:MAX: the run begins with MIN, grows to MAX as they come, and goes on with what is left
# when one is lost. ADDRESS (HOST:PORT) is where they meet, on the first of them, or where store.sh runs: then set
# STORE=1, and the run survives the loss of any host but that one. RANKS is the number of processes on each.
set -euo pipefail

if (($# < 4)); then
  echo "usage: $0 HOSTS HOST:PORT RANKS CFG.PY [WORD...]   such as: $0 2:4 node-1:29500 8 cfg.py --runs /shared/runs" >&2
  exit 2
fi
hosts=$1 address=$2 ranks=$3
shift 3

words=()
if [[ -n ${STORE:-} ]]; then
  words+=(--no-rdzv-host)
fi
exec "${PYTHON:-python3}" -m disttrain.cli launch --nodes "$hosts" --rdzv "$address" --ranks "$ranks" "${words[@]}" "$@"
