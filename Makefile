# `make demo` and `make test` do all their own set-up: a virtual environment in .venv, from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# The tests run two at a time; more threads than cores would only get in each other's way.
JOBS ?= 2

.PHONY: demo test lint types unit venv matrix bench-cpu clean

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/demo.py

test: lint types unit

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

unit: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

venv: $(VENV)/dev.stamp

# The transformers tests in an environment of each supported version: minutes, and gigabytes in .venv-matrix.
matrix:
	$(PYTHON) tests/matrix/run.py

# HQQ_ORIGINAL_PYTHON: the Python of an environment with the original hqq, to compare with (see docs/design.md).
bench-cpu: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.cpu_import
	$(BIN)/python -m benchmarks.cpu_solver $(if $(HQQ_ORIGINAL_PYTHON),--original-python $(HQQ_ORIGINAL_PYTHON))

clean:
	rm -rf $(VENV) build dist demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find hqq tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# Where Python comes without ensurepip (Debian's packages split it off), the outer pip puts one into the environment.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), f"got Python {sys.version}; expected 3.10 to 3.13. Name one: make PYTHON=python3.12 ..."'
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; } || { rm -rf $(VENV); exit 1; }

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing hqq and what the demo needs into $(VENV) (minutes on the first run)"
	$(PIP) -e ".[hf,plots]"
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing hqq and what the tests need into $(VENV) (minutes on the first run)"
	$(PIP) -e ".[hf,peft,plots,dev]"
	@touch $@
