# Two commands matter: `make demo` and `make test`. Each does all of its own set-up.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What each command installs; a stamp file says that it is there, and goes stale with pyproject.toml.
DEMO_EXTRAS := quantize-onnx,sample
DEV_EXTRAS := quantize,sample,llamacpp,dev

.PHONY: help demo test test-variants check format bench docs clean
help:
	@echo "make demo    a Phi model all the way: quantized, signed, delivered, proven, served, answering"
	@echo "make test    all tests"
	@echo "make test-variants  every Phi in every toolchain at every precision for every target, a quarter of an hour"
	@echo "make check   format, lint, types, import rules, generated docs"
	@echo "make bench   the figures of the README, as ratios against a peer in the same run"
	@echo "make docs    write the generated docs again"
	@echo "make format  format the code"
	@echo "make clean   remove the virtual environment and caches"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "phifleet needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Name another with PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "the venv module is missing: on Debian, apt-get install python3-venv"; exit 1; }

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@test -e $(VENV)/.dev || echo "installing the toolchain of the demo (ONNX Runtime GenAI, PyTorch); a few minutes at the first time"
	$(PIP) install --quiet --editable '.[$(DEMO_EXTRAS)]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "installing all toolchains and the tools of development; llama-cpp-python may compile for ten minutes"
	CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) $(PIP) install --quiet --editable '.[$(DEV_EXTRAS)]'
	@touch $@ $(VENV)/.demo

# Debian packages that the tests use: the broker, and a browser for the pages.
.PHONY: debian
debian:
	@missing=; \
	PATH="$$PATH:/usr/sbin" command -v mosquitto >/dev/null || missing="mosquitto"; \
	command -v chromium >/dev/null || missing="$$missing chromium"; \
	if test -n "$$missing"; then \
	  echo "installing from Debian: $$missing"; \
	  run=; test "$$(id -u)" = 0 || run=sudo; \
	  $$run apt-get update -qq && $$run env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi

demo: $(VENV)/.demo
	@$(BIN)/phifleet demo

test: $(VENV)/.dev debian
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# Every Phi's network in every toolchain at every precision for every target; `make test` has FP32 of each.
test-variants: export PHIFLEET_VARIANTS ?= all
test-variants: $(VENV)/.dev
	@$(BIN)/python -m pytest -m variants tests/fleet/quality/test_variants.py

check: $(VENV)/.dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python docs/generate.py --check

format: $(VENV)/.dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: $(VENV)/.dev
	@$(BIN)/python docs/generate.py

bench: $(VENV)/.dev debian
	@$(BIN)/python -m bench $(BENCH)

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
