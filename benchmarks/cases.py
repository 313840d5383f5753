"""Runs several configs one after another in the same processes, so that start-up is paid once.

    torchrun --nproc_per_node 2 launch/cases.py CASES.json

CASES.json: {"name": ["section.key=value", …], …}, or ["file.yaml", "section.key=value", …]. Every process runs every case; the
first one writes CASES.done.json: name → null, or the message of the error that ended the case. An error that is not ours stops
everything.
"""

import gc
import json
import os
import pathlib
import random
import subprocess
import sys
from collections.abc import Callable, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from scaleup import errors
from scaleup.errors import CheckpointError, RunError
from scaleup.settings import schema as config
from scaleup.training import distributed as runtime
from scaleup.training import run as train
from scaleup.training.preflight import CHECKS


def command(script: pathlib.Path, arguments: Sequence[str], processes: int) -> list[str]:
    """The script with its arguments, under torchrun if there are several processes."""
    port = str(random.randint(20000, 32000))  # below those that Linux hands out itself
    launcher = (
        ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
        if processes > 1
        else []
    )
    return [sys.executable, *launcher, str(script), *arguments]


def start_cases(
    cases: dict[str, list[str]], path: pathlib.Path, processes: int, **options
) -> dict[str, str | None]:
    """`run_cases` in processes of their own. path: of a JSON file to write. options: of subprocess.run.

    Raises CalledProcessError if they fail otherwise than by refusing.
    """
    path.write_text(json.dumps(cases), encoding="utf-8")
    subprocess.run(command(pathlib.Path(__file__), [str(path)], processes), check=True, **options)
    return json.loads(path.with_suffix(".done.json").read_text(encoding="utf-8"))


def run_cases(
    cases: dict[str, list[str]],
    callbacks: Callable[[str], Sequence[TrainerCallback]] = lambda name: (),
) -> dict[str, str | None]:
    """name → None, or what was refused. callbacks: those of each case."""
    results: dict[str, str | None] = {}
    for name, overrides in cases.items():
        AcceleratorState._reset_state(reset_partial_state=True)  # the last case: DDP or DeepSpeed
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        try:
            path = next((word for word in overrides[:1] if word.endswith(".yaml")), None)
            train.run(
                config.load(path, overrides[1:] if path else overrides, checks=CHECKS),
                callbacks(name),
            )
            results[name] = None
        except (errors.ConfigError, RunError, CheckpointError) as error:
            results[name] = str(error)
        gc.collect()  # engines hold cycles
    return results


def main() -> None:
    """Command line."""
    path = pathlib.Path(sys.argv[1])
    results = run_cases(json.loads(path.read_text(encoding="utf-8")))
    if os.environ.get("RANK", "0") == "0":
        path.with_suffix(".done.json").write_text(
            json.dumps(results, indent=1) + "\n", encoding="utf-8"
        )
    runtime.leave()


if __name__ == "__main__":
    main()
