# `make` lists the targets. They need a Python >= 3.10 with its venv module and a C++ compiler, nothing else: the rest
# is installed into $(VENV), at the versions in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TORCH_INDEX ?=

COMMA := ,
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := CMakeLists.txt $(wildcard cmake/* csrc/* csrc/*/*)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# A command that is silent for minutes, and beside it a line every 30 seconds with the size of the environment.
define patiently
@{ start=$$(date +%s); while sleep 30 >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do echo "      $$(($$(date +%s) - start)) s: \
$$(du -sh $(VENV) 2>/dev/null | cut -f 1) in $(VENV) so far"; done; } & \
beside=$$!; trap 'kill $$beside' EXIT; trap 'exit 130' INT TERM; $(1)
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test check sanitize bench bench-quick lint format docs perf-docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) ARGS='more arguments for demo, test and bench'"
	@echo "  TORCH_INDEX=https://download.pytorch.org/whl/cpu for a PyTorch without the libraries of CUDA"

venv: $(STAMP) ## create .venv with everything that is needed for development

$(STAMP): pyproject.toml setup.py constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "anyflow needs Python 3.10 or newer, \
	and \`$(PYTHON)\` is: $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module. \
	On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "[1/5] Creating $(VENV) with $$($(PYTHON) --version)"; \
	$(PYTHON) -m venv --clear $(VENV); }
	@echo "      It takes 2.9 GB on the disk with a CPU build of PyTorch, and some minutes the first time"
	@echo "[2/5] Installing PyTorch (0.2 GB to download for a CPU build; the one for CUDA has some GB of libraries)"
	$(call patiently,$(PIP) torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)))
	@echo "[3/5] Installing the build tools"
	@$(PIP) setuptools wheel cmake ninja pybind11
	@echo "[4/5] Compiling C++ (some minutes)"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@echo "[5/5] Installing anyflow, its dependencies and the development tools (0.5 GB to download)"
	$(call patiently,$(PIP) --no-build-isolation -e ".[all$(COMMA)dev]")
	@touch $@
	@echo "Ready: $(VENV)"

demo: $(STAMP) ## see the any-step property in minutes, on a CPU
	@$(BIN)/anyflow demo $(ARGS)

# A module is one worker's, so that its fixtures are made once.
PARALLEL := -n 2 --dist loadscope --no-loadscope-reorder
test: $(STAMP) ## run every test
	$(BIN)/pytest $(PARALLEL) $(ARGS)

check: lint ## lint, type check and the fast tests
	$(BIN)/pytest -m "not slow" $(PARALLEL) $(ARGS)

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

docs: $(STAMP) ## the site of the documentation, in site/; fails on a warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict $(ARGS)
	@echo "Ready: site/index.html"

perf-docs: $(STAMP) ## docs/performance.md and its plots, from benchmarks/results
	$(BIN)/python benchmarks/perf_docs.py $(ARGS)

clean: ## remove builds and caches; .venv and runs/ stay
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
