# Mixvisor: `make demo` shows it, `make test` proves it. Both set up what they need.

VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin

.PHONY: help demo test lab lint bench dashboards docs clean

help:
	@echo "make demo   set up and watch software and hardware VMs share one CPU (ARGS='--seconds 20')"
	@echo "make test   set up and run every test"
	@echo "make lab    boot hosts with VT-x, AMD-V and neither, and prove the program inside them (ARGS='vt-x')"
	@echo "make lint   ruff, pyright, import-linter"
	@echo "make bench  every benchmark, about twenty minutes on a quiet machine"
	@echo "make docs   write the generated pages, tables and the dashboard anew"

# A stamp a flavour: setting up again happens only when the project's metadata or its C part changed.
$(VENV)/.ready-run: pyproject.toml .ci/setup sched/steady.c
	@VENV=$(VENV) .ci/setup run
	@touch $@

$(VENV)/.ready-dev: pyproject.toml .ci/setup sched/steady.c
	@VENV=$(VENV) .ci/setup dev
	@touch $@ $(VENV)/.ready-run

demo: $(VENV)/.ready-run
	@$(BIN)/mixvisor demo $(ARGS)

test: $(VENV)/.ready-dev
	$(BIN)/pytest $(ARGS)

# A minute or more for each host with VT-x (Bochs); those with AMD-V and without are in `make test`, too.
lab: $(VENV)/.ready-dev
	@$(BIN)/python -m tests.lab $(ARGS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(VENV)/.ready-dev
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/.ready-dev
	$(BIN)/python docs/generate.py
	$(BIN)/python -m mixvisor.metrics.document --write docs/metrics.md
	$(BIN)/python -m mixvisor.metrics.dashboards.build

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
