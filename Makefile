# `make demo` and `make test` start from nothing: the first target that needs it makes .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint bench clean

$(VENV)/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(VENV)/installed
	$(RUN) -m executor.demo

test: $(VENV)/installed
	$(RUN) -m pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(RUN) tests/bench/search_speed.py
	$(RUN) tests/bench/offload.py

clean:
	rm -rf $(VENV) demo
