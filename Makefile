# `make` prints what there is. Every target prepares what it needs; nothing is installed into the system.

PYTHON ?= python3
PY := .venv/bin/python
PYTEST := $(PY) -m pytest
# On two cores: tests wait for services more than they work. A worker that is free takes from another.
WORKERS ?= 4
SHARED := -n $(WORKERS) --dist worksteal
# Each worker on servers of its own.
CHAOS := -n 4 --dist worksteal
# Runs a step and says how long it took: $(STEP) name command…
STEP = @sh -c 'b=$$(date +%s); "$$@"; r=$$?; echo "$$0  $$(( $$(date +%s) - b )) s" >&2; exit $$r'

.DEFAULT_GOAL := help
.PHONY: help setup run demo down test test-unit test-integration test-e2e test-chaos test-chaos-long bench bench-peers bench-large bench-fleet bench-smoke lint types format scenarios lock fresh

help: ## What there is
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-18s %s\n", $$1, $$2}'

setup: .venv/installed ## The virtual environment, pinned by hash
.venv/installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Bide needs Python 3.11 or newer; set PYTHON=")'
	$(STEP) "virtual environment" $(PYTHON) -m venv .venv
	$(STEP) "packages" .venv/bin/pip --disable-pip-version-check -qq install --require-hashes --no-deps -r requirements.lock
	@touch $@

run: setup ## The whole stack on this machine: real Postgres, real RabbitMQ, the four services; Ctrl-C stops it
	@$(PY) -m deploy.local up $(ARGS)

demo: setup ## Three stories: busy workers, a session without end, a death that is none and one that is
	@$(PY) -m deploy.demo

down: setup ## End what a crashed `make run` left behind
	@$(PY) -m deploy.local down $(ARGS)

test: setup ## Every test, against real servers
	$(STEP) "unit, integration and end-to-end tests" $(PYTEST) $(SHARED) $(ARGS) tests/e2e tests/integration tests/unit
	@$(MAKE) --no-print-directory test-chaos

test-unit: setup ## Tests that need no server
	$(STEP) "unit tests" $(PYTEST) $(ARGS) tests/unit

test-integration: setup ## One service's machinery against real servers
	$(STEP) "integration tests" $(PYTEST) $(SHARED) $(ARGS) tests/integration

test-e2e: setup ## The whole stack from outside
	$(STEP) "end-to-end tests" $(PYTEST) $(SHARED) $(ARGS) tests/e2e

test-chaos: setup ## Servers and services that stop, die and freeze under load
	$(STEP) "chaos tests" $(PYTEST) $(CHAOS) --timeout 600 $(ARGS) tests/chaos

test-chaos-long: setup ## The same with outages of 60 to 90 s and the large counts
	$(STEP) "long chaos tests" env BIDE_TEST_LONG=1 $(PYTEST) $(CHAOS) --timeout 1800 $(ARGS) tests/chaos

bench: setup ## The figures of the whole path beside what they are to reach, and beside nginx
	@$(PY) -m tests.bench $(ARGS)

bench-peers: setup ## The same with nginx, procrastinate, pgqueuer, celery, dramatiq and Starlette beside it
	@$(PY) -m tests.bench --peers $(ARGS)

bench-large: setup ## The claim among ten million waiting items (8 GB of disk)
	@$(PY) -m tests.bench --large $(ARGS) claim

bench-fleet: setup ## Who is declared dead in a fleet's day, by four rules in the same world: false restarts, detection, outages
	@$(PY) -m tests.bench.fleet $(ARGS)

bench-smoke: setup ## One short round of every figure: whether it runs, not how fast
	$(STEP) "benchmarks, one short round" $(PY) -m tests.bench --smoke $(ARGS)
	$(STEP) "fleet benchmark, one hour" $(PY) -m tests.bench.fleet --smoke

lint: setup ## Ruff with every rule that is not refused in pyproject.toml
	$(STEP) "lint" $(PY) -m ruff check .
	$(STEP) "format" $(PY) -m ruff format --check .

types: setup ## mypy --strict
	$(STEP) "types" $(PY) -m mypy

format: setup ## Let ruff write the layout
	@$(PY) -m ruff format . && $(PY) -m ruff check --fix .

scenarios: setup ## Ids of docs/scenarios.md that no test names
	@$(PY) -m tests.scenarios

lock: setup ## Resolve requirements.lock anew
	@.venv/bin/pip -qq install uv
	@.venv/bin/uv pip compile pyproject.toml --extra dev --extra docker --universal --generate-hashes --upgrade --quiet -o requirements.lock

fresh: ## Try `make run` and `make test` in a new Debian, as root and as a user (root, debootstrap; SUITE=trixie)
	@deploy/debian/fresh.sh $(SUITE)
