# make demo   everything from nothing: sets up, trains eight users' adapters, publishes and pulls them
# make test   the test suite, with a real PostgreSQL, a real S3 server where one can be had, and real PEFT
# make test-long  more of the same, which CI runs too: the whole stack, a storm, the other hundred random packs, searches by the command line, mutants
# make check  format, lint, types, import contracts
# make bench  the benchmarks behind the README's figures, on the CPU
# make bench-gpu  those that need a GPU, each at most ten minutes
# make bench-registry  a million users, 256 publishers, MLflow beside us; needs about 40 GB of disk
# make bench-crash  kills, fails and stops a publishing worker at every point, on every database and store; an hour
# make bench-pull  2,000 adapters from an S3 server 20 ms away, against boto3 in a loop; half an hour
# make storm  10,000 users due at once on real servers with Prefect, then the same with everything killed at random; an hour
# make bench-hostile  two thousand hostile files, read: what came of them and what it cost; some minutes
# make stack  the compose file's services as plain processes, without Docker
PYTHON ?= python3
BIN := .venv/bin
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1

.PHONY: demo setup test test-long quick check format bench bench-gpu bench-crash bench-pull bench-hostile bench-registry storm stack clean

demo: .venv/.demo-ready
	$(BIN)/lora demo

setup: .venv/.dev-ready

test: .venv/.dev-ready
	infra/install-test-servers
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -m "not long"

test-long: .venv/.dev-ready
	infra/install-test-servers
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -m long

quick: .venv/.dev-ready
	$(BIN)/pytest -m "not slow and not long"

check: .venv/.dev-ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python infra/tenant_lint.py

format: .venv/.dev-ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.dev-ready
	$(BIN)/python benchmarks/packed_vs_serial.py
	$(BIN)/python benchmarks/full_slots.py
	$(BIN)/python benchmarks/memory_law.py
	$(BIN)/python benchmarks/lower_layers.py
	$(BIN)/python benchmarks/mixed_generation.py
	$(BIN)/python benchmarks/low_memory.py --row-tokens 256 --minutes 60
	$(BIN)/python benchmarks/tune_search.py

bench-gpu: .venv/.dev-ready
	$(BIN)/python benchmarks/gpu_efficiency.py
	$(BIN)/python benchmarks/gpu_efficiency.py --compiled
	$(BIN)/python benchmarks/gpu_users.py
	$(BIN)/python benchmarks/gpu_exactness.py
	$(BIN)/python benchmarks/low_memory.py

bench-registry: .venv/.dev-ready
	PYTHONPATH=. $(BIN)/python benchmarks/publish_contention.py
	PYTHONPATH=. $(BIN)/python benchmarks/registry_vs_mlflow.py
	PYTHONPATH=. $(BIN)/python benchmarks/registry_scale.py

bench-crash: .venv/.dev-ready
	infra/install-test-servers
	PYTHONPATH=. $(BIN)/python benchmarks/crash_publish.py

bench-hostile: .venv/.dev-ready
	PYTHONPATH=. $(BIN)/python -m benchmarks.hostile_files

bench-pull: .venv/.dev-ready
	infra/install-test-servers
	PYTHONPATH=. $(BIN)/python benchmarks/pull_many.py

storm: .venv/.dev-ready
	infra/install-test-servers
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python benchmarks/storm.py
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python benchmarks/storm.py --kill

stack: .venv/.dev-ready
	infra/install-test-servers
	$(BIN)/python infra/stack.py

clean:
	rm -rf .venv .lora

.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 12) else "Python 3.11 or 3.12 is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/.demo-ready: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --no-compile --editable '.[all]'
	touch $@

.venv/.dev-ready: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	touch $@ .venv/.demo-ready
