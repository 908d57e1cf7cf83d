# From a fresh clone: `make demo`, `make test`. Needs Python >= 3.10, a C and a C++ compiler.
# The first call creates .venv, installs the dependencies and builds; later calls redo what changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := sh scripts/install.sh $(PIP) install
QUIET := --quiet --no-input
# torch is there already, so the build needs no environment of its own; nor setuptools' reminder.
EDITABLE := USE_CUDA=0 PYTHONWARNINGS='ignore:Editable installation' \
    $(INSTALL) $(QUIET) --no-build-isolation --editable

# The virtual environment's own tools come first, and nothing from outside leaks in.
unexport PYTHONHOME PYTHONPATH

DEPS := $(VENV)/.deps
DOCS := $(VENV)/.docs
BUILT := $(VENV)/.built
SOURCES := setup.py $(shell find csrc -name '*.c' -o -name '*.cpp' -o -name '*.cu' -o -name '*.h')
FORMATTED := $(shell find csrc tests -name '*.c' -o -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow lint format docs bench cuda wheel clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(BUILT) ## train 32 models at once and compare with one by one
	$(BIN)/python examples/simple_demo.py

test: $(BUILT) ## every test but the slow ones
	$(BIN)/python -m pytest -q --durations=10

test-slow: $(BUILT) ## the slow tests
	$(BIN)/python -m pytest -q --durations=10 -m slow

lint: $(DEPS) ## ruff, mypy and clang-format
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: $(DEPS) ## rewrite the sources in the project's style
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

docs: $(BUILT) $(DOCS) ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(BUILT) ## measure, and write results/
	$(BIN)/python benchmarks/run_all.py

cuda: $(DEPS) ## build the CPU and the CUDA library (needs nvcc, no GPU)
	FORCE_CUDA=1 USE_CUDA=1 $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $(BUILT)

wheel: $(DEPS) ## build a wheel into dist/
	$(PIP) wheel $(QUIET) --no-build-isolation --no-deps --wheel-dir dist .

clean: ## remove everything that make created
	rm -rf $(VENV) build dist site *.egg-info modelbatch/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes before the package because the package is built against it.
$(DEPS): pyproject.toml scripts/bootstrap.sh scripts/install.sh
	@sh scripts/bootstrap.sh $(VENV) "$(PYTHON)"
	@echo "modelbatch: installing the dependencies (the first time takes some minutes)"
	@$(INSTALL) $(QUIET) --upgrade pip 'setuptools>=77' wheel
	@$(INSTALL) $(QUIET) 'torch>=2.10' numpy packaging
	@$(EDITABLE) '.[dev]'
	@touch $@

$(DOCS): $(DEPS)
	@$(EDITABLE) '.[docs]'
	@touch $@

# A CUDA library that `make cuda` built stays, and is rebuilt with the rest.
$(BUILT): $(DEPS) $(SOURCES)
	@USE_CUDA=$(if $(wildcard modelbatch/_C_cuda*.so),1,0) \
	    $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@
