# make demo and make test need Python 3.11, 3.12 or 3.13, make, and a package index; everything else goes into .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
LOCKED := $(VENV)/.locked
READY := $(VENV)/.ready

# The first of these that is a fit Python; PYTHON=… on the command line overrules it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo "$$p" && break; done)

WORKERS := --numprocesses auto --maxprocesses 4 --dist worksteal

# No package may come from elsewhere than the virtual environment.
unexport PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE := 1

.PHONY: help demo test lint ide lock clean

help:
	@echo "make demo   upscale a photo, export the model to an Arm Ethos-U file, show before and after"
	@echo "make test   run the tests, on TensorFlow and on JAX"
	@echo "make lint   ruff, import directions, types"
	@echo "make ide    editable install that editors can follow"
	@echo "make lock   resolve requirements.in again (needs uv)"
	@echo "make clean  remove what was built, .venv too"

.venv: $(READY)

# Made anew whenever the lock changes. Each stamp comes last, so a broken install is no install.
$(LOCKED): requirements.lock
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found. Install one, or say: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments; on Debian install python3-venv." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	touch $(LOCKED)

$(READY): $(LOCKED) setup.cfg
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/sesr.py

# One backend a run, since Keras reads KERAS_BACKEND once; a few workers, since each holds a TensorFlow.
test: $(READY)
	KERAS_BACKEND=tensorflow $(BIN)/pytest $(WORKERS)
	KERAS_BACKEND=jax $(BIN)/pytest $(WORKERS) -m "(contract or jax) and not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	.ci/wheel $(BIN)/python

# Editors and type checkers do not follow the finder of a default editable install; the strict one is a tree of links.
ide: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . --config-settings editable_mode=strict

# tensorflow-recommenders asks for tensorflow-macos, which died with TensorFlow 2.16 and has no wheel for today's Python.
lock:
	uv pip compile --universal --python-version 3.11 --no-annotate --no-header --excludes <(echo tensorflow-macos) requirements.in -o requirements.lock

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
