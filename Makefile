# Every target makes .venv when it is missing. RECIPE=cartpole, RUN_DIR=..., ARGS="--seed 1" go to `make train`; without RUN_DIR the
# run is in runs/RECIPE, and with game, protocol and seed in its name where they are not the recipe's.
PYTHON ?= python3
RECIPE ?= pong
RUN_DIR ?=
ARGS ?=
BIN := .venv/bin
SOURCES := actors common deploy learner replay_server tests benchmarks

PEERS := cpprb envpool gymnasium reverb rllib sb3 torchrl

.PHONY: train test test-slow lint bench bench-peers bench-system clean

train: .venv/installed
	$(BIN)/qfleet train $(RECIPE) $(if $(RUN_DIR),--run-dir $(RUN_DIR)) $(ARGS)

# Two processes: one runs the tests of deploy that start Ray, one after another, and meanwhile the other one the rest.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow --timeout 1800

lint: .venv/installed
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python benchmarks/learner_threads.py

# Whole systems beside each other, about 75 minutes; on a machine with nothing else to do.
bench-system: .venv/installed build/peers/sb3/installed build/peers/rllib/installed
	$(BIN)/python benchmarks/system.py --fill --rounds 3 --json build/system.json $(ARGS)

# One virtual environment for each system that benchmarks/replay.py, learner.py or system.py compares with. One that cannot be installed stops no other.
bench-peers: $(PEERS:%=build/peers/%/installed)

build/peers/%/installed: benchmarks/peers/requirements/%.txt
	rm -rf build/peers/$*
	@mkdir -p build/peers
	@if $(PYTHON) -m venv build/peers/$* && PIP="build/peers/$*/bin/python -m pip install --quiet --disable-pip-version-check" && \
		{ ! grep '^torch==' $< > build/peers/$*/torch.txt || $$PIP --requirement build/peers/$*/torch.txt; } && \
		$$PIP --requirement $<; then touch $@ && echo "$*: installed"; \
	else rm -rf build/peers/$* && echo "$*: CANNOT BE INSTALLED HERE (see above); the benchmarks will say so and go on"; fi

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The constraints also bind what builds the package itself.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qfleet needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch .venv/installed
