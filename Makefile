# make demo   fine-tunes a small diffusion model with FeRA and with LoRA, and writes a report
# make test   every test that runs on this machine
# Both make .venv, install torch there if it is missing, build the extension and run. A second run is fast.

PYTHON ?= python3
VENV ?= .venv
# Any torch from 2.6 on will do; this one is what the project is tested with. On a machine with an NVIDIA
# driver and no torch yet, set TORCH to the CUDA build you want.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
# The models in the tests are tiny: processes pay, threads do not.
TEST_JOBS ?= 2
TEST_THREADS ?= 1
SOURCES = $(shell find csrc cmake CMakeLists.txt setup.py pyproject.toml -type f)

.PHONY: demo test ctest style build gpu-check clean

demo: build
	$(BIN)/fera-ext demo

test: build ctest
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -n $(TEST_JOBS) --cov=fera_ext --cov-report=term:skip-covered --cov-fail-under=90

build: $(VENV)/.built

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fera_ext: Python must be 3.10 or newer; set PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "fera_ext: python3 must have venv; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

# torch first and alone: the extension is built against exactly this one.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77,<81" wheel cmake ninja
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	@touch $@

$(VENV)/.requirements: pyproject.toml $(VENV)/.torch
	$(BIN)/python tools/requirements.py dev | xargs -d '\n' $(BIN)/python -m pip install --quiet
	@touch $@

$(VENV)/.built: $(SOURCES) $(VENV)/.requirements
	@command -v c++ >/dev/null || { echo "fera_ext: a C++ compiler must be installed; on Debian and Ubuntu: apt install g++"; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" FERA_CORE_TESTS=1 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

ctest: build
	$(BIN)/ctest --test-dir build/core --output-on-failure

style: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

# On any machine with a GPU and a CUDA torch; needs no network. FERA_CORE takes a core built elsewhere.
gpu-check:
	$(PYTHON) tools/gpu_check.py

clean:
	rm -rf build dist *.egg-info fera_ext/lib fera_ext/include fera_ext/_build_info.py fera_ext/_C*.so $(VENV)/.built
