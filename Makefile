# make demo      the whole main job on the embedded world, from nothing to three scores (CPU, minutes)
# make setup     only the environment: .venv with the locked versions
# make test      everything that this machine can test;  make lint: formatting, lint, types
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo setup setup-cuda setup-mac test test-all test-gpu lint lock clean

demo: setup
	@$(BIN)/python -c "import os; print(f'phaseline: {os.cpu_count()} cores; about five minutes on two')"
	@PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --quiet rules -- results/ifeval_base.json results/ifeval_sft_v2.json results/ifeval_dpo.json
	@echo
	@$(BIN)/python -m workflow_scripts.tools.compare results/ifeval_base.json results/ifeval_sft_v2.json results/ifeval_dpo.json
	@echo
	@echo "scores    results/ifeval_{base,sft_v2,dpo}.json   per prompt, with standard errors"
	@echo "answers   results/dpo/ifeval_responses.jsonl      what the model wrote"
	@echo "adapters  results/{sft_v2,dpo}/adapter/           load with peft's PeftModel.from_pretrained"
	@echo "next      change a number in config/config.yaml, then: source .venv/bin/activate && snakemake -n results/ifeval_dpo.json"

setup: $(STAMP)

$(STAMP): envs/requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"phaseline needs Python 3.11 or later, {sys.executable} is {sys.version.split()[0]}; try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement envs/requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

# The same lock: on Linux, pip's default torch is the CUDA build. Then checks the GPU as every step will.
setup-cuda: setup
	@$(BIN)/python -m workflow_scripts.tools.gpu

# Apple silicon: steps run on the CPU. Where bitsandbytes has no backend, set `quantise: none` (docs/when-not.md).
setup-mac: setup
	@$(BIN)/python -c 'import torch, bitsandbytes as b; q, s = b.functional.quantize_4bit(torch.randn(64, 64), quant_type="nf4"); b.functional.dequantize_4bit(q, s); print("NF4 works here")' \
	  || { echo "bitsandbytes has no 4-bit backend here: set methods.sft.quantise: none in your config (docs/when-not.md)"; exit 1; }

test: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q

# Three seeds of the tiny world in full, beside everything in `make test`.
test-all: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" PHASELINE_TEST_ALL=1 $(BIN)/python -m pytest -q

# Needs a CUDA device; elsewhere these tests are skipped.
test-gpu: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q -s tests/test_gpu.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check workflow_scripts tests
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint
	$(BIN)/mypy

# Writes the versions that are installed now into the lock file, without local tags (+cpu).
lock:
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' > envs/requirements.lock

clean:
	rm -rf results logs benchmarks .snakemake
