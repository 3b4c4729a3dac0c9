# One command each: `make demo`, `make test`. Both create .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTS ?= tests

.PHONY: help demo test test-slow test-browser check docs gpu-systems install clean

help:
	@echo "make demo       phantoms -> train -> predict -> scores and a picture, in demo-output/"
	@echo "make test       the test suite"
	@echo "make check      ruff, mypy, import rules, tests"
	@echo "make test-slow  also the tests that take minutes"
	@echo "make test-browser  reports in chromium: no network, no errors, axe (apt install chromium)"
	@echo "make gpu-systems DATA=... BACKBONE=... [PEER_ENV=...]   the systems side by side on a GPU; call it until all is done"
	@echo "make docs       build the documentation into site/"

install: $(STAMP)

# The U-Nets need nothing but torch and numpy; the rest of their package would bring timm and a torchvision.
BASELINE := dynamic-network-architectures

# torch first and by its exact version: a range would let pip take a newer build that constraints.txt was not tested with.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $(BASELINE)
	touch $@

demo: $(STAMP)
	$(BIN)/voxdino demo --workdir demo-output

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu" $(TESTS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu" $(TESTS)

test-browser: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check playwright axe-playwright-python
	$(BIN)/python -m pytest -m browser tests/report

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

# Starts no cell after three minutes, and a cell takes six: under ten minutes a call. The next call goes on.
gpu-systems: $(STAMP)
	$(BIN)/python benchmarks/systems.py --data $(DATA) --backbone $(BACKBONE) --device cuda --budget 6m --limit 180 \
		--folds 0 1 2 3 4 --controls $(if $(PEER_ENV),--peer 3d_fullres --peer-env $(PEER_ENV)) \
		--work gpu-systems --save docs/results/systems-gpu.md

clean:
	rm -rf site dist build .pytest_cache .mypy_cache .ruff_cache
