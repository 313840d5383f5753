# make quickstart   model, data and a first training run in a few minutes of CPU
# make test         every test but those that need a GPU and long ones whose subject another test shows as well (`slow`)
# make test-all     those too
# make venv         .venv with exactly requirements.txt; made anew only when that file changes
# make sweep        every run of SWEEP (configs/sweeps/minilm.yaml: hours) that is not there yet; started again, it goes on
# make bench        the tables of results/bench: inference, training, padding, memory, compiled; an idle machine, an hour
# make bench-gpu    training steps on one GPU (the 8B geometry: over 80 GB), bfloat16: minutes
# make bench-peer   the same with the library adapters 1.3.0, in an environment of its own (.venv-peer)
# make schema       configs/schema.json, from which editors complete and check the YAML files
# make clean        removes .venv, quickstart/ and caches; runs/ stays
#
# PYTHON=… chooses the interpreter (3.11 or newer), VENV=… another place for the environment, OUTPUT=… the folder of the run.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# A run never writes into the folder of an earlier one, so each quickstart gets its own.
OUTPUT ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
# Left alone, `accelerate launch` gives the process a single thread and prints the defaults it took.
THREADS ?= $(shell getconf _NPROCESSORS_ONLN)
ACCELERATE_FLAGS = --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process $(THREADS)

SWEEP ?= configs/sweeps/minilm.yaml

.PHONY: venv quickstart test test-all sweep bench bench-gpu bench-peer schema clean

# Names are quoted and compared in the shell, not as make targets, so that paths may have spaces. The copy of requirements.txt is
# written last: an interrupted installation is taken up again. Only an environment made here is ever cleared.
venv:
	@if ! cmp -s requirements.txt "$(VENV)/requirements.txt"; then \
	  set -e; \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed: make PYTHON=…" >&2; exit 2; }; \
	  if [ -f "$(VENV)/requirements.txt" ]; then clear=--clear; else clear=; fi; \
	  echo "installing requirements.txt into $(VENV) (minutes, about 2 GB) …"; \
	  "$(PYTHON)" -m venv $$clear "$(VENV)"; \
	  "$(VENV)/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt; \
	  cp requirements.txt "$(VENV)/requirements.txt"; \
	fi

quickstart: venv
	@"$(VENV)/bin/python" launch/quickstart_assets.py
	@"$(VENV)/bin/accelerate" launch $(ACCELERATE_FLAGS) launch/train.py --config configs/quickstart.yaml "train.output_dir=$(OUTPUT)"

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

schema: venv
	"$(VENV)/bin/python" launch/schema.py

clean:
	rm -rf .venv .venv-peer quickstart build .pytest_cache scaleup.egg-info
	find scaleup launch tests -name __pycache__ -type d -prune -exec rm -rf {} +
