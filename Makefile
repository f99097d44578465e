# The two commands: `make demo` and `make test`. Both make .venv and need Python >= 3.10 and a C++
# compiler. A torch that .venv already has is kept; TORCH and TORCH_INDEX_URL choose another source.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX_URL ?=
PRESET ?= small
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
NATIVE := pyproject.toml setup.py CMakeLists.txt tools/diwa_build.py $(shell find csrc -type f)

.PHONY: help demo test install-demo install-test install-bench lint bench clean

help:
	@echo "make demo   from nothing to a fine-tuned skill: install, run, before/after table"
	@echo "make test   install and pass the tests"
	@echo "make sanitize  test the native operators under address and undefined-behaviour checks"
	@echo "make bench  measure the operators against others, write benchmarks/README.md"
	@echo "make clean  remove .venv, build folders and caches (not runs/)"

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || \
	  $(PIP) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) "$(TORCH)"
	@touch $@

# A stamp per extra: the native part is built again when one of its files changes.
$(VENV)/demo: $(VENV)/torch $(NATIVE)
	$(PIP) -e ".[all]"
	@touch $@

$(VENV)/test: $(VENV)/torch $(NATIVE)
	$(PIP) -e ".[all,dev]"
	@touch $@

$(VENV)/bench: $(VENV)/torch $(NATIVE)
	$(PIP) -e ".[all,bench]"
	@touch $@

install-demo: $(VENV)/demo
install-test: $(VENV)/test
install-bench: $(VENV)/bench

demo: install-demo
	$(BIN)/diwa run --preset $(PRESET)

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror \
	  $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# The Triton kernels run under the interpreter, are compiled for sm_90, and the CUDA kernels are
# compiled where nvcc exists: tests/test_aot.py.
test: lint
	$(BIN)/pytest $(PYTEST_ARGS)

sanitize: install-test
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tools/sanitize.py

# Leave the machine alone meanwhile: about an hour, most of it torch.compile.
bench: install-bench
	$(BIN)/diwa bench $(BENCH_ARGS)
	$(BIN)/python benchmarks/page.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	rm -f diwa/*.so
