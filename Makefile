# make quickstart   a small real model, its data and a first training run; minutes on a CPU
# make check        formatting, lint, types, import law, generated pages and documentation
# make test         every test that needs no GPU, except the slow ones
# make test-all     the slow tests as well
# make venv         .venv with exactly requirements.txt; rebuilt only when that file changes
# make docs         the documentation as HTML in build/site
# make schema       configs/schema.json, from which editors complete and check the YAML files
# make docs-pages   the pages in docs/ that are generated from the code
# make sweep        the missing trials of SWEEP (configs/sweeps/minilm.yaml: hours)
# make bench        the tables of results/bench: an hour on an idle machine
# make bench-gpu    training steps on one GPU in bfloat16 (the 8B geometry needs over 80 GB): minutes
# make bench-peer   the same for the library adapters 1.3.0, in its own environment (.venv-peer)
# make clean        removes .venv, quickstart/, build/ and caches; runs/ stays
#
# PYTHON=… chooses the interpreter (3.11 or newer), VENV=… the folder of the environment, and
# OUTPUT=… the folder of the quickstart's run.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# A run never writes into the folder of an earlier one, so each quickstart gets its own.
OUTPUT ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
# Left alone, `accelerate launch` gives the process a single thread and prints the defaults it took.
THREADS ?= $(shell getconf _NPROCESSORS_ONLN)
ACCELERATE_FLAGS = --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process $(THREADS)

SWEEP ?= configs/sweeps/minilm.yaml

.PHONY: venv quickstart check test test-all docs docs-pages schema sweep bench bench-gpu bench-peer clean

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
	    --no-deps --no-build-isolation --editable .; \
	  cp requirements.txt "$(VENV)/requirements.txt"; \
	fi

quickstart: venv
	@"$(VENV)/bin/python" launch/quickstart_assets.py
	@"$(VENV)/bin/accelerate" launch $(ACCELERATE_FLAGS) launch/train.py --config configs/quickstart.yaml "train.output_dir=$(OUTPUT)"

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
	"$(VENV)/bin/python" -m pytest -m "not gpu" -n 2 --dist loadfile --durations=30

sweep: venv
	@"$(VENV)/bin/python" launch/quickstart_assets.py
	@"$(VENV)/bin/python" launch/sweep.py "$(SWEEP)"

# One thread: what else runs on the machine disturbs least. TABLES= another folder for a second time.
TABLES ?= results/bench
BENCH = OMP_NUM_THREADS=1 "$(VENV)/bin/python" launch/bench.py
OVER_FLOOR = --reference floor --only floor APL "APL, prefix MLP"

bench: venv
	@"$(VENV)/bin/python" launch/quickstart_assets.py
	$(BENCH) inference --rounds 20 --output "$(TABLES)/inference-bert-base.json"
	$(BENCH) inference --geometry bart-large --batch 4 --rounds 10 --only bare APL "APL merged" --output "$(TABLES)/inference-bart-large.json"
	$(BENCH) training --length 32 --rounds 20 --output "$(TABLES)/training-bert-base.json"
	$(BENCH) training --length 128 $(OVER_FLOOR) --output "$(TABLES)/training-bert-base-128.json"
	$(BENCH) training --geometry bart-large --batch 4 --length 32 $(OVER_FLOOR) --output "$(TABLES)/training-bart-large.json"
	$(BENCH) memory --geometry bart-large --length 32 --output "$(TABLES)/memory-bart-large.json"
	$(BENCH) memory --geometry bart-large --output "$(TABLES)/memory-bart-large-128.json"
	$(BENCH) ragged --batch 4 --examples 64 --rounds 5 --output "$(TABLES)/ragged-half.json"
	$(BENCH) ragged --batch 4 --examples 64 --rounds 5 --texts cola ../shared/data/glue quickstart/model --output "$(TABLES)/ragged-cola.json"
	$(BENCH) inference --geometry bert-narrow --batch 1 --length 16 --rounds 50 --output "$(TABLES)/overhead-inference.json"
	$(BENCH) training --geometry bert-narrow --batch 1 --length 16 --rounds 50 $(OVER_FLOOR) --output "$(TABLES)/overhead-training.json"
	$(BENCH) inference --compile --only bare APL "APL merged" --output "$(TABLES)/inference-compiled.json"
	$(BENCH) training --length 32 --compile $(OVER_FLOOR) --output "$(TABLES)/training-compiled.json"

# Four contenders of 8B parameters at once: over 80 GB; fewer with --only.
ON_GPU = "$(VENV)/bin/python" launch/bench.py training --device cuda --dtype bfloat16 --reference floor
FORWARD_ON_GPU = "$(VENV)/bin/python" launch/bench.py inference --device cuda --dtype bfloat16
SHOWN = "full fine-tuning" floor "PEFT LoRA" APL "APL, prefix MLP"

bench-gpu: venv
	$(ON_GPU) --only $(SHOWN) --output "$(TABLES)/gpu/training-bert-base.json"
	$(ON_GPU) --batch 256 --only $(SHOWN) --output "$(TABLES)/gpu/training-bert-base-large-batch.json"
	$(ON_GPU) --geometry bart-large --batch 32 --only $(SHOWN) --output "$(TABLES)/gpu/training-bart-large.json"
	$(ON_GPU) --geometry llama-8b --batch 1 --length 2048 --rounds 7 --only floor "PEFT LoRA" APL "APL, prefix MLP" --output "$(TABLES)/gpu/training-llama-8b.json"
	$(ON_GPU) --compile --only floor APL --output "$(TABLES)/gpu/training-compiled.json"
	$(ON_GPU) --compile reduce-overhead --rounds 30 --only floor APL --output "$(TABLES)/gpu/training-graphs.json"
	$(ON_GPU) --compile reduce-overhead --rounds 30 --only "full fine-tuning" floor "PEFT LoRA" --output "$(TABLES)/gpu/training-graphs-others.json"
	$(FORWARD_ON_GPU) --geometry llama-8b --batch 1 --length 2048 --rounds 10 --only bare lora APL --output "$(TABLES)/gpu/inference-llama-8b.json"
	$(FORWARD_ON_GPU) --geometry bart-large --batch 32 --rounds 30 --only bare APL "APL merged" --output "$(TABLES)/gpu/inference-bart-large.json"

bench-peer: venv
	@if ! cmp -s launch/bench_peer.txt .venv-peer/requirements.txt; then \
	  set -e; rm -rf .venv-peer; "$(PYTHON)" -m venv .venv-peer; \
	  .venv-peer/bin/python -m pip install --quiet --disable-pip-version-check -r launch/bench_peer.txt; \
	  cp launch/bench_peer.txt .venv-peer/requirements.txt; \
	fi
	$(BENCH) training --length 32 --rounds 20 $(OVER_FLOOR) --peer .venv-peer/bin/python --output "$(TABLES)/training-peer.json"
	$(BENCH) inference --only bare APL --peer .venv-peer/bin/python --output "$(TABLES)/inference-peer.json"

docs: venv
	NO_MKDOCS_2_WARNING=1 "$(VENV)/bin/mkdocs" build --strict --quiet

docs-pages: venv
	"$(VENV)/bin/python" docs/tools/generate.py

schema: venv
	"$(VENV)/bin/python" launch/schema.py

clean:
	rm -rf .venv .venv-peer quickstart build .pytest_cache .mypy_cache .ruff_cache \
	  .import_linter_cache scaleup.egg-info
	find scaleup launch tests -name __pycache__ -type d -prune -exec rm -rf {} +
