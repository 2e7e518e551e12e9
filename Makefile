# Everything runs from .venv, which the first target that needs it creates; later runs install nothing.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Cache compiled modules even if the shell disables it: every Ray worker is a new process whose imports take 4 s with
# cached modules and 11 s without.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all nightly bench docs check format clean
demo: $(READY)
	$(BIN)/python pipelines/demo.py

# Three processes, one of which mostly waits for Ray.
test: $(READY)
	$(BIN)/python -m pytest -n 3

test-all: $(READY)
	$(BIN)/python -m pytest -n 3 -m 'not nightly'

# Takes hours; writes runs/nightly/summary.md.
nightly: $(READY)
	$(BIN)/python tests/nightly.py

# Compares the speed of each part with the alternative that users have. `make bench BENCH='--only single'` runs some rows.
bench: $(READY)
	$(BIN)/python benchmarks/bench.py $(BENCH)

# The site of docs/ in runs/site; a broken link is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

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
