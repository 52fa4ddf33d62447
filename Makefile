# `make serve` and `make test` are all a newcomer needs: both install what they need into .venv first.
PYTHON ?= python3
PORT ?= 8000
HOST ?= 127.0.0.1
VENV ?= .venv
LOADTEST ?=
GROWTH ?=
BENCH ?=
WORKERS ?= 2
TORCH ?= torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ZOO := decoders/zoo
DOMAINS := $(notdir $(patsubst %/memory_decoder.json,%,$(wildcard $(ZOO)/*/memory_decoder.json)))
BIN := $(VENV)/bin
CACHE ?= .cache
EMBEDDED = $(ZOO)/base $(foreach d,$(DOMAINS),--decoder $(d)=$(ZOO)/$(d)) --datastore python=$(CACHE)/retrieval/python \
  --ngram python=$(CACHE)/ngram/python \
  --dtype float32 --enforce-eager --kv-cache-memory-bytes 268435456
BASELINES := $(CACHE)/retrieval/python/retrieval.json $(CACHE)/ngram/python/ngram.json
QUIET := env VLLM_LOGGING_LEVEL=ERROR PYTHONWARNINGS=ignore

.PHONY: serve loadtest bench bench-gpu growth test test-fast check format install install-dev clean

serve: install $(BASELINES)  ## serve the embedded base model with its memory decoders on http://127.0.0.1:8000
	exec $(QUIET) $(BIN)/memdec serve $(EMBEDDED) --host $(HOST) --port $(PORT)

# kNN-LM and RAG over this Python's standard library, to compare the python memory with: half a minute, once
$(CACHE)/retrieval/python/retrieval.json: $(ZOO)/base/model.safetensors | install
	$(QUIET) $(BIN)/memdec retrieval python --corpus stdlib --base $(ZOO)/base --out $(CACHE)/retrieval/python --entries 60000 --valid-windows 16

# an n-gram memory of the same tokens: some seconds, and its order and lambda are tuned beside the base
$(CACHE)/ngram/python/ngram.json: $(CACHE)/retrieval/python/retrieval.json | install
	$(QUIET) $(BIN)/memdec ngram python --corpus stdlib --base $(ZOO)/base --out $(CACHE)/ngram/python \
	  --work $(CACHE)/retrieval/python.work --windows 16 --with-sources

loadtest: install-dev $(BASELINES)  ## load a server with locust; results go to loadtest/results
	$(QUIET) $(BIN)/python loadtest/run.py $(LOADTEST) -- $(EMBEDDED)

bench: install-dev  ## what a memory costs and what speculation saves, over plain vLLM: 20 GB of memory, half an hour
	$(QUIET) $(BIN)/python loadtest/bench.py $(BENCH)

bench-gpu:  ## the paper's shapes on a CUDA device, with an environment of your own: PYTHON=... has torch and transformers
	PYTHONPATH=. $(PYTHON) loadtest/bench_gpu.py $(BENCH)

growth: install-dev $(CACHE)/retrieval/python/retrieval.json  ## milliseconds per token as the corpus grows: a datastore to 10 M entries, n-grams to 100 M tokens: 16 GB of memory, 10 GB of disk
	$(QUIET) $(BIN)/python loadtest/growth.py $(GROWTH)

test: install-dev check  ## every check and test, in two processes: most of a test is one core's start-up
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-fast: install-dev  ## the tests that start no engine
	$(BIN)/python -m pytest -m unit -n $(WORKERS) --dist loadfile

check: install-dev  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install-dev  ## rewrite files in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: requirements/cpu.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14) and "memdec needs Python 3.11, 3.12 or 3.13; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps -r requirements/cpu.txt
	$(BIN)/pip install --quiet --no-deps --extra-index-url $(TORCH_INDEX) '$(TORCH)'
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements/dev.txt requirements/triton.txt
	$(BIN)/pip install --quiet -r requirements/dev.txt
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/triton -r requirements/triton.txt
	touch $@

clean:
	rm -rf $(VENV) $(CACHE) *.egg-info .mypy_cache .pytest_cache .ruff_cache
