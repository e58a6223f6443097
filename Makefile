# make train   set up .venv, train on the built-in synthetic data, print the metrics table
# make test    set up .venv, lint, run all tests but the slow ones
# make test-slow    the slow ones: faults in numbers, about 6 minutes
# make clean   remove .venv

SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TORCHREC := torchrec==1.8.0
# PyTorch's own index has builds for CPUs alone, a tenth of the size; PyPI's works as well.
CPU_INDEX := https://download.pytorch.org/whl/cpu

HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
REQUIREMENTS := $(if $(HAS_GPU),requirements.txt,requirements-cpu.txt)

.PHONY: install train test test-slow lint clean

install: $(VENV)/.installed

$(VENV)/.installed: $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV)
ifeq ($(HAS_GPU),yes)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
else
	index=$$(curl -sfI -m 5 $(CPU_INDEX)/torch/ >/dev/null 2>&1 && echo --extra-index-url $(CPU_INDEX)); \
	$(BIN)/pip install --quiet --disable-pip-version-check $$index -r requirements-cpu.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(TORCHREC)
endif
	touch $@

train: install
	$(BIN)/python train.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV)
