# make demo: one full turn of the loop.  make test: the tests.  make fuzz: the laws on new random examples, ROUNDS times.
# All set up .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DIR ?= demo-run
SEED ?= 0
ROUNDS ?= 3

.PHONY: demo test fuzz setup clean

demo: $(VENV)/.installed
	$(BIN)/tidelock demo --dir $(DIR) --seed $(SEED)

test: $(VENV)/.tested
	$(BIN)/python -m pytest

fuzz: $(VENV)/.tested
	for round in $$(seq $(ROUNDS)); do HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -m hypothesis || exit 1; done

setup: $(VENV)/.installed

# torch comes first and by its exact version, so that a CPU build at hand is taken and no accelerator packages are pulled.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(DIR)
