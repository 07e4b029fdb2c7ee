# Each target makes the environment that it needs, once: PYTHON picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test bench lint thorough clean

demo: $(READY)
	$(BIN)/python -m fast demo

test: $(READY)
	$(BIN)/python -m pytest parity/ -n auto -q

# QUICK=1: a few rows, in minutes; the page is left as it is.
bench: $(READY)
	$(BIN)/python -m fast bench $(if $(QUICK),--quick,--page docs/performance.md)

thorough: $(READY)
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest parity/ -n auto -q

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
