# Every target sets up what it needs in .venv on its first use; the second costs nothing.
# PYTHON=/path/to/python3.12 chooses the Python the environment is made from.

VENV ?= .venv
PY := $(VENV)/bin/python
WORKERS ?= 2
CONFIG ?= configs/quickstart.py
TARGET ?= h200
PYTEST_OPTIONS := -n $(WORKERS) --dist loadfile
PYTEST := $(PY) -m pytest $(PYTEST_OPTIONS)
FAST := not slow and not gpu and not ci
# One room: its tests, and the examples in its docstrings.
ROOM_PATHS := $(if $(ROOM),$(wildcard tests/$(ROOM) sparsejax/$(ROOM) $(if $(filter kernels,$(ROOM)),pallas_kernels)))
export PYTHON VENV

.PHONY: help train test test-ci test-all test-newest docs bench peers experiments plan compiled-report doctor gpu gpu-sweep gpu-export lint lock clean

# The lock that runs use: CUDA's where it is installed or a GPU is found, or LOCK=train. nvidia-smi
# can take seconds: only recipes look, so that other targets do not, and only once.
LOCK = $(eval LOCK := $(if $(or $(wildcard $(VENV)/cuda.stamp),$(shell requirements/find-gpu.sh)),cuda,train))$(LOCK)
# What plans compile with, beside the environment. CUDA's lock puts it inside, and two copies of
# JAX's plugin must not meet.
COMPILER = $(if $(or $(wildcard $(VENV)/cuda.stamp),$(filter cuda,$(LOCK))),,$(VENV)/compile)

help:
	@echo "make train      train the quickstart model, or resume it"
	@echo "make test       lint and the fast tests; ROOM=recipes runs those of tests/recipes alone"
	@echo "make test-ci    the slower tests that each push runs after them"
	@echo "make test-all   every test on its full grid, and again with the newest JAX allowed"
	@echo "make docs       the documentation site, in build/docs"
	@echo "make lint       ruff and pyright              make bench      the ops' benchmarks and their tables"
	@echo "make peers      PyTorch in an environment of its own, and attention beside it"
	@echo "make experiments NAME=hidden_permutation   train what an experiment lacks, or a recorded row again: ROW='SAT, 0.15';"
	@echo "                without NAME, list them"
	@echo "make gpu        contracts and headline benchmarks on a GPU"
	@echo "make gpu-sweep PART=attention   all points of one benchmark; also nm_matmul, nm_matmul_tiles,"
	@echo "                block_sparse_matmul, fst_gpt2, grouped_gradients, l2_bandwidth"
	@echo "make gpu-export TARGET=h200   Triton kernels compiled for a GPU machine without Triton"
	@echo "make plan CONFIG=configs/gpt2_124m_spion.py TARGET=h200   what a run needs on a GPU, without one"
	@echo "make compiled-report   registers, spills and instructions of the Triton kernels, on every device"
	@echo "make doctor     which kernels are right on this machine's GPU, and how fast"
	@echo "make lock       write requirements/*.txt anew from pyproject.toml"

train:
	@$(MAKE) -s $(VENV)/$(LOCK).stamp
	$(PY) train.py --config=configs/quickstart.py --workdir=runs/quickstart

test: $(VENV)/dev.stamp $(VENV)/compile.stamp
	$(if $(ROOM),$(if $(ROOM_PATHS),,$(error ROOM must be a folder of tests, got $(ROOM))))
	$(PY) -m ruff check
	$(PYTEST) -m "$(FAST)" $(ROOM_PATHS)

test-ci: $(VENV)/dev.stamp $(VENV)/compile.stamp
	$(PYTEST) -m "ci and not slow and not gpu"

test-all: $(VENV)/dev.stamp $(VENV)/compile.stamp
	$(PY) -m ruff check
	HYPOTHESIS_PROFILE=full $(PYTEST) -m "not gpu"
	$(MAKE) --no-print-directory test-newest

# In an environment of its own, without the lock: whatever pyproject.toml allows.
test-newest:
	requirements/install-newest.sh
	$(VENV)/newest/bin/python -m pytest $(PYTEST_OPTIONS) -m "not slow and not gpu"

lint: $(VENV)/dev.stamp
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright --pythonpath $(PY)

# Pages change with files that Sphinx does not follow, such as a module's imports: -E reads all anew.
docs: $(VENV)/docs.stamp
	JAX_PLATFORMS=cpu $(PY) -m sphinx -q -E -W --keep-going -c docs -d build/doctrees . build/docs
	@echo "build/docs/index.html"

bench: $(VENV)/train.stamp
	$(PY) -m benchmarks.attention
	$(PY) -m benchmarks.nm_matmul
	$(PY) -m benchmarks.block_sparse_matmul

# In an environment of its own, for PyTorch is large.
peers: $(VENV)/peers.stamp
	$(VENV)/peers/bin/python -m benchmarks.attention --headline --force

$(VENV)/peers.stamp: requirements/train.txt
	requirements/install-peers.sh

# Runs of quality have a core each: WORKERS at a time.
experiments:
	@$(MAKE) -s $(VENV)/$(LOCK).stamp
	$(PY) -m benchmarks.experiments $(if $(NAME),$(NAME) --workers=$(WORKERS) $(if $(ROW),--again="$(ROW)"))

plan:
	@$(MAKE) -s $(VENV)/$(LOCK).stamp $(addsuffix .stamp,$(COMPILER))
	$(addprefix PYTHONPATH=,$(COMPILER)) $(PY) train.py --mode=plan --config=$(CONFIG) --target=$(TARGET) $(FLAGS)

# Without an accelerator in sight: JAX would look for one.
compiled-report: $(VENV)/dev.stamp $(VENV)/compile.stamp
	PYTHONPATH=$(VENV)/compile JAX_PLATFORMS=cpu $(PY) -m benchmarks.compiled_kernels $(FLAGS)

doctor:
	@$(MAKE) -s $(VENV)/$(LOCK).stamp
	$(PY) -m pallas_kernels.doctor $(FLAGS)

# A machine with a GPU often has its own JAX with CUDA and no way to install another.
gpu gpu-sweep:
	@python=$$(requirements/find-python.sh jax jax_cuda13_plugin flax pytest hypothesis) \
	  || { $(MAKE) -s $(VENV)/$(LOCK:train=dev).stamp && python=$(PY); } \
	  && "$$python" -m benchmarks.gpu $(if $(filter gpu-sweep,$@),--sweep "$(PART)")

# For a GPU machine that has no Triton of ours: `make gpu` runs there what this leaves.
gpu-export:
	@$(MAKE) -s $(VENV)/$(LOCK:train=dev).stamp $(addsuffix .stamp,$(COMPILER))
	JAX_PLATFORMS=cpu $(addprefix PYTHONPATH=,$(COMPILER)) $(PY) -m benchmarks.exported_calls $(TARGET)

$(VENV)/train.stamp $(VENV)/compile.stamp: $(VENV)/%.stamp: requirements/%.txt
	@requirements/install.sh $*
	@touch $@

# Each lock contains those before it: train, docs, dev, cuda.
$(VENV)/docs.stamp $(VENV)/dev.stamp $(VENV)/cuda.stamp: $(VENV)/%.stamp: requirements/%.txt
	@requirements/install.sh $*
	@touch $@ $(VENV)/train.stamp $(if $(filter dev cuda,$*),$(VENV)/docs.stamp) $(if $(filter cuda,$*),$(VENV)/dev.stamp)

# Without addresses: the lock serves whatever index pip is configured with.
COMPILE_LOCK := uv pip compile --quiet --universal --no-header --no-annotate --python-version 3.12 pyproject.toml
lock: $(VENV)/dev.stamp
	$(COMPILE_LOCK) --extra data --extra pretrained -o requirements/train.txt
	$(COMPILE_LOCK) --extra data --extra pretrained --extra docs -c requirements/train.txt -o requirements/docs.txt
	$(COMPILE_LOCK) --extra data --extra pretrained --extra docs --extra dev -c requirements/docs.txt -o requirements/dev.txt
	$(COMPILE_LOCK) --extra data --extra pretrained --extra docs --extra dev --extra cuda -c requirements/dev.txt -o requirements/cuda.txt
	$(COMPILE_LOCK) --extra compile -c requirements/cuda.txt | grep -E '^(jax-cuda|nvidia-)' > requirements/compile.txt

clean:
	rm -rf $(VENV) build
