# make train   trains three preference methods on real text (4 minutes on two cores)
# make rlhf    fine-tunes, trains a reward model, then DPO, RPO, DRO and GRPO against it (6 minutes)
# make claims  tries what the papers claim on a small model (20 minutes)
# make test    lint, types, kernels and all tests
# make bench   the CPU benchmark suite, with peers (7 minutes)
# make emulate every test of the kernels on what Triton compiles of them, executed without a GPU: all dtypes,
#              for an A100 and an H100, warps in several orders; in bf16 on the Tritons of make compat, too;
#              and every planted mistake (25 minutes)
# make kernels compiles every kernel for GPUs and fails on a spill (1 to 2 minutes)
# make compat  the core of the tests on the oldest versions, on those of a GPU image, and the trainers on
#              every TRL from 1.9, in Axolotl, in LLaMA-Factory and in ms-swift (30 GB)
# make distributed  FSDP and DeepSpeed's ZeRO and Ulysses under trainers, on two CPU processes
# make dist    builds the wheel and the sources' archive and checks each alone, on the oldest and the
#              newest Python (4 minutes, and torch for each)
# make frameworks  trains a tiny model with Axolotl, LLaMA-Factory and ms-swift, and our loss
# make docs    builds the documentation site, strictly, into site/ (1 minute the first time)
# make report  tables and pictures from the committed results

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: train rlhf claims test lint emulate kernels bench compat distributed frameworks docs dist report clean

train: $(VENV)/installed
	$(RUN) examples/quickstart.py $(ARGS)

rlhf: $(VENV)/installed
	$(RUN) examples/rlhf.py $(ARGS)

claims: $(VENV)/installed
	$(RUN) examples/claims.py $(ARGS)

test: lint kernels
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --dist loadfile $(ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN) -m pytest -m "interpreted and not executed" \
		--numprocesses auto --dist worksteal $(ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN) -m pytest -m interpreted tests/kernels \
		--numprocesses auto --dist worksteal $(ARGS)
	$(RUN) -m benchmarks report --check

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# `make emulate ARGS=--quick`: bf16, in lock step
emulate: $(VENV)/installed
	EMULATE=all OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto tests/emulator
	$(RUN) tests/proofs.py $(ARGS)
	$(RUN) -m benchmarks report
	$(PYTHON) tests/compat.py --part "kernels, executed" oldest gpu

kernels: $(VENV)/installed
	$(RUN) -m benchmarks kernels --check

bench: $(VENV)/installed
	$(RUN) -m benchmarks cpu

# `make compat ARGS=gpu` runs one of its environments, which are below .compat
compat:
	$(PYTHON) tests/compat.py $(ARGS)

# Into dist/; `make dist ARGS="--tag v0.2.0"` also checks what a release of that tag wants
dist: $(VENV)/installed
	$(RUN) tests/dist.py $(ARGS)

# Two processes with DeepSpeed, in an environment of their own (below .compat)
distributed:
	$(PYTHON) tests/compat.py distributed

# Axolotl, LLaMA-Factory and ms-swift, each in an environment of its own (below .compat)
frameworks:
	$(PYTHON) tests/compat.py axolotl llamafactory ms-swift

report: $(VENV)/installed
	$(RUN) -m benchmarks report

# The pages of docs/ and the API's as a site, in an environment of its own
docs: .docs/installed
	NO_MKDOCS_2_WARNING=1 .docs/bin/python -m mkdocs build --strict --quiet
	.docs/bin/python docs/tools/check_site.py site

.docs/installed: requirements-docs.txt
	$(PYTHON) -m venv .docs
	.docs/bin/python -m pip install --quiet --requirement requirements-docs.txt
	touch $@

# Every peer, labelled share, number of rows and dtype, and what the losses themselves take
# (9 minutes)
bench-grid: $(VENV)/installed
	$(RUN) -m benchmarks grid
	$(RUN) -m benchmarks methods

# Whole trainer steps, plain, ours and TRL's (6 minutes)
bench-trainer: $(VENV)/installed
	$(RUN) -m benchmarks trainer

# What a backward without improbable parts of the vocabulary saves and costs (17 minutes)
bench-masses: $(VENV)/installed
	$(RUN) -m benchmarks masses

# All that the first GPU tells, in less than eight minutes
bench-gpu: $(VENV)/installed
	$(RUN) -m benchmarks gpu

.PHONY: bench-grid bench-trainer bench-masses bench-gpu

$(VENV)/installed: pyproject.toml requirements-dev.txt fused_prefopt/__init__.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --requirement requirements-dev.txt
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) .compat .docs site build dist runs *.egg-info
