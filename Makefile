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
FORCE ?=
DATA ?=
REVIEW ?=

# Paths reach programs in the environment, as they were written: in a rule, make and the shell would each read a `$`, a
# quote or a space in their own way. For the same reason every path in a rule is relative.
ifeq ($(origin TOXIC_WORKSPACE),undefined)
export TOXIC_WORKSPACE := $(CURDIR)/workspace
else
override export TOXIC_WORKSPACE := $(value TOXIC_WORKSPACE)
endif
export DATA_FOLDER := $(value DATA)

# Of the environments: see local/envs.py.
ifdef TORCH_BACKEND
export TORCH_BACKEND
endif
ifdef PYTHON
export PYTHON
endif
TASKS := .venv/tasks/bin/python
# Whichever Python is here makes them.
ENVS = @for python in "$${PYTHON:-python3.11}" python3.11 python3.12 python3.13 python3 python; do \
	! "$$python" -c "import sys; sys.exit(sys.version_info < (3, 8))" 2>/dev/null || exec "$$python" -m local.envs $(1); \
	done; echo "there is no Python on PATH: install 3.11, or name one: make $@ PYTHON=/path/to/python3.11" >&2; exit 2

help: ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nPorts: AIRFLOW_PORT=%s MLFLOW_PORT=%s TRITON_HTTP_PORT=%s TRITON_GRPC_PORT=%s TRITON_METRICS_PORT=%s\n' \
		$(AIRFLOW_PORT) $(MLFLOW_PORT) $(TRITON_HTTP_PORT) $(TRITON_GRPC_PORT) $(TRITON_METRICS_PORT)

demo: envs ## retrain once through Airflow and serve the result; FORCE=1 again, DATA=FOLDER on Kaggle's files, REVIEW=1 asks you
	@$(TASKS) -m local.demo $(if $(FORCE),--force) $(if $(REVIEW),--review) $(if $(DATA),--data="$$DATA_FOLDER")

down: ## stop what `make demo` or `make up` left running; data stays
	@[ ! -x $(TASKS) ] || $(TASKS) -m local.services down
	@if [ -f .env ] || [ -n "$${COMPOSE_PROFILES:-}" ]; then $(COMPOSE) down; docker/end_steps.sh; fi

status: ## what of it is running, and where
	@[ ! -x $(TASKS) ] || $(TASKS) -m local.services status

# Most tests wait for servers: two at a time take little more than half the time. WORKERS=0: one after another.
# Threads of torch that fight for few cores slow a tiny model down.
WORKERS ?= 2
test: export OMP_NUM_THREADS ?= 1
test: ## the whole suite, with real components
	$(call ENVS,tests)
	$(TASKS) -m pytest --numprocesses=$(WORKERS) --dist=worksteal tests/unit tests/steps tests/serving tests/pages
	.venv/airflow/bin/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile tests/dags

evidence: envs ## the demo's promises: retrain, swap under load, a killed server, bad data (about 8 min)
	$(TASKS) -m pytest tests/demo -s

stack: envs ## the production stack on a real Docker Engine: every step in its container, kills, backup (about 20 min)
	@[ -z "$(ENGINE)" ] || eval "$$($(ENGINE) start)"; $(TASKS) -m pytest tests/stack -s

lint: envs ## black, isort, flake8, prettier and the standard hooks
	$(TASKS) -m pre_commit run --all-files

# The production stack: see "Operating the stack" in the README.
COMPOSE = VERSION="$$(git describe --tags --always --dirty)" GIT_COMMIT="$$(git rev-parse HEAD)" docker compose
ifeq ($(origin TOXIC_SECRETS),undefined)
export TOXIC_SECRETS := $(CURDIR)/secrets
else
export TOXIC_SECRETS
endif
BACKUPS ?= backups

# Steps' containers are given the path on the host, which has to be whole: compose knows it from .env alone.
NAME_SECRETS = grep -qs "^TOXIC_SECRETS=" .env || \
	printf '\n\043 where the secrets of this host are\nTOXIC_SECRETS=%s\n' "$$(realpath "$$TOXIC_SECRETS")" >>.env

secrets: ## the stack's passwords, those that are missing; PROFILE=cpu or gpu writes .env too, NAMES="…" makes these anew
	@[ ! -d secrets ] || [ -d "$$TOXIC_SECRETS" ] || \
		{ echo "TOXIC_SECRETS is $$TOXIC_SECRETS, which is not there, but secrets/ is: correct it in .env" >&2; exit 2; }
	@docker/secrets.sh "$$TOXIC_SECRETS" $(NAMES)
	@[ -z "$(PROFILE)" ] || [ -e .env ] || cp docker/$(PROFILE).env .env
	@[ -z "$(PROFILE)" ] || { $(NAME_SECRETS); }
	@[ -z "$(PROFILE)" ] || grep -qx "COMPOSE_PROFILES=$(PROFILE)" .env || \
		{ echo ".env is there and has another profile than $(PROFILE): change it by hand, or move it away" >&2; exit 2; }

up: ## build what has changed, start the stack and wait until all of it answers
	@[ ! -e .env ] || { $(NAME_SECRETS); }
	@docker/check.sh settings
	@$(COMPOSE) build
	@$(COMPOSE) up --detach --wait --no-build
	@docker/check.sh running

logs: ## what the stack says, as it says it
	@$(COMPOSE) logs --follow --tail=50

backup: ## PostgreSQL and the workspace of the stack into a folder of BACKUPS (backups)
	@docker/backup.sh "$(BACKUPS)"

restore: ## put BACKUP=FOLDER in the place of what the stack has
	@$(COMPOSE) build
	@docker/restore.sh "$(BACKUP)"

envs:
	$(call ENVS,envs)

constraints: ## resolve the newest versions into the constraints files
	$(call ENVS,constraints)

clean: down ## remove the environments; the workspace, which holds data and models, stays
	rm -rf .venv
