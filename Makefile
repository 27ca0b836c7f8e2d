# Everything a reader must run is one word. `make help` lists them.

# The first interpreter of a supported version; evaluated only where an environment is created.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	"$$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo "$$name" && break; done)
# PyTorch's index for CPUs, as in the Dockerfile. `TORCH_INDEX=` installs torch with CUDA from pip's own index.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin
PIP := PYTHONWARNINGS=ignore $(BIN)/pip --disable-pip-version-check install --constraint constraints.txt
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
# Whether pip finds a version of torch: $(call has_torch,VERSION,OPTIONS). Nothing is downloaded.
has_torch = $(BIN)/pip --disable-pip-version-check index versions torch --retries 0 $(2) 2>/dev/null \
	| grep -qE '[ (]$(subst +,[+],$(subst .,[.],$(1)))([+,)]|$$)'
SERVING := .venv/serving
STAMP := .venv/installed
# One process more than cores: tests wait for what they started.
PYTEST = $(BIN)/python -m pytest --numprocesses $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --maxprocesses 5 --dist worksteal
# Bytecode is compiled once, not by each of the hundreds of processes that the tests start.
export PYTHONDONTWRITEBYTECODE :=
CHECKOV := .venv/checkov/installed
PROTOCOL := .venv/protocol/installed
OPENAPI := .venv/openapi/installed
MARKDOWN := .venv/markdown/installed

.DEFAULT_GOAL := help
.PHONY: help install serve test test-fast test-bulk test-containers test-interop check check-kubernetes checkov protocol openapi \
	format secrets train calibration-page screenshots constraints bench fuzz fuzz-protocol contract mutants soak sbom audit \
	ages clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(SERVING): pyproject.toml constraints.txt
	@# Another interpreter's environment made over this one would break it: PYTHON= chooses once, until `make clean`.
	@$(if $(wildcard $(BIN)/pip)$(PYTHON),,$(error no Python 3.11, 3.12 or 3.13 found: install one, or set PYTHON=))\
		test -x $(BIN)/pip || $(PYTHON) -m venv .venv
ifneq ($(TORCH_INDEX),)
	@echo 'Step 1 of 2: torch for CPUs, about 190 MB to download, 15 seconds and more'
	@# The packages that torch needs follow in step 2: constraints.txt pins them, and this index lacks some versions.
	@if $(call has_torch,$(TORCH),--index-url '$(TORCH_INDEX)'); then $(PIP) --no-deps --retries 1 --index-url '$(TORCH_INDEX)' torch; \
	elif echo '$(TORCH_INDEX) cannot be reached, or has no torch $(TORCH): the index of pip is used instead'; \
		$(call has_torch,$(TORCH)+cpu); then $(PIP) --no-deps 'torch==$(TORCH)+cpu'; \
	else echo 'The index of pip has no build for CPUs only. On Linux, torch is then 2.7 GB to download and 5 GB on disk.'; \
		echo 'To use another index: press Ctrl-C, and set TORCH_INDEX= to one with the builds for CPUs.'; $(PIP) torch; fi
else
	@echo 'Step 1 of 2: torch with CUDA, 2.7 GB to download, 5 GB on disk, some minutes'
	@$(PIP) torch
endif
	@echo 'Step 2 of 2: the packages of the service, about 40 MB to download, half a minute'
	@$(PIP) --quiet --editable '.[serve]'
	@touch $(SERVING)

$(STAMP): $(SERVING)
	@echo 'Training and development tools: about 370 MB to download, a minute or two'
	@# Python 3.11 and 3.12 bring a pip without --group.
	@$(PIP) --quiet 'pip>=25.1'
	@$(PIP) --quiet --editable '.[train,bulk,otel]' --group dev
	@touch $(STAMP)

install: $(STAMP) ## install everything into .venv: service, training, development tools

serve: $(SERVING) ## install what the service needs, and serve the shipped models on 127.0.0.1:8000 (PORT=, WORKERS=)
	@$(if $(PORT),ANOMALY_PORT=$(PORT)) $(if $(WORKERS),ANOMALY_WORKERS=$(WORKERS)) exec $(BIN)/python -m app

test: $(STAMP) ## run the whole test suite, on up to four cores
	$(PYTEST)

test-fast: $(STAMP) ## run the tests that start no process, container or browser (under 2 minutes on 2 cores)
	$(PYTEST) -m 'not process and not long'

test-bulk: $(STAMP) ## kill a node and the driver of a bulk run on a Ray cluster of two nodes (about 2 minutes)
	TEST_BULK=$(or $(TEST_BULK),40) $(BIN)/python -m pytest tests/bulk/test_cluster.py

test-containers: $(STAMP) ## build the images, start docker-compose.yml on a real engine, put faults under load (as root, or with an engine)
	bash tests/containers/run

check: $(STAMP) $(MARKDOWN) ## format check, lint, strict types, layers of imports, lint of Markdown
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@# The figures of docs/fit.md are written by a script, in lines of their own length.
	.venv/markdown/bin/pymarkdown --config .pymarkdown.json scan --exclude docs/fit.md *.md docs research

$(MARKDOWN): tests/markdown.txt | $(STAMP)
	@test -x .venv/markdown/bin/pip || $(PYTHON) -m venv .venv/markdown
	@.venv/markdown/bin/pip install --quiet --disable-pip-version-check --requirement tests/markdown.txt
	@touch $(MARKDOWN)

$(CHECKOV): tests/deploy/checkov.txt | $(STAMP)
	test -x .venv/checkov/bin/pip || $(PYTHON) -m venv .venv/checkov
	.venv/checkov/bin/pip install --quiet --disable-pip-version-check --requirement tests/deploy/checkov.txt
	@touch $(CHECKOV)

checkov: $(CHECKOV) ## install the scanner of Kubernetes manifests, in an environment of its own

# Tools whose packages would change those of the project live in environments of their own.
.venv/contract/installed .venv/mutants/installed .venv/supply/installed: .venv/%/installed: tests/%/requirements.txt | $(STAMP)
	test -x .venv/$*/bin/pip || $(BIN)/python -m venv .venv/$*
	.venv/$*/bin/pip install --quiet --disable-pip-version-check --requirement tests/$*/requirements.txt
	@touch $@

.venv/fuzz/installed: tests/fuzz/requirements.txt | $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/fuzz --requirement $<
	@touch $@

fuzz: .venv/fuzz/installed ## fuzz everything that reads what a client sends, 30 minutes per target (FUZZ='--seconds 60 png'; Linux)
	PYTHONPATH=.venv/fuzz:. $(BIN)/python -m tests.fuzz $(FUZZ)

contract: .venv/contract/installed ## compare a running service with its OpenAPI document, with schemathesis (CONTRACT='--examples 50')
	$(BIN)/python -m tests.contract $(CONTRACT)

mutants: .venv/mutants/installed ## change the code at random places, and list the changes that no test notices (MUTANTS='keys --count 20')
	$(BIN)/python -m tests.mutants $(MUTANTS)

sbom: .venv/supply/installed ## write var/sbom.json, the packages of this environment (CycloneDX)
	mkdir -p var
	.venv/supply/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --output-reproducible \
		--output-format JSON --output-file var/sbom.json $(BIN)/python
	$(BIN)/python -m tests.supply.sbom var/sbom.json

audit: .venv/supply/installed ## look up constraints.txt in the advisory database; fails if it cannot be reached
	$(BIN)/python -m tests.supply.audit

ages: $(STAMP) ## find pins that are older than a year although a newer release exists (needs the package index)
	$(BIN)/python -m tests.supply.ages

check-kubernetes: $(STAMP) $(CHECKOV) ## render, validate and scan deploy/kubernetes, without a cluster
	$(BIN)/python -m pytest tests/deploy

$(PROTOCOL): tests/protocol/requirements.txt | $(STAMP)
	test -x .venv/protocol/bin/pip || $(BIN)/python -m venv .venv/protocol
	.venv/protocol/bin/pip install --quiet --disable-pip-version-check --requirement tests/protocol/requirements.txt
	@touch $(PROTOCOL)

$(OPENAPI): tests/generated/requirements.txt | $(STAMP)
	test -x .venv/openapi/bin/pip || $(BIN)/python -m venv .venv/openapi
	.venv/openapi/bin/pip install --quiet --disable-pip-version-check --requirement tests/generated/requirements.txt
	@touch $(OPENAPI)

openapi: $(OPENAPI) ## install the generator of Python clients, in an environment of its own

protocol: $(PROTOCOL) ## install the clients of the inference protocol, in an environment of their own

test-interop: $(STAMP) $(PROTOCOL) $(OPENAPI) ## run the clients of Triton and KServe, generated clients, HAProxy and Prometheus (2 minutes)
	INTEROP=1 $(BIN)/python -m pytest tests/protocol tests/generated tests/monitoring tests/client/test_tracing.py

fuzz-protocol: $(STAMP) ## send 20,000 generated bodies of inference requests (2 minutes)
	PROTOCOL_EXAMPLES=20000 $(BIN)/python -m pytest -o timeout=3000 tests/app/http/inference_protocol/test_fuzz.py

format: $(STAMP) ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

secrets: ## make what docker-compose.yml needs and is not there yet: trial certificate, passwords, one API key
	@deploy/secrets

train: $(STAMP) ## train the article's autoencoder on the digit 0, and promote it in var/model_store (DATA_DIR=)
	$(BIN)/python -m training train --recipe article --normal 0 $(if $(DATA_DIR),--data-dir $(DATA_DIR)) --promote \
		--model-store var/model_store

calibration-page: $(STAMP) ## draw the picture and write the table of docs/calibration.md
	$(BIN)/python docs/calibration.py

screenshots: $(STAMP) ## take the pictures of the page for the documentation, with the browser tests
	SCREENSHOTS=1 $(BIN)/python -m pytest tests/browser

constraints: ## write constraints.txt anew from what is installed now
	$(BIN)/pip freeze --exclude-editable | grep -v '^torch==' > constraints.new
	echo 'torch==2.13.0' >> constraints.new
	LC_ALL=C sort -f constraints.new > constraints.txt
	rm constraints.new

bench: $(STAMP) ## measure the service, and write docs/performance.md and benchmarks/report.md (needs wrk; minutes)
	$(BIN)/python -m benchmarks $(BENCH)
	$(BIN)/python -m benchmarks.write_performance

soak: $(STAMP) ## mixed load with faults at random on a service of its own, 30 minutes (SOAK='--seconds 600 --seed 7 --record')
	$(BIN)/python -m tests.soak $(SOAK)

clean: ## remove the environment and everything that was made
	rm -rf .venv var .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis *.egg-info
