# Each of these sets up everything it needs in .venv first, once, and again only after an input changed.
#   make lab     JupyterLab on the quickstart (a copy in ./rlhf-quickstart/, yours to edit)
#   make demo    the quickstart without a browser; leaves report.html
#   make check   ruff, mypy, import contracts, TypeScript types, generated protocol types and table of methods
#   make test    every test that needs no GPU       (make test PYTEST_ARGS="tests/maths -x" for a part)
#   make clean   removes what this file built, .venv included
# PYTHON=python3.12 chooses the interpreter of .venv; default: the first Python >= 3.11 found.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NPM := $(BIN)/python widgets/npm.py
ROOT_FLAG := $(shell [ "$$(id -u)" = 0 ] && echo --allow-root)
INPUTS := pyproject.toml constraints.txt hatch_build.py widgets/npm.py widgets/package.json widgets/package-lock.json \
	widgets/esbuild.mjs $(shell find widgets/src -name '*.ts' -o -name '*.css' 2>/dev/null)

RUN_READY := $(VENV)/.ready-run
DEV_READY := $(VENV)/.ready-dev
NODE_READY := widgets/node_modules/.ready

.PHONY: screenshots help lab demo check check-lint check-format check-types check-imports check-typescript check-protocol \
	check-methods test test-python test-widgets format constraints clean
help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "no Python >= 3.11 found; install one, or: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) cannot make environments; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The editable install also compiles the widgets (hatch_build.py), hence their sources among the inputs.
$(RUN_READY): $(INPUTS) | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e '.[train]'
	@touch $@

$(DEV_READY): $(INPUTS) | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e '.[train,postgres,dev]'
	@touch $(RUN_READY) $@

$(NODE_READY): widgets/package.json widgets/package-lock.json | $(DEV_READY)
	$(NPM) ci
	@touch $@

lab: $(RUN_READY)
	@mkdir -p rlhf-quickstart
	@for f in notebooks/*.ipynb; do [ -e "rlhf-quickstart/$${f##*/}" ] || cp "$$f" rlhf-quickstart/; done
	@echo "notebooks: $(CURDIR)/rlhf-quickstart (copies; delete one to get it afresh)"
	$(BIN)/jupyter lab $(ROOT_FLAG) --notebook-dir=rlhf-quickstart --LabApp.default_url=/lab/tree/00_quickstart.ipynb $(LAB_ARGS)

demo: $(RUN_READY)
	@rm -rf build/demo && mkdir -p build/demo && cp notebooks/*.ipynb build/demo/
	cd build/demo && RLHF_NB_AUTOLABEL=$${RLHF_NB_AUTOLABEL:-toy-annotator} $(CURDIR)/$(BIN)/jupyter nbconvert \
		--to html --execute --ExecutePreprocessor.kernel_name=python3 --ExecutePreprocessor.timeout=1200 \
		--output-dir $(CURDIR) --output report.html 00_quickstart.ipynb
	@echo "report: $(CURDIR)/report.html"

check: check-lint check-format check-types check-imports check-typescript check-protocol check-methods
check-lint: $(DEV_READY)
	$(BIN)/ruff check .
check-format: $(DEV_READY)
	$(BIN)/ruff format --check .
check-types: $(DEV_READY)
	$(BIN)/mypy
check-imports: $(DEV_READY)
	$(BIN)/lint-imports
check-typescript: $(NODE_READY)
	$(NPM) run typecheck
check-protocol: $(DEV_READY)
	$(BIN)/python -m rlhf_nb.protocol.generate --check
check-methods: $(DEV_READY)
	$(BIN)/python -m rlhf_nb.methods.table --check

format: $(DEV_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: test-widgets test-python

test-widgets: $(NODE_READY)
	$(NPM) test

# Two processes share the tests file by file, the longest files first: browsers, chapters and Binder's quickstart take
# minutes a file, and nothing is to be left to one process alone in the end.
LONG := $(addprefix tests/,packaging/test_binder.py notebooks e2e methods training compute fidelity stages magics)
SUITES := $(LONG) $(filter-out $(LONG) %/__pycache__,$(patsubst %/,%,$(wildcard tests/*/)))
PYTEST_READY := $(DEV_READY) .venv-ipykernel6/.ready .venv-vllm/.ready

ifdef PYTEST_ARGS
test-python: $(PYTEST_READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)
else
test-python: $(PYTEST_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25 $(SUITES)
endif

# The field still has ipykernel 6, which blocks comm messages while a cell runs. This environment holds only that
# package; everything else is seen through a .pth file, so it costs seconds and not gigabytes. addsitedir and not a bare
# path: the editable install is itself a .pth file there.
.venv-ipykernel6/.ready: $(DEV_READY)
	rm -rf .venv-ipykernel6
	$(BIN)/python -m venv --without-pip .venv-ipykernel6
	$(PIP) --python .venv-ipykernel6/bin/python install --quiet --no-deps 'ipykernel==6.31.0' 'nest-asyncio==1.6.0'
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$(.venv-ipykernel6/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_main_environment.pth"
	@touch $@

# vLLM holds other versions of torch and transformers than .venv, so it has an environment of its own. Its CPU build is
# a third party's; the official wheels are for CUDA.
.venv-vllm/.ready: requirements-vllm.txt | $(BIN)/python
	rm -rf .venv-vllm
	$(BIN)/python -m venv --without-pip .venv-vllm
	$(PIP) --python .venv-vllm/bin/python install --quiet $$(grep '^torch==' requirements-vllm.txt)
	$(PIP) --python .venv-vllm/bin/python install --quiet --no-deps -r requirements-vllm.txt
	@touch $@

# After a deliberate upgrade in .venv: pin what is there, without local version tags, so that the file holds everywhere.
constraints: | $(BIN)/python
	{ sed -n '/^#/p' constraints.txt; $(PIP) freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//' ; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) .venv-ipykernel6 .venv-vllm widgets/node_modules rlhf_nb/ui/static build dist .mypy_cache .ruff_cache \
		.import_linter_cache .pytest_cache report.html

# The README's pictures, taken of the real thing.
screenshots: $(DEV_READY) $(NODE_READY)
	RLHF_NB_SCREENSHOTS=$(CURDIR)/widgets/screenshots $(BIN)/python -m pytest tests/e2e/pictures.py -q
