#!/usr/bin/env bash
# Run the store at which hosts meet in a process of its own, so that it outlives every host: store.sh HOST:PORT
#
# The store listens on that address and accepts everyone, so choose a network that you trust. Ctrl-C ends it.
set -euo pipefail

if (($# != 1)) || [[ $1 != *:* ]]; then
  echo "usage: $0 HOST:PORT   such as: $0 node-0:29500" >&2
  exit 2
fi

exec "${PYTHON:-python3}" - "${1%:*}" "${1##*:}" <<'PROGRAM'
import signal
import sys

ends = {signal.SIGINT, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # first of all, so that the store's threads do not get them

from torch.distributed import TCPStore

store = TCPStore(sys.argv[1], int(sys.argv[2]), is_master=True, wait_for_workers=False)
print(f"hosts meet at {store.host}:{store.port}", flush=True)
signal.sigwait(ends)
PROGRAM
