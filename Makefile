# The commands that users and CI type. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# pip uses its cache and local folders of wheels as it is configured.
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
LAUNCHERS_STAMP := $(VENV)/.installed-launchers
XLA_VENV ?= .venv-xla
XLA_STAMP := $(XLA_VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-xla slow slurm soak lint types check format clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## make the virtual environment in .venv, pinned by constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'disttrain needs Python 3.11 or newer; set PYTHON=/path/to/python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup  ## train the handwritten-digits example on 2 gloo ranks
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m disttrain.launch examples/digits.py

test: setup  ## run the test suite (about 8 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Ray, SkyPilot and Kubernetes' schemas, beside what `setup` installs; pip changes none of its versions.
$(LAUNCHERS_STAMP): $(STAMP)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,launchers]'
	@touch $@

# `make slow` runs the tests of launch/slurm where it is installed; elsewhere they say that they were skipped.
slurm:  ## install the scheduler of launch/slurm by apt-get, as root
	@command -v slurmctld slurmd munged > /dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && \
		timeout 120 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -qq --no-install-recommends \
		slurmctld slurmd slurm-client munge > /dev/null; } || echo 'Slurm is not installed: its tests are skipped'

slow: $(LAUNCHERS_STAMP)  ## run the long tests, which `make test` leaves out (about 30 minutes)
	$(BIN)/python -m pytest -m slow --timeout 900 -o faulthandler_timeout=1200 -n 2 --dist loadfile

soak: setup  ## 400 kills, 80 power losses and 20 minutes of faults on three hosts (root), fuzzing, 500 programs, recoveries; 2 hours
	$(BIN)/python -m pytest -n 2 --dist loadfile --hypothesis-profile explore \
		tests/properties tests/checkpoint tests/config
	$(BIN)/python -m pytest --timeout 3600 -o faulthandler_timeout=4000 --hypothesis-profile explore tests/zoo/test_zoo_programs.py
	$(BIN)/python -m pytest -m soak --timeout 3000 -o faulthandler_timeout=3600
	$(BIN)/python tests/soak/fuzz.py --seconds 60
	$(BIN)/python tests/soak/power.py --losses 40
	$(BIN)/python tests/soak/kills.py --kills 200
	$(BIN)/python tests/soak/kills.py --kills 200 --asynchronous
	$(BIN)/python tests/soak/chaos.py --minutes 20
	$(BIN)/python tests/launching/test_recovery_simulated.py 1000000 100000

test-xla: $(XLA_STAMP)  ## run the XLA backend and the suite's core on torch 2.9, in .venv-xla (6 GB, made in 3 minutes)
	$(XLA_VENV)/bin/python -m pytest -n 2 --dist loadfile tests/xla
	$(XLA_VENV)/bin/python -m pytest -n 2 --dist loadfile $(shell cat tests/xla/core.txt)

$(XLA_STAMP): pyproject.toml constraints-xla.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo 'torch_xla 2.9.0 is tested with Python 3.11; set PYTHON=/path/to/python3.11'; exit 1; }
	$(PYTHON) -m venv $(XLA_VENV)
	$(XLA_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement constraints-xla.txt
	$(XLA_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --editable .
	@touch $@

lint: setup  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## check types, strictly
	$(BIN)/mypy

check: lint types  ## lint and types

format: setup  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the files of setup and of the tools; runs/ stays
	rm -rf $(VENV) $(XLA_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
