# The commands of this project. `make` alone lists them.
#
# Settings, all optional:  PYTHON=python3.12  TORCH=auto|system|pinned  CONFIG=...  NAME=...  ARGS=...

PYTHON ?= python3
TORCH ?= auto
CONFIG ?= configs/quickstart.yaml
NAME ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPECHECK := build/typecheck
SHELL_SCRIPTS = $(wildcard .ci/run launch/*.sh launch/slurm/*.sh launch/slurm/*.sbatch)

export PYTHON TORCH

.DEFAULT_GOAL := help
.PHONY: help venv pretrain test test-cluster lint kernels-compile ccm audit forecast forecast-library reproduce gpu clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## make the environment in .venv (PYTHON=python3.12 and TORCH=system|pinned choose)

$(STAMP): setup.py pyproject.toml constraints.txt launch/make_venv.sh
	@bash launch/make_venv.sh $(VENV)

pretrain: $(STAMP) ## run all stages, from data to report: CONFIG=configs/quickstart.yaml NAME=run ARGS="training.steps=200"
	@$(BIN)/shodh run --config "$(CONFIG)" $(if $(NAME),--name "$(NAME)") $(ARGS)

test: $(STAMP) ## run the tests: ARGS="-k router" or ARGS=tests/test_packaging.py narrow them down
	@$(BIN)/python -m pytest $(ARGS)

test-cluster: $(STAMP) ## tests with real SLURM, sshd, pdsh and MPI on this machine: root; installs Debian's packages
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt \
	    --editable '.[mpi]' || echo "make test-cluster: no MPI for this Python; its tests will be skipped"
	@$(BIN)/python -m pytest -m cluster $(ARGS)

lint: $(STAMP) ## style (ruff), types (mypy), the Dockerfile (hadolint), shell scripts (shellcheck)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# kernels/ installs as shodh_moe.kernels: show the type checker the tree as it is installed. Scripts import by folder.
	@rm -rf $(TYPECHECK) && mkdir -p $(TYPECHECK)/shodh_moe
	@ln -s "$(CURDIR)"/shodh_moe/* "$(CURDIR)/kernels" $(TYPECHECK)/shodh_moe/
	@ln -s "$(CURDIR)"/benchmarks/*.py "$(CURDIR)"/benchmarks/studies "$(CURDIR)"/benchmarks/support "$(CURDIR)"/launch/*.py \
	    "$(CURDIR)"/examples/*.py $(TYPECHECK)/
	cd $(TYPECHECK) && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" \
	    --cache-dir "$(CURDIR)/.mypy_cache" .
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck $(SHELL_SCRIPTS)

kernels-compile: $(STAMP) ## compile the Triton kernels for four GPU architectures, without a GPU; fails on a spill
	@$(BIN)/python benchmarks/compile_kernels.py $(ARGS)

ccm: $(STAMP) ## the CCM benchmark (docs/ccm.md): an hour and a half on two cores; resumes if interrupted
	@$(BIN)/shodh bench ccm --config configs/ccm/bench.yaml $(ARGS)

audit: $(STAMP) ## does the mixture end negative transfer (docs/audit.md): controls, verdict; resumes if interrupted
	@$(BIN)/shodh audit --config configs/audit/cpu.yaml $(ARGS)

forecast: forecast-library ## our forecasts against other networks in the same time (docs/forecast.md): an hour on two cores; resumes
	@$(BIN)/shodh bench forecast --config configs/forecast/grid32.yaml $(ARGS)

# neuraloperator, and of the packages that it asks for only those that its networks need.
forecast-library: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --constraint $(VENV)/constraints.txt neuraloperator tensorly tensorly-torch opt-einsum

reproduce: $(STAMP) ## the 20,000-step run (docs/reproduction.md), at most an hour on two cores; resumes if interrupted
	@$(BIN)/python benchmarks/studies/reproduction.py $(ARGS)

gpu: ## on a machine with a GPU: its tests, all benchmarks, a short training run (PYTHON=one with a CUDA torch; no venv)
	@$(PYTHON) benchmarks/gpu.py $(ARGS)

clean: ## remove .venv, caches and build folders; runs and data stay
	rm -rf $(VENV) $(VENV).lock build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find shodh_moe kernels launch tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +
