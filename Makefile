# One target per habit; `make help` lists them. The first run makes .venv; later ones find stamp files and start.
#   PYTHON=python3.12       the interpreter that .venv is made from
#   PY=python               run in an environment that you prepared: no .venv, nothing is installed
#   TORCH=torch==2.13.0     what is installed as torch, with TORCH_ARGS for pip (an index with CPU builds, say)
#   ARGS="-k window"        more arguments for pytest, or for stattn demo
#   STATTN_CUDA=0|1         leave the CUDA library out, or fail when it cannot be built

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
TORCH_ARGS ?=
ARGS ?=

ifndef PY
PY := .venv/bin/python
SETUP := .venv
endif
PIP := $(PY) -m pip --quiet --disable-pip-version-check
# Files of tests are dealt out whole, since their tests share fixtures. Beyond eight processes the longest file decides.
SPREAD := -n auto --maxprocesses 8 --dist loadfile
ready = $(if $(SETUP),.venv/.stattn-$(1)) build/.extension

.PHONY: help demo test smoke gpu-test bench lint wheel fresh clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(call ready,demo) ## sample and edit a video with the shipped model
	$(PY) -m stattn.cli demo $(ARGS)

test: $(call ready,test) ## every test that runs without a GPU
	$(PY) -m pytest -m "not gpu" $(SPREAD) $(ARGS)

smoke: $(call ready,test) ## the quick tests: under a minute
	$(PY) -m pytest -m "smoke and not gpu" $(ARGS)

gpu-test: $(call ready,test) ## the tests that need a GPU
	$(PY) -m pytest -m gpu $(ARGS)

# The report is of what this run measured; it is written where a benchmark failed, too.
bench: $(call ready,test) ## the benchmarks of this machine; their report: build/report/index.html
	rm -rf build/results
	@status=0; \
	$(PY) -m pytest benchmarks -m "not slow" --results build/results --benchmark-json=build/benchmarks.json $(ARGS) \
		|| status=$$?; \
	$(PY) -m stattn.cli report build/results --out build/report || status=1; \
	exit $$status

lint: $(if $(SETUP),.venv/.stattn-lint) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

wheel: $(if $(SETUP),.venv/.torch) ## dist/stattn-*.whl and dist/stattn-*.tar.gz
	rm -rf dist build/lib* build/bdist*
	$(PY) -m pip --disable-pip-version-check wheel --no-deps --no-build-isolation --wheel-dir dist .
	$(PY) -c "from setuptools import build_meta; build_meta.build_sdist('dist')"

fresh: wheel ## the README's code in a new environment that holds the wheel and what it asks for
	rm -rf build/fresh
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/pip install --quiet --disable-pip-version-check $(TORCH_ARGS) "$(TORCH)" dist/stattn-*.whl
	build/fresh/bin/python tests/guides.py README.md

clean: ## remove what was built; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache stattn/libstattn.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# With a GPU, a torch that PYTHON already imports is kept: it fits the driver. Otherwise TORCH is installed first and by
# name, so that no other package chooses one. Without ensurepip (Debian without python3-venv), pip installs itself.
.venv/.torch:
	@echo "making .venv"
	@site=; if nvidia-smi -L >/dev/null 2>&1; then site=--system-site-packages; fi; \
	rm -rf .venv; \
	if $(PYTHON) -c "import ensurepip" 2>/dev/null; then $(PYTHON) -m venv $$site .venv; \
	else $(PYTHON) -m venv --without-pip $$site .venv && $(PYTHON) -m pip --python .venv/bin/python install --quiet pip; fi
	@$(PY) -c "import torch" 2>/dev/null || { echo "installing $(TORCH)"; $(PIP) install $(TORCH_ARGS) "$(TORCH)"; }
	@$(PIP) install "setuptools>=77.0.3" ninja
	@touch $@

.venv/.triton: .venv/.torch
	@$(PY) -c "import triton" 2>/dev/null || { echo "installing $(TRITON)"; $(PIP) install "$(TRITON)"; }
	@touch $@

.venv/.stattn-test: .venv/.triton

# The extension has a rule of its own below, so that its compiler speaks where it can be heard.
.venv/.stattn-%: .venv/.torch pyproject.toml setup.py
	@echo "installing stattn[$*]"
	@STATTN_CUDA=0 $(PIP) install --no-build-isolation --editable ".[$*]"
	@touch $@

build/.extension: setup.py $(wildcard csrc/*) $(if $(SETUP),.venv/.torch)
	@$(PY) setup.py --quiet build_ext --inplace
	@mkdir -p build && touch $@
