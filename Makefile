# make install | quickstart | test | test-all | lint | bench | mutation | fuzz | soak | audit
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.10,$(shell command -v python$(v))))
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install quickstart test test-all lint bench mutation fuzz soak audit

install: $(STAMP)

# torch first and alone: verl would take the newest build, with all of CUDA.
$(STAMP): pyproject.toml constraints-cpu.txt
	$(if $(PYTHON),,$(error Python 3.10, 3.11 or 3.12 is needed; set PYTHON=/path/to/python))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints-cpu.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints-cpu.txt --editable '.[cpu,dev]'
	touch $@

quickstart: $(STAMP)
	$(BIN)/hpo-verl train countdown-tiny

test: $(STAMP) lint
	$(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP) lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python tests/bench/bench.py

mutation: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 2

fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/fuzz_rewards.py

soak: $(STAMP)
	$(BIN)/python tests/soak/soak.py

# What is not installed is named and left out.
audit: $(STAMP)
	$(BIN)/ruff check --select S hpo_verl data_prep docker
	$(BIN)/pip check
	@if command -v pip-audit; then pip-audit --path $(VENV)/lib/python3*/site-packages; \
	else echo 'not installed: pip-audit'; fi
	@if command -v gitleaks; then gitleaks git --no-banner .; else echo 'not installed: gitleaks'; fi
