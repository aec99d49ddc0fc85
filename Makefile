# `make` lists the targets. They need a Python >= 3.10 with its venv module and a C++ compiler, nothing else: the rest
# is installed into $(VENV), at the versions in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := CMakeLists.txt $(wildcard cmake/* csrc/* csrc/*/*)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test check sanitize bench bench-quick lint format perf-docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) ARGS='more arguments for demo, test and bench'"

venv: $(STAMP) ## create .venv with everything that is needed for development

$(STAMP): pyproject.toml setup.py constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "anyflow needs Python 3.10 or newer, \
	and \`$(PYTHON)\` is: $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module. \
	On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "[1/4] Creating $(VENV) with $$($(PYTHON) --version)"; \
	$(PYTHON) -m venv --clear $(VENV); }
	@echo "[2/4] Installing PyTorch (hundreds of MB the first time)"
	@$(PIP) torch
	@echo "[3/4] Installing the build tools"
	@$(PIP) setuptools wheel cmake ninja pybind11
	@echo "[4/4] Building and installing anyflow, its dependencies and the development tools"
	@$(PIP) --no-build-isolation -e ".[all,dev]"
	@touch $@
	@echo "Ready: $(VENV)"

demo: $(STAMP) ## see the any-step property in minutes, on a CPU
	@$(BIN)/anyflow demo $(ARGS)

test: $(STAMP) ## run every test
	$(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

check: lint ## lint, type check and the fast tests
	$(BIN)/pytest -m "not slow" -n 2 $(ARGS)

# The package is built into a folder of its own; Python is not instrumented, so the sanitizer's library comes first.
SANITIZED := build/sanitized
FUZZ_CALLS ?= 5000
sanitize: $(STAMP) ## the operators' tests and fuzzer under AddressSanitizer and UndefinedBehaviorSanitizer
	ANYFLOW_CMAKE_ARGS=-DANYFLOW_SANITIZE=ON $(BIN)/python setup.py --quiet build --build-lib $(SANITIZED)
	PYTHONPATH=$(SANITIZED) LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	sh -c '$(BIN)/pytest tests/ops -k "native and not compiles" -p no:cacheprovider $(ARGS) && \
	$(BIN)/python tests/ops/scripts/fuzz_operators.py --calls $(FUZZ_CALLS)'

bench: $(STAMP) ## every benchmark against its peers; fails where a ratio is below its gate
	$(BIN)/pytest benchmarks $(ARGS)

bench-quick: $(STAMP) ## the gates that CI checks: short shapes on the CPU, a few minutes
	$(BIN)/pytest benchmarks --device cpu --quick $(ARGS)

lint: $(STAMP) ## ruff and mypy; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy anyflow

format: $(STAMP) ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

perf-docs: $(STAMP) ## docs/performance.md and its plots, from benchmarks/results
	$(BIN)/python benchmarks/perf_docs.py $(ARGS)

clean: ## remove builds and caches; .venv and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
