# make train        install into .venv, train on the built-in synthetic data, print the metrics
# make test         install, lint, run all tests except the slow ones
# make test-slow    run the slow tests: injected failures, up to 8 ranks, about 10 minutes
# make test-newest  run the tests with the newest releases of torch, FBGEMM and TorchRec
# make lint         ruff, then mypy
# make clean        remove the environments

SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
# A machine with a GPU gets CUDA builds.
REQUIREMENTS ?= $(if $(shell nvidia-smi -L 2>/dev/null),requirements.txt,requirements-cpu.txt)
# Its builds without CUDA are a tenth of the size of PyPI's, which work as well.
CPU_INDEX := https://download.pytorch.org/whl/cpu
# Test processes: the largest tests start two ranks each. A file stays in one, with the runs that its tests share.
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
TORCHREC := $(shell grep ^torchrec== requirements.txt)

.PHONY: install train lint types test test-slow test-newest clean

install: $(VENV)/.installed

$(VENV)/.installed: $(REQUIREMENTS) requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(findstring cpu,$(REQUIREMENTS)),)
	$(PIP) -r $(REQUIREMENTS) -r requirements-dev.txt
else
	index=$$(curl -sfI -m 5 $(CPU_INDEX)/torch/ >/dev/null 2>&1 && echo --extra-index-url $(CPU_INDEX)); \
	$(PIP) $$index -r $(REQUIREMENTS) -r requirements-dev.txt
	$(PIP) --no-deps $(TORCHREC)
endif
	touch $@

train: install
	$(BIN)/python train.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

types: install
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pytest -m slow

# Newest releases on which all tests passed, on CPU.
NEWEST := .venv-newest
NEWEST_TORCH := 2.13.0
NEWEST_TORCHREC := 1.8.0
NEWEST_REQUIREMENTS := $(NEWEST)/newest-$(notdir $(REQUIREMENTS))

$(NEWEST_REQUIREMENTS): $(REQUIREMENTS) Makefile
	mkdir -p $(NEWEST)
	sed -E 's/^torch==.*/torch==$(NEWEST_TORCH)/; s/^(torchrec|fbgemm-gpu|fbgemm-gpu-cpu)==.*/\1==$(NEWEST_TORCHREC)/' \
		$(REQUIREMENTS) > $@

test-newest: $(NEWEST_REQUIREMENTS)
	$(MAKE) install VENV=$(NEWEST) REQUIREMENTS=$(NEWEST_REQUIREMENTS) \
		TORCHREC=torchrec==$(NEWEST_TORCHREC)
	$(NEWEST)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

clean:
	rm -rf $(VENV) $(NEWEST)
