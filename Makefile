# `make` explains the targets. Everything that runs is under workspace/, everything installed under .venv/.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo down status test evidence stack lint envs constraints clean secrets up logs backup restore

# What a person may choose: make demo AIRFLOW_PORT=9088. The production stack keeps its choice in .env.
-include .env
export MLFLOW_PORT ?= 8080
export TRITON_HTTP_PORT ?= 8000
export TRITON_GRPC_PORT ?= 8001
export TRITON_METRICS_PORT ?= 8002
export AIRFLOW_PORT ?= 8088
export TOXIC_WORKSPACE ?= $(CURDIR)/workspace
FORCE ?=
DATA ?=
REVIEW ?=

# uv looks for wheels where pip is told to look. Where neither is told anything, torch comes from PyTorch's own CPU
# index: PyPI's build brings 3 GB of CUDA that a laptop has no use for. Behind a mirror of PyPI alone: TORCH_BACKEND=
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
TORCH_BACKEND ?= $(if $(UV_FIND_LINKS),,cpu)
ifneq ($(TORCH_BACKEND),)
export UV_TORCH_BACKEND := $(TORCH_BACKEND)
endif

PYTHON ?= python3.11
UV := $(or $(shell command -v uv),.venv/uv/bin/uv)
TASKS := .venv/tasks/bin/python
INSTALL = $(UV) pip install --quiet --compile-bytecode

help: ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nPorts: AIRFLOW_PORT=%s MLFLOW_PORT=%s TRITON_HTTP_PORT=%s TRITON_GRPC_PORT=%s TRITON_METRICS_PORT=%s\n' \
		$(AIRFLOW_PORT) $(MLFLOW_PORT) $(TRITON_HTTP_PORT) $(TRITON_GRPC_PORT) $(TRITON_METRICS_PORT)

demo: envs ## retrain once through Airflow and serve the result; FORCE=1 again, DATA=FOLDER on Kaggle's files, REVIEW=1 asks you
	@$(TASKS) -m local.demo $(if $(FORCE),--force) $(if $(REVIEW),--review) $(if $(DATA),--data="$(DATA)")

down: ## stop what `make demo` or `make up` left running; data stays
	@[ ! -x $(TASKS) ] || $(TASKS) -m local.services down
	@if [ -f .env ] || [ -n "$${COMPOSE_PROFILES:-}" ]; then $(COMPOSE) down; docker/end_steps.sh; fi

status: ## what of it is running, and where
	@[ ! -x $(TASKS) ] || $(TASKS) -m local.services status

# Most tests wait for servers: two at a time take little more than half the time. WORKERS=0: one after another.
# Threads of torch that fight for few cores slow a tiny model down.
WORKERS ?= 2
test: export OMP_NUM_THREADS ?= 1
test: envs .venv/tasks/.tensorrt-rtx ## the whole suite, with real components
	$(TASKS) -m pytest --numprocesses=$(WORKERS) --dist=worksteal tests/unit tests/steps tests/serving tests/pages
	.venv/airflow/bin/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile tests/dags

evidence: envs ## the demo's promises: retrain, swap under load, a killed server, bad data (about 8 min)
	$(TASKS) -m pytest tests/demo -s

stack: envs ## the production stack on a real Docker Engine: every step in its container, kills, backup (about 20 min)
	@[ -z "$(ENGINE)" ] || eval "$$($(ENGINE) start)"; $(TASKS) -m pytest tests/stack -s

lint: envs ## black, isort, flake8, prettier and the standard hooks
	.venv/tasks/bin/pre-commit run --all-files

# The production stack: see "Operating the stack" in the README.
COMPOSE = VERSION="$$(git describe --tags --always --dirty)" GIT_COMMIT="$$(git rev-parse HEAD)" docker compose
export TOXIC_SECRETS ?= $(CURDIR)/secrets
BACKUPS ?= backups

# Steps' containers are given the path on the host, which has to be whole: compose knows it from .env alone.
NAME_SECRETS = grep -qs "^TOXIC_SECRETS=" .env || \
	printf '\n\043 where the secrets of this host are\nTOXIC_SECRETS=%s\n' "$$(realpath "$(TOXIC_SECRETS)")" >>.env

secrets: ## the stack's passwords, those that are missing; PROFILE=cpu or gpu writes .env too, NAMES="…" makes these anew
	@[ ! -d secrets ] || [ -d "$(TOXIC_SECRETS)" ] || \
		{ echo "TOXIC_SECRETS is $(TOXIC_SECRETS), which is not there, but secrets/ is: correct it in .env" >&2; exit 2; }
	@docker/secrets.sh "$(TOXIC_SECRETS)" $(NAMES)
	@[ -z "$(PROFILE)" ] || [ -e .env ] || cp docker/$(PROFILE).env .env
	@[ -z "$(PROFILE)" ] || { $(NAME_SECRETS); }
	@[ -z "$(PROFILE)" ] || grep -qx "COMPOSE_PROFILES=$(PROFILE)" .env || \
		{ echo ".env is there and has another profile than $(PROFILE): change it by hand, or move it away" >&2; exit 2; }

up: ## build what has changed, start the stack and wait until all of it answers
	@[ ! -e .env ] || { $(NAME_SECRETS); }
	@$(COMPOSE) build
	@$(COMPOSE) up --detach --wait --no-build

logs: ## what the stack says, as it says it
	@$(COMPOSE) logs --follow --tail=50

backup: ## PostgreSQL and the workspace of the stack into a folder of BACKUPS (backups)
	@docker/backup.sh "$(BACKUPS)"

restore: ## put BACKUP=FOLDER in the place of what the stack has
	@$(COMPOSE) build
	@docker/restore.sh "$(BACKUP)"

envs: .venv/tasks/.done .venv/airflow/.done .venv/triton/.done

.venv/tasks/.done: pyproject.toml constraints.txt | $(UV)
	$(UV) venv --quiet --clear --python $(PYTHON) .venv/tasks
	$(INSTALL) --python $(TASKS) --constraint constraints.txt --editable ".[dev]"
	@touch $@

# What builds engines without a GPU: 150 MB that only the tests want.
.venv/tasks/.tensorrt-rtx: .venv/tasks/.done
	$(INSTALL) --python $(TASKS) --constraint constraints.txt --editable ".[dev,tensorrt-rtx]"
	@touch $@

.venv/airflow/.done: pyproject.toml constraints.txt | $(UV)
	$(UV) venv --quiet --clear --python $(PYTHON) .venv/airflow
	$(INSTALL) --python .venv/airflow/bin/python --constraint constraints.txt --group airflow
	@touch $@

# The server looks for its Python backend's stub by version; the wheel keeps one per version elsewhere.
.venv/triton/.done: pyproject.toml constraints-triton.txt | $(UV)
	$(UV) venv --quiet --clear --python $(PYTHON) .venv/triton
	$(INSTALL) --python .venv/triton/bin/python --constraint constraints-triton.txt --group triton
	@touch $@

.venv/uv/bin/uv:
	$(PYTHON) -m venv .venv/uv
	.venv/uv/bin/pip install --quiet uv

constraints: | $(UV) ## resolve the newest versions into the constraints files
	@for spec in "constraints.txt --extra dev --extra tensorrt-rtx --group airflow --group airflow-image --group mlflow-image" "constraints-triton.txt --group triton"; do \
		set -- $$spec; file=$$1; shift; head="$$(grep '^#' $$file)"; \
		$(UV) pip compile pyproject.toml "$$@" --universal --python-version 3.11 --no-annotate --no-header -q -o $$file --upgrade; \
		printf '%s\n%s\n' "$$head" "$$(cat $$file)" >$$file; \
	done

clean: down ## remove the environments; the workspace, which holds data and models, stays
	rm -rf .venv
