# make bench · make test · make test-pure · make test-timm · make test-all-models · make test-kernels · make mutants · make fuzz · make sanitize · make lint · make sass · make docs · make wheels · make release-check · make gpu-check · make gpu-tune
#
# Each does its own set-up in .venv, or uses the interpreter that PYTHON= names as it is:
#   make test PYTHON=/opt/conda/bin/python
# The environment variables at the top of setup.py reach the build.

VENV ?= .venv
DEFAULT := torch torchvision timm transformers accelerate
TORCH ?= $(DEFAULT)
# Bare versions are what `make wheels` builds for, in environments of their own.
VERSIONS := $(filter 2.%,$(TORCH))
PACKAGES := $(or $(filter-out 2.%,$(TORCH)),$(DEFAULT))

ifdef PYTHON
ENVIRONMENT :=
else
PYTHON := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.installed
endif

SOURCES := setup.py $(wildcard csrc/*.* csrc/*/*.*)
# Built in place for one interpreter at a time: another one, or other settings, build anew.
BUILD := build/built-for
INTERPRETER = $(shell $(PYTHON) -c 'import importlib.metadata, sys; print(sys.executable, importlib.metadata.version("torch"))' 2>&1)
SETTINGS = $(INTERPRETER) $(DROPPATH_EXT_CUDA) $(TORCH_CUDA_ARCH_LIST) $(CUDA_HOME)
ifneq ($(SETTINGS),$(shell cat $(BUILD) 2>/dev/null))
.PHONY: $(BUILD)
endif

export PYTHONPATH := $(CURDIR)

.PHONY: bench test test-pure test-timm test-all-models test-kernels mutants fuzz sanitize lint sass docs wheels release-check gpu-check gpu-tune build clean

bench: build
	$(PYTHON) benchmarks/run.py $(BENCH_ARGS)

# Two processes, whose threads do not spin while they wait for each other: they would starve those of the other.
test: build
	OMP_WAIT_POLICY=passive $(PYTHON) -m pytest --numprocesses 2 $(TEST_ARGS)

# Without the native extension: what every path promises.
PURE := semantics fuse skip options routes random autograd composite composition tracing errors drop_in \
	compile convert convert_reads distributed shards statistics
test-pure: $(ENVIRONMENT)
	DROPPATH_EXT_NATIVE=0 OMP_WAIT_POLICY=passive $(PYTHON) -m pytest --numprocesses 2 $(PURE:%=tests/test_%.py) $(TEST_ARGS)

# timm's models under torch.fx and torch.jit.script: those whose name matches TIMM, "vit_*" say. All take hours.
TIMM ?= *
test-timm: build
	DROPPATH_EXT_TIMM_MODELS='$(TIMM)' $(PYTHON) -m pytest tests/test_timm.py $(TEST_ARGS)

# What convert() does to each family of timm, torchvision, transformers, MONAI and mmpretrain: some 20 minutes. The two
# last where they are installed: pip install monai mmpretrain mmcv-lite mmengine importlib_metadata.
test-all-models: build
	$(PYTHON) tests/all_models.py $(ALL_MODELS_ARGS)

# The source of the CUDA kernels on the host: all tests of ops, then a choice under each of the other builds.
test-kernels: build
	$(PYTHON) tests/cuda_on_host/run.py all

mutants: build
	$(PYTHON) tests/mutants.py $(MUTANTS)

# Odd and wrong arguments for every entry: FUZZ_ARGS="--minutes 60".
fuzz: build
	$(PYTHON) tests/fuzz.py $(FUZZ_ARGS)

# The CPU kernels and the bindings under AddressSanitizer and UndefinedBehaviorSanitizer: some tests, and the fuzzer.
sanitize: build
	$(PYTHON) tests/sanitize.py $(SANITIZE_ARGS)

lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/clang-format --dry-run --Werror $(filter csrc/%,$(SOURCES))

# cuobjdump and nvdisasm are Triton's, which every CUDA build of torch brings, unless CUDA_HOME or PATH has them.
sass: build
	$(PYTHON) benchmarks/sass.py --compile $(SASS_ARGS)

# The pages of docs/, with the others that they link to, as a site in build/site.
docs: $(ENVIRONMENT)
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(PYTHON) -m mkdocs build --strict

gpu-check: $(ENVIRONMENT)
	$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK_ARGS)

gpu-tune: $(ENVIRONMENT)
	timeout -k 5 590 sh -c '$(MAKE) build PYTHON=$(PYTHON) && $(PYTHON) benchmarks/tune.py $(GPU_TUNE_ARGS)'

# One for each Python and torch, in dist/wheels: make wheels TORCH="2.11 2.13 2.14" PYTHONS="python3.11 python3.12"
wheels: $(ENVIRONMENT)
	$(PYTHON) .ci/release.py wheels $(VERSIONS:%=--torch %) $(PYTHONS:%=--python %)

# Every way to install it, each in a fresh environment: some 20 minutes.
release-check: $(ENVIRONMENT)
	$(PYTHON) .ci/release.py check --markdown docs/install.md

build: $(BUILD)

$(BUILD): $(ENVIRONMENT) $(SOURCES)
	$(PYTHON) setup.py build_ext --inplace --force
	@mkdir -p $(@D) && echo '$(SETTINGS)' > $@

# The last step brings an nvcc of torch's CUDA version where the machine has none of its major version.
$(VENV)/.installed: pyproject.toml
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --upgrade pip setuptools wheel ninja
	$(PYTHON) -m pip install $(PACKAGES)
	$(PYTHON) -m pip install --group test --group bench --group lint --group docs --group release
	@cuda=$$($(PYTHON) -c 'import torch; print(torch.version.cuda or "")') && \
	if [ -n "$$cuda" ] && [ "$(DROPPATH_EXT_CUDA)" != 0 ] && [ -z "$(CUDA_HOME)" ] && \
	    ! nvcc --version 2>/dev/null | grep -q "release $${cuda%%.*}\."; then \
	  $(PYTHON) -m pip install $(foreach name,cuda-nvcc nvvm cuda-crt cuda-cccl cuda-runtime,"nvidia-$(name)==$$cuda.*"); \
	fi
	@touch $@

clean:
	rm -rf build dist *.egg-info droppath_ext/*.so
