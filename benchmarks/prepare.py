"""Measure how long data takes to prepare, and the memory of a process that trains on it.

    python -m benchmarks.prepare --model models/smollm2 --output results/bench/prepare.json

The data are synthetic chats of two questions and two answers, about 230 tokens each. `scaleup
prepare` reads, checks and tokenises them. Then another process, like a rank of a run, maps the
result and reads every example once, in the order of an epoch. Memory is what the kernel counts for
a process: private (RssAnon) and mapped files (RssFile), which processes share.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

import psutil

from benchmarks.cases import ROOT, argument_parser, write_result

COUNTS = (40_000, 200_000)
WORDS = ["river", "house", "light", "green", "between", "mountain", "carry", "seven", "quiet"]
WORDS += ["winter", "paper", "garden", "answer", "simple", "window", "the", "a", "of", "and", "to"]


def write_chats(path: pathlib.Path, count: int) -> None:
    """Write chats of four turns as JSON lines."""
    draw = random.Random(0)

    def sentence(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=words)).capitalize() + "."

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            lengths = (("user", 30), ("assistant", 60)) * 2
            turns = [{"role": role, "content": sentence(words)} for role, words in lengths]
            file.write(json.dumps({"messages": turns}) + "\n")


def _settings(work: pathlib.Path, count: int, model: str) -> list[str]:
    return [
        f"model.name={model}",
        "data.task=causal_lm",
        f"data.train_file={work}/chats-{count}.jsonl",
        "data.messages_column=messages",
        "data.max_length=512",
        f"data.cache_dir={work}/cache",
    ]


def _memory(process: psutil.Process) -> dict[str, float]:
    """Return the private and the mapped memory of a process, MB."""
    fields = {}
    for line in pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            fields[name] = int(value.split()[0]) * 1024 / 1e6
    return {"private": fields["RssAnon"], "mapped": fields["RssFile"]}


def measure_preparation(work: pathlib.Path, count: int, model: str) -> dict[str, Any]:
    """Time `scaleup prepare`, and return the most memory of its main process and of a worker."""
    command = [sys.executable, "-m", "scaleup", "prepare", *_settings(work, count, model)]
    before, begin = os.times(), time.perf_counter()
    main = psutil.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    peak = {"main": 0.0, "worker": 0.0}
    while main.poll() is None:
        try:
            peak["main"] = max(peak["main"], _memory(main)["private"])
            for child in main.children():
                peak["worker"] = max(peak["worker"], _memory(child)["private"])
        except (psutil.Error, OSError, KeyError):  # a process has just ended
            pass
        time.sleep(0.1)
    seconds, after = time.perf_counter() - begin, os.times()
    if main.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    cpu = sum(after[2:4]) - sum(before[2:4])
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_private_mb": {name: round(value) for name, value in peak.items()},
    }


RANK = """
import json, sys
import psutil
import scaleup.training.run  # everything that a run imports
from benchmarks.prepare import _memory
from scaleup.backbone.lengths import fit_length
from scaleup.backbone.loading import load_config
from scaleup.backbone.tokenizer import load_tokenizer
from scaleup.data import tasks
from scaleup.settings.schema import load
from scaleup.training.preparation import prepare
from scaleup.training.sampler import ResumableSampler
from torch.utils.data import DataLoader
settings = load(None, sys.argv[1:])
config = load_config(settings.model)
tokenizer = load_tokenizer(settings.model, config)
here = psutil.Process()
before = _memory(here)
examples, tokenizer = prepare(fit_length(settings, config), config)
ready = _memory(here)
rows = examples.train
sampler = ResumableSampler(len(rows), 42, lambda: 0, rows["length"][:], 16)
collate = tasks.of(settings.data).module.collator(tokenizer, settings.data)
tokens = 0
for batch in DataLoader(rows, batch_size=16, sampler=sampler, collate_fn=collate):
    tokens += int(batch["attention_mask"].sum())
print(json.dumps([len(rows), tokens, before, ready, _memory(here)]))
"""


def measure_rank(work: pathlib.Path, count: int, model: str) -> dict[str, Any]:
    """Return the memory that prepared data adds to a process that reads it once."""
    command = [sys.executable, "-c", RANK, *_settings(work, count, model)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    rows, tokens, before, ready, after = json.loads(done.stdout.splitlines()[-1])
    return {
        "examples": rows,
        "tokens": tokens,
        "without_data_mb": {name: round(value) for name, value in before.items()},
        "added_when_mapped_mb": {name: round(ready[name] - before[name]) for name in ready},
        "added_after_an_epoch_mb": {name: round(after[name] - before[name]) for name in after},
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="models/smollm2", help="folder with a chat template")
    parser.add_argument("--chats", type=int, nargs="+", default=COUNTS, metavar="N")
    options = parser.parse_args()
    model, results = str(pathlib.Path(options.model).resolve()), {}
    for count in options.chats:
        with tempfile.TemporaryDirectory() as folder:
            work = pathlib.Path(folder)
            write_chats(work / f"chats-{count}.jsonl", count)
            results[str(count)] = {
                "prepare": measure_preparation(work, count, model),
                "rank": measure_rank(work, count, model),
            }
        machine = {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)}
        write_result(options.output, {"machine": machine, "chats": results})


if __name__ == "__main__":
    main()
