# A fresh machine needs git and Python 3.11 to 3.13, nothing else: each verb first makes the virtual environment it needs.
#
#   make train [EPOCHS=12] [ARGS=...]   train FFSD on the bundled digits, beside a plain baseline
#   make test                           the tests that take seconds
#   make test-all                       those and the long ones (no GPU)
#   make test-oldest                    the tests of `make test` and all of the kernels on the oldest supported PyTorch
#   make test-gpu                       the tests that need a GPU, in the interpreter at hand (PYTHON), installing nothing
#   make gpu-check [OUT=DIR]            those, the sanitizer, and the short benchmark of the kernels; builds the extension
#   make bench                          time one training step, quick form
#   make build                          compile the CUDA extension for this checkout (needs nvcc, no GPU)
#   make docs                           the API's pages from its docstrings, into build/docs
#   make lint                           ruff: rules and formatting; mypy: types
#
# PYTHON=python3.12 names another interpreter.

PYTHON ?= python3
EPOCHS ?= 12
ARGS ?=

OLDEST := torch==2.11.0 torchvision==0.26.0 triton==3.6.0 "numpy==2.3.*"
PIP_INSTALL := bin/python -m pip install --quiet --disable-pip-version-check
# A process per core, and the tests of a file in one process: they share what is slow to make.
PYTEST := bin/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

# In the syntax of old interpreters, so that they too can say what is wrong.
define CHECK_PYTHON
import sys
version = "%d.%d" % sys.version_info[:2]
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit("fastfuse needs Python 3.11 to 3.13, $(PYTHON) is %s: name another one, make PYTHON=python3.12" % version)
try:
    import ensurepip, venv
except ImportError:
    sys.exit("$(PYTHON) lacks the venv module: install it (Debian: python%s-venv) or make PYTHON=..." % version)
endef
export CHECK_PYTHON

.PHONY: train test test-all test-oldest test-gpu gpu-check bench build docs lint

train: .venv/.installed
	.venv/bin/fastfuse train --method ffsd --model resnet20 --students 2 --data digits --epochs $(EPOCHS) \
		--batch-size 32 --baseline $(ARGS)

test: .venv/.installed-test
	.venv/$(PYTEST) -m "not long and not gpu" $(ARGS)

test-all: .venv/.installed-test
	.venv/$(PYTEST) -m "not gpu" $(ARGS)

# Memory is watched in the interpreter, by the newer one alone: which version runs the kernels there changes no address.
test-oldest: .venv-oldest/.installed-test
	.venv-oldest/$(PYTEST) -m "not long and not gpu" --ignore tests/kernels/test_memory.py $(ARGS)
	.venv-oldest/$(PYTEST) -m "long and not gpu" tests/kernels --ignore tests/kernels/test_memory.py $(ARGS)

# A GPU machine comes with its own PyTorch: nothing is installed, the checkout is run as it lies.
test-gpu:
	"$(PYTHON)" -m pytest -p no:cacheprovider -m gpu -q $(ARGS)

gpu-check:
	FASTFUSE_COMMIT="$(COMMIT)" "$(PYTHON)" benchmarks/gpu_check.py $(if $(OUT),--out "$(OUT)") $(ARGS)

bench: .venv/.installed
	.venv/bin/python benchmarks/run.py --suite step --quick $(ARGS)

# TORCH_CUDA_ARCH_LIST and MAX_JOBS are honoured. The file fits every supported PyTorch and Python.
build: .venv/.installed
	.venv/bin/python fastfuse/kernels/_build.py

docs: .venv/.installed-test
	.venv/bin/python docs/api.py build/docs
	@echo "build/docs/index.html"

lint: .venv/.installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/bin/pip .venv-oldest/bin/pip:
	@command -v "$(PYTHON)" >/dev/null || { echo "no $(PYTHON) here: name an interpreter, make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c "$$CHECK_PYTHON"
	@"$(PYTHON)" -m venv $(@D:/bin=)

# pip is written last when an environment is made, and its date says nothing about the package: hence order-only.
.venv/.installed: pyproject.toml setup.py | .venv/bin/pip
	@echo "Installing fastfuse with PyTorch into .venv (5 GB, minutes the first time)"
	@.venv/$(PIP_INSTALL) --editable ".[plot]"
	@touch $@

.venv/.installed-test: .venv/.installed
	@echo "Installing what tests, examples and pages need into .venv"
	@.venv/$(PIP_INSTALL) --editable ".[test]"
	@touch $@

# One call of pip with the pins and the package: a second call would be free to upgrade what the first one pinned.
.venv-oldest/.installed-test: pyproject.toml setup.py Makefile | .venv-oldest/bin/pip
	@echo 'Installing fastfuse with $(OLDEST) into .venv-oldest (5 GB, minutes the first time)'
	@.venv-oldest/$(PIP_INSTALL) $(OLDEST) --editable ".[test]"
	@touch $@
