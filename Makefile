# `make help` lists the targets. Nothing has to be set; what can be:
#   PYTHON              the interpreter to start from                  python3
#   VENV                where the development environment goes         .venv
#   TORCH               another torch: 2.10.0, or newest               as constraints-dev.txt pins it
#                       (with a VENV for itself: TORCH=2.10.0 VENV=.venv-oldest)
#   DIFFCORE_CUDA       AUTO | ON | OFF: build the CUDA kernels        AUTO: when nvcc is found
#   DIFFCORE_CUDA_ARCHS architectures of the development build         this machine's GPU, else 80-real
#   BENCH               which benchmarks: ops, training, ..., all      the first nine
#   SANITIZE_TESTS      the test files of `make sanitize`              ops forward, layouts, ...
#   SANITIZE_CALLS      the random calls of `make sanitize`            100000
#   FUZZ_ARGS           of `make fuzz`: how long, the seed             --seconds 60
#   CUDA_CODE_ARGS      of `make cuda-code`: --write, --arch 90            --check
#   STAGES, MAX_SECONDS of `make gpu-check`: which stages, how long    all, 540
#   OUT                 where `make gpu-check` leaves its results       gpu-check-out
#   JOBS                how many processes run the tests             2, 0 for one without a pool
#   PYTEST_ARGS, DEMO_ARGS, BENCH_ARGS                                 passed on
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules
.SUFFIXES:
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
OUT ?= gpu-check-out
DEMO_OUT ?= demo-output
JOBS ?= 2
PYTEST_ARGS ?=
CUDA_CODE_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
BENCH ?=
STAGES ?=
MAX_SECONDS ?= 540

# A development build is for one architecture, to keep it quick; `make wheel` builds the release list.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
DEV_CUDA_ARCHS := $(or $(DIFFCORE_CUDA_ARCHS),$(if $(HAS_GPU),native,80-real))

PY := $(VENV)/bin/python
# The constraint goes with every install: without it pip takes the newest torch and gigabytes of CUDA libraries with it.
CONSTRAINTS := constraints-dev.txt
ifneq ($(TORCH),)
CONSTRAINTS := $(VENV)/constraints-torch-$(TORCH).txt
endif
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS)
BUILD_DIR := build/dev

NATIVE_SOURCES := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt pyproject.toml
CLANG_FORMATTED := $(shell find csrc -type f \( -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)

.PHONY: help
help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

# ---- the environment -----------------------------------------------------------------------------------------------

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "diffcore needs Python 3.10 or newer; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

ifneq ($(TORCH),)
$(CONSTRAINTS): constraints-dev.txt | $(VENV)/bin/python
	sed '$(if $(filter newest,$(TORCH)),/^torch==/d,s/^torch==.*/torch==$(TORCH)/)' $< > $@
endif

$(VENV)/.requirements: requirements-dev.txt $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

# An editable install finds modules by a list made when it was installed, so a new or moved one calls for another.
.PHONY: modules
modules:
$(VENV)/.modules: modules | $(VENV)/bin/python
	@find python benchmarks -name '*.py' | sort | cmp -s - $@ || find python benchmarks -name '*.py' | sort > $@

define CHECK_TOOLCHAIN
command -v "$${CXX:-c++}" >/dev/null || \
  { echo "no C++ compiler found. On Debian and Ubuntu: apt-get install g++" >&2; exit 1; }; \
$(PY) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null || \
  { echo "$(PYTHON) has no C headers. On Debian and Ubuntu: apt-get install python3-dev" >&2; exit 1; }
endef

# Editable, so Python edits need no install; with a build folder that stays, so only changed C++ and CUDA files are compiled.
$(VENV)/.installed: $(NATIVE_SOURCES) $(VENV)/.requirements $(VENV)/.modules
	@$(CHECK_TOOLCHAIN)
	PATH="$(abspath $(VENV))/bin:$$PATH" DIFFCORE_CUDA_ARCHS='$(DEV_CUDA_ARCHS)' \
	  $(PIP_INSTALL) --no-build-isolation --config-settings=build-dir=$(BUILD_DIR) -e '.[cli,demo,test,bench,docs]'
	@touch $@

.PHONY: build
build: $(VENV)/.installed  ## the development environment, with the compiled package in it

# ---- the two commands ----------------------------------------------------------------------------------------------

.PHONY: demo test
demo: $(VENV)/.installed  ## train a VAE, a DDPM and a flow on real digits, and draw
	$(PY) -m diffcore demo --out $(DEMO_OUT) $(DEMO_ARGS)

test: $(VENV)/.installed  ## build, and run the tests that this machine can run
	$(PY) -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)
	$(if $(and $(CAN_EMULATE),$(if $(PYTEST_ARGS),,yes)),$(RUN_EMULATED) $(EMULATED_QUICK))

# The CUDA kernels compiled for the CPU, every thread executed: not a run on a GPU. Threads change in x86-64 assembler.
CAN_EMULATE := $(filter x86_64,$(shell uname -m))
EMULATED := $(BUILD_DIR)/tests/emulation
EMULATED_QUICK := tests/ops/test_layouts.py tests/ops/test_threshold.py tests/ops/test_loss_gradient.py tests/noise/test_bits.py
EMULATED_TESTS ?= $(EMULATED_QUICK) tests/ops/test_forward.py tests/ops/test_backward.py tests/ops/test_step.py \
  tests/ops/test_normal_kl.py tests/noise/test_ops.py tests/noise/test_targets.py
define RUN_EMULATED
PATH="$(abspath $(VENV))/bin:$$PATH" cmake --build $(BUILD_DIR) --target emulated
DIFFCORE_EMULATED=$(EMULATED) $(PY) -m pytest -q -n $(JOBS) --dist worksteal
endef

.PHONY: slow
slow: $(VENV)/.installed  ## the slow tests, which make test leaves out
	$(PY) -m pytest -n $(JOBS) --dist worksteal --slow -m slow $(PYTEST_ARGS)

.PHONY: ranks
ranks: $(VENV)/.installed  ## the distributed tests on 2, 3 and 4 processes
	$(PY) -m pytest -q --all-ranks tests/distributed $(PYTEST_ARGS)

.PHONY: routes
routes: $(VENV)/.installed  ## the whole matrix of routes: every case compiled and exported too (an hour)
	$(PY) -m pytest -n $(JOBS) --dist worksteal --all-routes tests/routes $(PYTEST_ARGS)
	$(PY) tools/routes_table.py --check

.PHONY: emulate
emulate: $(VENV)/.installed  ## the CUDA kernels, emulated on the CPU (x86-64): against the CPU's kernels, and some tests
	PATH="$(abspath $(VENV))/bin:$$PATH" cmake --build $(BUILD_DIR) --target check_kernels check_limits
	set -e; for order in forward backward 7; do EMULATION_ORDER=$$order $(EMULATED)/check_kernels; done
	EMULATION_BLOCKS=ends $(EMULATED)/check_limits ends
	$(EMULATED)/check_limits quantiles
	$(RUN_EMULATED) $(EMULATED_TESTS) $(PYTEST_ARGS)

# A program, built for aarch64 and for this processor, whose lines must be equal: a hash of each result of each kernel.
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_QEMU ?= $(firstword $(shell command -v qemu-aarch64-static qemu-aarch64))
ARM_LIBRARIES ?= /usr/aarch64-linux-gnu
ARM_DIR := build/arm
KERNEL_BITS := tests/processors/kernel_bits
ARM_LACKS := $(if $(CAN_EMULATE),,this is not an x86-64 processor)$(if $(shell command -v $(ARM_CXX)),,$\
  $(ARM_CXX) is missing)$(if $(ARM_QEMU),,qemu-user is missing)

.PHONY: arm
ifneq ($(ARM_LACKS),)
arm:
	@echo "make arm: skipped ($(ARM_LACKS)). On Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user-static"
else
arm: $(VENV)/.installed  ## the CPU kernels for aarch64, run by qemu-user, against those of this processor, bit by bit
	PATH="$(abspath $(VENV))/bin:$$PATH" cmake -S . -B $(ARM_DIR) -GNinja -DDIFFCORE_MODULE=OFF -DDIFFCORE_CUDA=OFF \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(ARM_CXX)
	set -e; export PATH="$(abspath $(VENV))/bin:$$PATH"; \
	  for folder in $(BUILD_DIR) $(ARM_DIR); do cmake --build $$folder --target kernel_bits; done
	DIFFCORE_ISA=v3 $(BUILD_DIR)/$(KERNEL_BITS) > $(ARM_DIR)/v3.txt
	$(ARM_QEMU) -L $(ARM_LIBRARIES) $(ARM_DIR)/$(KERNEL_BITS) > $(ARM_DIR)/neon.txt
	$(PY) tools/compare_bits.py $(ARM_DIR)/v3.txt $(ARM_DIR)/neon.txt
endif

FUZZ_ARGS ?= --seconds 60
.PHONY: fuzz
fuzz: $(VENV)/.installed  ## random calls of every op and of the compiled module, for a minute
	$(PY) tools/fuzz_calls.py $(FUZZ_ARGS)

# ---- checks --------------------------------------------------------------------------------------------------------

.PHONY: lint format
lint: $(VENV)/.installed  ## ruff, mypy --strict, clang-format, ends of lines and YAML
	$(PY) tools/tidy_text.py --check
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(if $(CLANG_FORMATTED),$(VENV)/bin/clang-format --dry-run -Werror $(CLANG_FORMATTED))

format: $(VENV)/.requirements  ## rewrite the files as `make lint` wants them
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	$(PY) tools/tidy_text.py || true
	$(if $(CLANG_FORMATTED),$(VENV)/bin/clang-format -i $(CLANG_FORMATTED))

# A second build of the package, in a folder that no installation knows: -S keeps the editable install of the
# environment out. The allocator of torch is the sanitizer's, so a read past the end of a tensor ends the run.
SANITIZE_TESTS ?= tests/ops/test_forward.py tests/ops/test_layouts.py tests/ops/test_errors_out.py tests/ops/test_threshold.py \
  tests/noise/test_bits.py
SANITIZE_CALLS ?= 100000
SANITIZE_SITE := build/sanitize/site
SANITIZE_RUNTIMES := asan ubsan stdc++
define SANITIZED_PYTHON
LD_PRELOAD="$(foreach lib,$(SANITIZE_RUNTIMES),$$($${CXX:-c++} -print-file-name=lib$(lib).so))" \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
  PYTHONPATH="$(SANITIZE_SITE):$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" $(PY) -S
endef

.PHONY: sanitize
sanitize: $(VENV)/.installed  ## build with AddressSanitizer and UBSan (GCC); every op, random calls, some tests on the CPU
	@$(CHECK_TOOLCHAIN)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PIP_INSTALL) --no-build-isolation --no-deps --upgrade \
	  --target $(SANITIZE_SITE) --config-settings=build-dir=build/sanitize/cmake \
	  --config-settings=cmake.build-type=RelWithDebInfo --config-settings=install.strip=false \
	  --config-settings=cmake.define.DIFFCORE_SANITIZE=ON --config-settings=cmake.define.DIFFCORE_CUDA=OFF .
	$(SANITIZED_PYTHON) tools/sanitizer_run.py --device cpu
	$(SANITIZED_PYTHON) tools/fuzz_calls.py --calls $(SANITIZE_CALLS)
	$(SANITIZED_PYTHON) -m pytest -p no:cacheprovider -m 'not slow' $(SANITIZE_TESTS) $(PYTEST_ARGS)

# A small toolkit may have no nvdisasm; the package has one.
.PHONY: cuda-code
cuda-code: $(VENV)/.requirements  ## check the compiled CUDA kernels against the committed tables (needs nvcc, no GPU)
	$(PIP_INSTALL) nvidia-cuda-nvdisasm
	$(PY) tools/compiled_code.py $(or $(CUDA_CODE_ARGS),--check)

# Linked for manylinux_2_28 though the machine may be newer. OpenMP's runtime is not put into the wheel: torch brings it,
# and a process must have one.
WHEEL_BUILD := build/wheel
WHEEL_PLATFORM := manylinux_2_28_$(shell uname -m)
.PHONY: wheel
wheel: $(VENV)/.requirements  ## wheel and sdist in dist/, then a smoke test of the wheel in a throw-away environment
	@$(CHECK_TOOLCHAIN)
	rm -rf dist $(WHEEL_BUILD)
	flags=$$($(PY) tools/old_runtimes.py build/old-runtimes); \
	  CMAKE_ARGS="$${CMAKE_ARGS:-} '-DCMAKE_MODULE_LINKER_FLAGS=$${LDFLAGS:-} $$flags'" \
	  PIP_CONSTRAINT='$(abspath $(CONSTRAINTS))' $(PY) -m build --outdir $(WHEEL_BUILD) .
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair --exclude libgomp.so.1 --plat $(WHEEL_PLATFORM) \
	  --only-plat --zip-compression-level 9 --wheel-dir dist $(WHEEL_BUILD)/*.whl
	mv $(WHEEL_BUILD)/*.tar.gz dist
	$(PY) tools/check_wheel.py dist

.PHONY: bench
bench: $(VENV)/.installed  ## time the ops against eager, torch.compile and a copy of the same bytes
	$(PY) -m diffcore bench $(BENCH) --out benchmarks/results $(BENCH_ARGS)

# The packages of the extra [docs], without the package itself: the reference is made from the sources as text.
DOCS_PACKAGES := $(shell sed -n 's/^docs = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d ',')

.PHONY: docs
docs: $(VENV)/.requirements  ## the documentation site, in site/
	$(PIP_INSTALL) $(DOCS_PACKAGES)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# For a machine that already has torch, the build tools and a GPU, and maybe no network: no virtual environment, no registry.
.PHONY: gpu-check
gpu-check:  ## on a GPU machine: build into PYTHON's environment, then tests, bits, sanitizers, benchmarks, in MAX_SECONDS
	DIFFCORE_CUDA_ARCHS='$(or $(DIFFCORE_CUDA_ARCHS),native)' $(PYTHON) tools/gpu_check.py \
	  $(if $(STAGES),--stages '$(STAGES)') --max-seconds $(MAX_SECONDS) --out '$(OUT)'

.PHONY: clean
clean:  ## everything that make made, the environment included
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
