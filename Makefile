# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
#
#   make demo       a live backup under a busy client, proved byte by byte
#   make test       all tests, those with real clients included (installs Debian packages if root)
#   make test-unit  the tests that need nothing but Python
#   make test-container  builds the container image and tests it (Podman; as root)
#   make fuzz       any bytes at everything that reads bytes, for minutes (FUZZ_ARGS="--seconds 600")
#   make soak       a busy server for minutes, and what is left behind (SOAK_ARGS="--seconds 600")
#   make lint       format, lint and types
#   make bench      one table beside qemu-nbd, qemu-storage-daemon and nbdkit
#   make man        manual pages in man/, from what --help says (a wheel made then has them)
#   make pictures   draws the manual's pictures again, from a real run
#   make clean      remove everything that make made

VENV ?= .venv
PYTHON := $(VENV)/bin/python
PYTEST_ARGS ?=
BENCH_ARGS ?=
FUZZ_ARGS ?=
SOAK_ARGS ?=
SETUP := pyproject.toml scripts/make-venv

.DEFAULT_GOAL := help
.PHONY: help demo test test-unit test-container lint bench man pictures clean interop-tools

help:
	@sed -n 's/^#   make/make/p' Makefile

# One stamp per set of packages: a second call has nothing to do. The demo needs no test tools.
$(VENV)/.ready: $(SETUP)
	scripts/make-venv $(VENV)
	@touch $@

$(VENV)/.ready-dev: $(SETUP)
	scripts/make-venv $(VENV) dev
	@touch $(VENV)/.ready $@

interop-tools:
	@scripts/interop-tools

demo: $(VENV)/.ready
	$(PYTHON) -m nbdjobs demo

# Debian's venv module may be among the missing packages, so they come first.
test: interop-tools
	@$(MAKE) --no-print-directory $(VENV)/.ready-dev
	NBDJOBS_REQUIRE_INTEROP=1 $(PYTHON) -m pytest $(PYTEST_ARGS)

test-unit: $(VENV)/.ready-dev
	$(PYTHON) -m pytest -m "not interop" $(PYTEST_ARGS)

test-container: interop-tools
	@$(MAKE) --no-print-directory $(VENV)/.ready-dev
	NBDJOBS_CONTAINER_TEST=1 $(PYTHON) -m pytest tests/docker $(PYTEST_ARGS)

# Guided by coverage where atheris can be installed, which no other target asks for.
fuzz: $(VENV)/.ready-dev
	@$(PYTHON) -c "import atheris" 2>/dev/null || $(PYTHON) -m pip install --quiet atheris || true
	$(PYTHON) -m tests.fuzz $(FUZZ_ARGS)

soak: interop-tools
	@$(MAKE) --no-print-directory $(VENV)/.ready-dev
	$(PYTHON) -m tests.soak $(SOAK_ARGS)

lint: $(VENV)/.ready-dev
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

bench: interop-tools
	@$(MAKE) --no-print-directory $(VENV)/.ready-dev
	$(PYTHON) -m benchmarks $(BENCH_ARGS)

man: $(VENV)/.ready
	$(PYTHON) scripts/make-man man

pictures: $(VENV)/.ready
	$(PYTHON) scripts/make-pictures docs/images

clean:
	rm -rf man $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
