"""Shared helpers of the benchmarks, and a worker that runs several configs in the same processes.

    torchrun --nproc_per_node 2 -m benchmarks.cases CASES.json

Start-up is paid once for all configs. CASES.json: {"name": ["section.key=value", …], …}; the first
word may be a YAML file. Every process runs every case, and rank 0 writes CASES.done.json: name →
null, or the message of the error that ended the case. An error that scaleup does not report itself
stops everything.
"""

import argparse
import gc
import json
import os
import pathlib
import random
import subprocess
import sys
from collections.abc import Callable, Sequence

from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from scaleup.errors import ScaleupError
from scaleup.settings import schema
from scaleup.training import distributed, run
from scaleup.training.preflight import CHECKS

ROOT = pathlib.Path(__file__).resolve().parents[1]


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Create the command line of a benchmark, with its docstring and the option --output."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=pathlib.Path, required=True, help="where results go")
    return parser


def write_result(path: pathlib.Path, content: object) -> None:
    """Write a result file, and its folder if that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def command(target: pathlib.Path | str, arguments: Sequence[str], processes: int) -> list[str]:
    """Return the command that starts a script or module, under torchrun for several processes.

    Args:
        target: the path of a script, or the name of a module.
    """
    launcher = []
    if processes > 1:
        port = str(random.randint(20000, 32000))  # Linux assigns only higher ports itself
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launcher += ["--master_port", port]
    words = ["-m", target] if isinstance(target, str) else [str(target)]
    return [sys.executable, *launcher, *words, *arguments]


def start_cases(
    cases: dict[str, list[str]], path: pathlib.Path, processes: int, **options
) -> dict[str, str | None]:
    """Run the cases in processes of their own.

    Args:
        path: a JSON file to write the cases into.
        options: arguments of subprocess.run.

    Returns:
        For each case None, or the message of the error that ended it.

    Raises:
        CalledProcessError: the processes failed with an unexpected error.
    """
    path.write_text(json.dumps(cases), encoding="utf-8")
    words = command("benchmarks.cases", [str(path)], processes)
    subprocess.run(words, check=True, cwd=ROOT, **options)
    return json.loads(path.with_suffix(".done.json").read_text(encoding="utf-8"))


def run_cases(
    cases: dict[str, list[str]],
    callbacks: Callable[[str], Sequence[TrainerCallback]] = lambda name: (),
) -> dict[str, str | None]:
    """Run the cases in this process, each with the callbacks that `callbacks(name)` returns.

    Returns:
        For each case None, or the message of the error that ended it.
    """
    results: dict[str, str | None] = {}
    for name, words in cases.items():
        AcceleratorState._reset_state(reset_partial_state=True)  # cases use DDP or DeepSpeed
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        file = words[0] if words and words[0].endswith(".yaml") else None
        try:
            overrides = words[1:] if file else words
            run.run(schema.load(file, overrides, checks=CHECKS), callbacks(name))
            results[name] = None
        except ScaleupError as error:
            results[name] = str(error)
        gc.collect()  # DeepSpeed engines have reference cycles
    return results


def main() -> None:
    """Run the cases of a file in this process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    path = pathlib.Path(sys.argv[1])
    results = run_cases(json.loads(path.read_text(encoding="utf-8")))
    if os.environ.get("RANK", "0") == "0":
        write_result(path.with_suffix(".done.json"), results)
    distributed.leave()


if __name__ == "__main__":
    main()
