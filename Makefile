# `make demo` and `make test` need Python >= 3.11 and make; they set up the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := sched sim exec cli
WORKERS := --numprocesses auto --maxprocesses 8
TYPED := $(PACKAGES:%=-p pipeproof.%)

# Our package directories are named like the standard library's `sched` and the
# builtin `exec`; without this, running from the root would import ours first.
export PYTHONSAFEPATH := 1
# Small kernels on few cores: torch's thread pool costs more than it brings.
export OMP_NUM_THREADS := 1

.PHONY: help demo test test-all coverage experiments lint format dist clean

help:
	@echo 'make demo      train a small GPT pipelined and not, compare, write a trace'
	@echo 'make test      the tests (a few minutes)'
	@echo 'make test-all  the tests, long ones too, on new random examples'
	@echo 'make coverage  lines and branches of sched/ that its tests run; loops not compiled'
	@echo 'make experiments  repeat figures and measurements, write experiments/results/'
	@echo 'make lint      formatting, lint, types'
	@echo 'make format    rewrite files as the formatter wants them'
	@echo 'make dist      wheel and sdist under dist/'

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'pipeproof needs Python >= 3.11; say which: make PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[exec,dev]'
	@touch $@

# Type checkers do not follow the editable install's import hook: show them the
# packages under their real names.
$(VENV)/typing: $(VENV)/ready
	@mkdir -p $@/pipeproof
	@for p in $(PACKAGES); do ln -sfn ../../../$$p $@/pipeproof/$$p; done

demo: $(VENV)/ready
	$(BIN)/python experiments/demo.py

test: $(VENV)/ready
	$(BIN)/pytest $(WORKERS)

test-all: $(VENV)/ready
	$(BIN)/pytest $(WORKERS) --hypothesis-profile=new-examples -m 'slow or not slow'

# Compiled loops are not seen; plain ones do the same.
coverage: $(VENV)/ready
	NUMBA_DISABLE_JIT=1 $(BIN)/pytest $(WORKERS) tests/sched tests/sim tests/cli \
		tests/test_contract.py tests/test_fuzz.py \
		--cov --cov-report=term-missing:skip-covered --cov-fail-under=97

experiments: $(VENV)/ready
	$(BIN)/python experiments/gpipe_table2.py
	$(BIN)/python experiments/zero_bubble_tables.py
	$(BIN)/python experiments/recomputation.py
	$(BIN)/python experiments/amoebanet.py
	$(BIN)/python experiments/largest_gpt.py
	$(BIN)/python experiments/real_work.py
	$(BIN)/python experiments/partitioning.py
	$(BIN)/python experiments/policies.py
	$(BIN)/python experiments/bubble_by_stages.py
	$(BIN)/python experiments/simulation_speed.py
	$(BIN)/python experiments/replay_speed.py
	$(BIN)/python experiments/lowering_speed.py
	$(BIN)/python experiments/torch_under_proof.py
	$(BIN)/python experiments/mutants
	$(BIN)/python experiments/mutation_testing
	$(BIN)/python experiments/proof_speed.py
	$(BIN)/python experiments/executor_overhead.py
	$(BIN)/python experiments/executor/split_backward.py
	$(BIN)/python experiments/executor/against_torch.py
	$(BIN)/python experiments/executor/against_torch.py --over-gloo
	$(BIN)/python experiments/executor/two_ranks.py
	$(BIN)/python experiments/executor/prediction.py
	$(BIN)/python experiments/executor/recomputed_layers.py
	$(BIN)/python experiments/executor/injections.py --jobs 2
	$(BIN)/python -m pip install --quiet --no-deps torchgpipe==0.0.7
	$(BIN)/python experiments/executor/against_torchgpipe.py

lint: $(VENV)/ready $(VENV)/typing
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	MYPYPATH=$(VENV)/typing $(BIN)/mypy $(TYPED)

format: $(VENV)/ready
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

dist: $(VENV)/ready
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info
