# make demo and make test need Python >= 3.11 and make, nothing else. Name another interpreter with PYTHON=python3.12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
OLDEST := .venv-oldest
CARD := .venv-card

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-oldest card test-card check format bench clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(INSTALLED) ## plan Llama-2-7B for a 24 GB card, then plan, train and report a small model on this machine
	$(BIN)/python -m badam_cli.demo

test: $(INSTALLED) ## the tests that every change must pass
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile

test-slow: $(INSTALLED) ## the long tests
	$(BIN)/python -m pytest -q -m slow

test-oldest: $(OLDEST)/installed ## the tests with the oldest versions of libraries that are supported
	$(OLDEST)/bin/python -m pytest -q -m "not slow" -n 2 --dist loadfile

card: $(CARD)/installed ## the environment with torch's CUDA build, some gigabytes, for the null CUDA device

test-card: $(CARD)/installed ## the tests on the null CUDA device
	$(CARD)/bin/python -m pytest -q -n 2 tests/card

check: $(INSTALLED) ## lint, format, types, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## measure what the documentation claims, for most of an hour; one of it with BENCH=name
	$(BIN)/python -m benchmarks $(or $(BENCH),--all)

clean: ## remove the virtual environment and build output
	rm -rf $(VENV) $(OLDEST) $(CARD) build dist *.egg-info

# The stamp is newer than what it was made from, so a repeated make installs nothing. torch goes first: with the
# constraint it is settled before any package that depends on it is looked at.
$(INSTALLED): pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)

$(OLDEST)/installed: pyproject.toml constraints-oldest.txt
	$(call install,$(OLDEST),constraints-oldest.txt)

# Everything but torch is of the versions that all other tests use.
$(CARD)/installed: pyproject.toml constraints.txt constraints-card.txt
	mkdir -p $(CARD)
	grep -v '^torch==' constraints.txt | cat - constraints-card.txt > $(CARD)/constraints.txt
	$(call install,$(CARD),$(CARD)/constraints.txt)

define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; name one with: make PYTHON=python3.12" >&2; exit 2; }
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) torch
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) -e '.[train,compare,zero3,dev]'
	touch $@
endef
