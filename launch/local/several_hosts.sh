#!/usr/bin/env bash
# Train on several hosts. Type on each of them: several_hosts.sh HOSTS ADDRESS RANKS CFG.PY [WORD...]
#
# HOSTS    the number of hosts, or MIN:MAX: the run begins with MIN hosts, grows to MAX as hosts come, and continues
#          with the others when a host is lost
# ADDRESS  HOST:PORT of the store at which the hosts meet: on the first host, or where store.sh runs. In the second case
#          set STORE=1. The run then survives the loss of any host but that one.
# RANKS    the number of processes on each host
set -euo pipefail

if (($# < 4)); then
  echo "usage: $0 HOSTS HOST:PORT RANKS CFG.PY [WORD...]" >&2
  echo "such as: $0 2:4 node-1:29500 8 cfg.py --runs /shared/runs" >&2
  exit 2
fi
hosts=$1 address=$2 ranks=$3
shift 3

words=()
if [[ -n ${STORE:-} ]]; then
  words+=(--no-rdzv-host)
fi
exec "${PYTHON:-python3}" -m disttrain launch --nodes "$hosts" --rdzv "$address" --ranks "$ranks" "${words[@]}" "$@"
