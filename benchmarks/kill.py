"""Kills runs and starts them again: is the end the same as without?

    python -m tests.kill --kills 20 --output results/kill_test.json

A tiny BERT trains on one process, under ZeRO-2 and under ZeRO-3 on two. Each is killed (SIGKILL, every process at once) at
random moments, every other time while a checkpoint is being written, and started again with `train.resume=auto` until it
finishes. Then final weights, best weights, the log and the results are compared with those of a run that was left alone.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import psutil
from safetensors.torch import load_file

from benchmarks.cases import command
from scaleup.training.checkpoint import verify
from tests.utils.workspace import ROOT, environment, losses, make_workspace, overrides

MODES = {
    "one process": [],
    "ZeRO-2 on two": ["train.deepspeed=zero2"],
    "ZeRO-3 on two": ["train.deepspeed=zero3"],
}


def start(arguments: list[str], processes: int, log: pathlib.Path) -> subprocess.Popen:
    """launch/train.py, under torchrun if there are two processes."""
    words = command(ROOT / "launch" / "train.py", arguments, processes)
    return subprocess.Popen(
        words, stdout=log.open("a"), stderr=subprocess.STDOUT, cwd=ROOT, env=environment()
    )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to every process of the job."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()
    psutil.wait_procs(family, timeout=30)


def kill_once(
    process: subprocess.Popen, out: pathlib.Path, in_save: bool, draw: random.Random
) -> str | None:
    """Waits for the moment and kills; where it hit. None if the run ended first."""
    finished = len(list(out.glob("checkpoint-*")))
    waits = draw.uniform(0, 3)
    moment = None
    while process.poll() is None:
        drafts = list(out.glob(".checkpoint-*.draft")) if out.is_dir() else []
        if in_save and drafts:
            time.sleep(draw.uniform(0, 0.05))
            kill(process)
            return "in a save"
        if (
            not in_save
            and moment is None
            and (out / "log.jsonl").exists()
            and len(list(out.glob("checkpoint-*"))) != finished
        ):
            moment = time.monotonic() + waits  # progress was made: from here on, any moment
        if moment is not None and time.monotonic() > moment:
            kill(process)
            return "in a save" if drafts else "between saves"
        time.sleep(0.002)
    return None


def same(one: pathlib.Path, other: pathlib.Path, tolerance: float) -> dict[str, object]:
    """Largest difference of weights, logged losses and results."""
    worst = 0.0
    for bundle in ("final", "best"):
        verify(one / bundle), verify(other / bundle)
        a, b = (load_file(run / bundle / "adapter_model.safetensors") for run in (one, other))
        assert a.keys() == b.keys()
        worst = max([worst, *((a[name] - b[name]).abs().max().item() for name in a)])
    assert losses(one, "step") == losses(other, "step")
    loss = max(abs(a - b) for a, b in zip(losses(one), losses(other), strict=True))
    results = json.loads((one / "results.json").read_text()) == json.loads(
        (other / "results.json").read_text()
    )
    return {
        "weights": worst,
        "losses": loss,
        "results_equal": results,
        "passed": worst <= tolerance and loss <= tolerance and results,
    }


def kill_test(
    workspace: pathlib.Path,
    folder: pathlib.Path,
    mode: str,
    kills: int,
    seed: int,
    epochs: int = 24,
) -> dict[str, object]:
    """One mode: the uninterrupted run, the killed one, and how far apart they end."""
    draw = random.Random(seed)
    processes = 1 if mode == "one process" else 2
    name = mode.replace(" ", "_")
    # Checkpoints every 5 steps, 4 steps to an epoch: most resumes are in the middle of one.
    every = [f"train.{kind}_strategy=steps" for kind in ("eval", "save")] + [
        "train.eval_steps=5",
        "train.save_steps=5",
    ]
    settings = [
        *MODES[mode],
        *every,
        f"train.num_train_epochs={epochs}",
        "train.per_device_train_batch_size=" + str(16 // processes),
        "train.early_stopping_patience=0",
    ]
    whole, killed = folder / f"{name}_whole", folder / f"{name}_killed"
    assert (
        start(
            overrides(workspace, whole, *settings), processes, folder / f"{name}_whole.log"
        ).wait()
        == 0
    )
    hits: list[str] = []
    while True:
        process = start(
            [*overrides(workspace, killed, *settings), "train.resume=auto"],
            processes,
            folder / f"{name}_killed.log",
        )
        hit = kill_once(process, killed, len(hits) % 2 == 0, draw) if len(hits) < kills else None
        if hit is None:
            assert process.wait() == 0, (folder / f"{name}_killed.log").read_text()[-3000:]
            break
        hits.append(hit)
    return {
        "mode": mode,
        "killed": {place: hits.count(place) for place in sorted(set(hits))},
        **same(whole, killed, 0.0 if processes == 1 else 1e-6),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--kills", type=int, default=20, help="over all modes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        folder = pathlib.Path(name)
        workspace = make_workspace(folder)
        shares = [options.kills - 2 * (options.kills // 3), options.kills // 3, options.kills // 3]
        rows = []
        for mode, share in zip(MODES, shares):
            rows.append(kill_test(workspace, folder, mode, share, options.seed))
            print(rows[-1], flush=True)
            options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.exit(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    main()
