# Everything is set up on first use, into .venv and .cache; `make` alone lists what there is.

# The first interpreter that fits; `make PYTHON=... setup` names another. Each is run, because a shim may be there and not work.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo internet test test-fast lint bench bench-engine bench-swarm clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup:  ## packages into .venv, Kubo and a small model into .cache (about five minutes, once)
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 on PATH; install one, or run make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) .ci/setup.py

demo: setup  ## the main job on three nodes of this machine
	@$(BIN)/python examples/demo.py

internet: setup  ## homes behind NATs and one public node, in network namespaces of this machine
	@$(BIN)/python -m examples.internet

lint: setup
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --cache-dir .cache/import-linter --no-logo

test: lint  ## lint, types, import rules, and all tests on real Kubo, libtorrent and llama.cpp
	$(BIN)/python -m pytest -n auto
	@$(BIN)/python -m tests.internet

test-fast: lint  ## the same without the functional tests: under a minute
	$(BIN)/python -m pytest -n auto tests/unit

bench: setup  ## publish and pull of a 1 GiB file beside ipfs and plain libtorrent
	$(BIN)/python -m pytest tests/bench/test_transfers.py -s

bench-engine: setup  ## answers beside llama-server and llama_cpp.server (builds llama-server once, about seven minutes)
	@$(BIN)/python .ci/bench.py
	$(BIN)/python -m pytest tests/bench/test_engine.py -s

bench-swarm: setup  ## gossip of 1,000 to 100,000 nodes in virtual time: bytes, memory, speed (about two minutes)
	$(BIN)/python -m pytest tests/bench/test_swarm.py -s

clean:  ## remove what set-up and the tools made; the next run starts from nothing
	rm -rf .venv .cache build dist *.egg-info
