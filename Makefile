# Everything runs from .venv, which the first target that needs it makes; a second run installs nothing.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-cluster soak bench check format clean
demo: $(READY)
	$(BIN)/python pipelines/demo.py

# Two processes, each with a Ray of its own: half of the time is waiting.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not cluster'

test-cluster: $(READY)
	$(BIN)/python -m pytest -m '(slow or cluster) and not soak'

soak: $(READY)
	RAYDETR_SOAK_MINUTES=60 $(BIN)/python -m pytest -m soak

# What everything costs beside what a user would take instead: `make bench BENCH='--only single'` for some rows.
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
