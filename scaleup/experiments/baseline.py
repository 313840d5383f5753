"""Run the steps of the baseline library, `adapters`, in a process with its own environment."""

import json
import pathlib
import subprocess
import tempfile
from typing import Any

import torch

from scaleup.errors import ConfigError, RunError
from scaleup.experiments import timing
from scaleup.experiments.batches import Batch
from scaleup.experiments.variants import BenchOptions, Variant

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "baseline_library.py"


def start(python: str, words: list[str], batches: object) -> tuple[Any, dict[str, Any]]:
    """Start benchmarks/baseline_library.py in the environment of the baseline library.

    Args:
        python: the interpreter of the environment.
        words: arguments of the script, without the file of the batches.
        batches: what the script reads from that file.

    Returns:
        The process, and the first line of its output, which is JSON.
    """
    if not SCRIPT.exists():
        raise ConfigError("--baseline works only in a checkout of the repository")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = f"{folder}/batch.pt"
        torch.save(batches, file)
        command = [python, str(SCRIPT), *words, file]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        try:
            process: Any = subprocess.Popen(command, **pipes)
            answer = process.stdout.readline()
        except OSError as error:
            answer, reason = "", error.strerror
        else:
            reason = "its output says why"
    if not answer:
        raise ConfigError(
            f"--baseline: {python} cannot run {SCRIPT.name} ({reason}); "
            "`make bench-baseline` creates an environment for it"
        )
    return process, json.loads(answer)


def create_variants(options: BenchOptions, batch: Batch) -> dict[str, Variant]:
    """Start the process of the baseline library, which works on a step when it is told to."""
    words = [options.what, "--geometry", options.geometry]
    process, trained = start(str(options.baseline), words, batch)

    def worker(name: str) -> timing.Worker:
        def resume() -> tuple[bool, float]:
            process.stdin.write(name + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise RunError("--baseline: the process has ended; its last output says why")
            return tuple(json.loads(answer))

        return resume

    return {name: Variant(worker(name), n, None) for name, n in trained.items()}
