# Everything runs inside .venv, which `make venv` builds from pyproject.toml and constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
S3_PORT ?= 7480
AUDIT := .audit
KNOWN_TO_BE_VULNERABLE := https://pypi.org/pypi/jinja2/2.11.0/json

.PHONY: help venv demo test test-all faults bench soak lint audit cluster cluster-stop s3 s3-stop verify-gpu clean

help:
	@echo "make demo      install, then run the whole walk on real imagery; writes runs/demo/report/report.html"
	@echo "make test      install, then run the tests (without those marked slow)"
	@echo "make test-all  every test; installs an S3 server (Ceph's gateway), Chromium and an MLflow server for them"
	@echo "make faults    break real runs in 23 ways, with storage on the S3 server; writes runs/faults.json, prints a table"
	@echo "make soak      captioning and training for 45 minutes, with a fault every two minutes; writes runs/soak.json"
	@echo "make bench     measure; writes runs/bench.json and prints a table (see tests/benchmarks/README.md)"
	@echo "make s3        start an S3 server on this machine and say how to use it; make s3-stop ends it"
	@echo "make lint      formatting, lint and strict types"
	@echo "make audit     hold constraints.txt against PyPI's list of known vulnerabilities; needs the network"
	@echo "make cluster   an autoscaling Ray cluster on this machine to submit jobs to; make cluster-stop ends it"
	@echo "make venv      install only"
	@echo "make verify-gpu  every stage on 200 tiles and one GPU; writes gpu.json"
	@echo "make clean     remove .venv and caches; runs/ stays"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[demo,test]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python jobs/pipeline.py --recipe world_demo --storage runs

# Two processes: a single one often waits for nodes, ranks and jobs to start.
test: $(STAMP) lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not slow and not fault"

test-all: $(STAMP) lint
	$(BIN)/python tests/s3_server.py install
	$(BIN)/python tests/chromium.py install
	$(BIN)/python tests/mlflow_server.py install
	URBANCLIP_RAY_NEEDS_S3=1 URBANCLIP_RAY_NEEDS_BROWSER=1 URBANCLIP_RAY_NEEDS_MLFLOW=1 $(BIN)/python -m pytest -m "not fault"

faults: $(STAMP)
	$(BIN)/python tests/s3_server.py install
	URBANCLIP_RAY_NEEDS_S3=1 $(BIN)/python -m pytest -m fault tests/faults

soak: $(STAMP)
	$(BIN)/python tests/s3_server.py install
	$(BIN)/python tests/faults/soak.py --minutes 45 --output runs/soak.json

bench: $(STAMP)
	$(BIN)/python tests/chromium.py install
	$(BIN)/python tests/benchmarks/run.py

s3: $(STAMP)
	@$(BIN)/python tests/s3_server.py install
	@$(BIN)/python tests/s3_server.py start --port $(S3_PORT)

s3-stop: $(STAMP)
	@$(BIN)/python tests/s3_server.py stop

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A tool with dependencies of its own, so in an environment of its own. Where PyPI does not answer, it calls every package unknown
# and ends well: so PyPI is asked for an old advisory first, and a package that could not be audited is an error.
audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	@$(AUDIT)/bin/python -c 'import requests; requests.get("$(KNOWN_TO_BE_VULNERABLE)", timeout=30).json()["vulnerabilities"][0]' \
	  2> /dev/null || { echo "NOT AUDITED: no advisories at $(KNOWN_TO_BE_VULNERABLE); this needs access to the network"; exit 1; }
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

cluster: $(STAMP)
	@$(BIN)/python cluster/local_cluster.py start

cluster-stop:
	@$(BIN)/python cluster/local_cluster.py stop

verify-gpu: $(STAMP)
	$(BIN)/python jobs/verify_gpu.py --output gpu.json

clean:
	rm -rf $(VENV) $(AUDIT) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
