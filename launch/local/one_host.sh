#!/usr/bin/env bash
# Train on this host: one_host.sh RANKS CFG.PY [WORD...]. The same command again resumes the run.
set -euo pipefail

if (($# < 2)); then
  echo "usage: $0 RANKS CFG.PY [WORD...]   such as: $0 2 examples/digits.py max_epochs=2" >&2
  exit 2
fi
ranks=$1
shift

exec "${PYTHON:-python3}" -m disttrain launch --ranks "$ranks" "$@"
