# Everything runs in .venv, made from requirements.lock. Needs Python 3.11 or later, make and a package index; no root.
PYTHON ?= python3
UV_VERSION := 0.13.9
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
BIN := .venv/bin
PROTO := protos/smc/v1/smc.proto

.PHONY: demo test check bench setup generate lock format clean

demo: setup ## Run the mesh on this machine: etcd, three replicas, Envoys, the bookstore. DEMO_ARGS=--check proves each claim.
	$(BIN)/smc demo $(DEMO_ARGS)

test: setup ## Every test, e2e included. TEST_ARGS goes to pytest.
	$(BIN)/python -X dev -m pytest $(TEST_ARGS)

check: setup ## Format, lint, types, layers, generated code, no private key in the tree.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.fresh
	! git grep -nE -e '-----BEGIN ([A-Z]+ )?PRIVATE KEY-----[[:space:]]*$$' -- .

bench: setup ## The benchmarks; figures go to standard output, see bench/README.md.
	$(BIN)/python -m bench.fanout $(BENCH_ARGS)
	$(BIN)/python -m bench.storm $(STORM_ARGS)
	$(BIN)/python -m bench.scale $(SCALE_ARGS)
	$(BIN)/python -m bench.apply $(APPLY_ARGS)

setup: .venv/.stamp

# A new environment each time the lock changes: two wheels share folders, and removing either breaks the other.
.venv/.stamp: requirements.lock pyproject.toml $(filter .tools/bin/uv,$(UV))
	$(UV) venv -q --clear --python $(PYTHON) .venv
	$(UV) pip sync -q --python $(BIN)/python requirements.lock
	$(UV) pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

.tools/bin/uv:
	$(PYTHON) -m venv .tools
	.tools/bin/python -m pip install -q uv==$(UV_VERSION)

generate: setup ## smc/v1 from the .proto.
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=. --pyi_out=. --grpc_python_out=. $(PROTO)

lock: ## requirements.lock from pyproject.toml: names, versions and hashes.
	$(UV) pip compile -q --universal --generate-hashes --no-header --no-annotate --extra demo --group dev \
		-o requirements.lock pyproject.toml

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .tools .mypy_cache .ruff_cache .hypothesis
