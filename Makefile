# Everything runs from .venv, which the first target that needs it makes; a second run installs nothing.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Compiled modules are stored after the first import even where the shell forbids it: every worker of Ray is a process
# of its own, and compiling what it imports takes it 11 s instead of 4.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all nightly bench check format clean
demo: $(READY)
	$(BIN)/python pipelines/demo.py

# Three processes: one waits for Ray most of the time.
test: $(READY)
	$(BIN)/python -m pytest -n 3

test-all: $(READY)
	$(BIN)/python -m pytest -n 3 -m 'not nightly'

# Takes hours; writes runs/nightly/summary.md.
nightly: $(READY)
	$(BIN)/python tests/nightly.py

# How fast each part is, next to what a user would take instead: `make bench BENCH='--only single'` runs some rows.
bench: $(READY)
	$(BIN)/python benchmarks/bench.py $(BENCH)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $(READY)
