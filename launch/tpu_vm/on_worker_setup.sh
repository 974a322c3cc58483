#!/usr/bin/env bash
# Install on one worker the checkout that setup.sh has copied. The VMs' own Python is too old for disttrain.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if ! command -v python3.11 > /dev/null; then
  sudo apt-get update
  sudo apt-get install --yes python3.11 python3.11-venv
fi
python3.11 -m venv .venv
.venv/bin/pip install --constraint constraints-xla.txt '.[examples]' 'torch_xla[tpu]==2.9.0'
