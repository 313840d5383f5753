"""Kill runs at random moments, continue them, and compare the end with that of a run left alone.

    python -m benchmarks.kill --kills 20 --output results/kill_test.json

A tiny BERT trains on one process, under ZeRO-2 on two, and under ZeRO-3 on two. Each run is killed
(SIGKILL to all its processes) at random moments, every other time while it writes a checkpoint, and
started again with `train.resume=auto` until it finishes. The final weights, the best weights, the
log and the results must equal those of a run that was not killed.
"""

import contextlib
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import psutil
from safetensors.torch import load_file

from benchmarks.cases import ROOT, argument_parser, command, write_result
from scaleup.training.checkpoint import staging_folder, verify
from tests.utils.workspace import environment, losses, make_workspace, overrides

MODES = {
    "one process": [],
    "ZeRO-2 on two": ["train.deepspeed=zero2"],
    "ZeRO-3 on two": ["train.deepspeed=zero3"],
}
# A checkpoint every 5 steps, and 4 steps per epoch: most runs continue in the middle of an epoch.
SCHEDULE = [
    "train.eval_strategy=steps",
    "train.save_strategy=steps",
    "train.eval_steps=5",
    "train.save_steps=5",
    "train.early_stopping_patience=0",
]


def start(arguments: list[str], processes: int, log: pathlib.Path) -> subprocess.Popen:
    """Start launch/train.py; its output is appended to `log`."""
    words = command(ROOT / "launch" / "train.py", arguments, processes)
    return subprocess.Popen(
        words, stdout=log.open("a"), stderr=subprocess.STDOUT, cwd=ROOT, env=environment()
    )


def kill(process: subprocess.Popen) -> None:
    """Send SIGKILL to every process of the job and wait until all have ended."""
    parent = psutil.Process(process.pid)
    processes = [*parent.children(recursive=True), parent]
    for member in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(processes, timeout=30)


def kill_once(
    process: subprocess.Popen, out: pathlib.Path, in_save: bool, generator: random.Random
) -> str | None:
    """Kill the run at a random moment after its next checkpoint, or while it writes one.

    Returns:
        "in a save" or "between saves"; None if the run ended first.
    """
    checkpoints_before = len(list(out.glob("checkpoint-*")))
    delay = generator.uniform(0, 3)
    deadline = None
    while process.poll() is None:
        saving = out.is_dir() and any(out.glob(staging_folder(out / "checkpoint-*").name))
        if in_save and saving:
            time.sleep(generator.uniform(0, 0.05))
            kill(process)
            return "in a save"
        checkpoints = len(list(out.glob("checkpoint-*")))
        progressed = (out / "log.jsonl").exists() and checkpoints != checkpoints_before
        if not in_save and deadline is None and progressed:
            deadline = time.monotonic() + delay
        if deadline is not None and time.monotonic() > deadline:
            kill(process)
            return "in a save" if saving else "between saves"
        time.sleep(0.002)
    return None


def compare(one: pathlib.Path, other: pathlib.Path, tolerance: float) -> dict[str, object]:
    """Return the largest differences of weights and losses, and whether the results are equal."""
    weights = 0.0
    for name in ("final", "best"):
        verify(one / name)
        verify(other / name)
        a, b = (load_file(run / name / "adapter_model.safetensors") for run in (one, other))
        assert a.keys() == b.keys()
        weights = max([weights, *((a[key] - b[key]).abs().max().item() for key in a)])
    assert losses(one, "step") == losses(other, "step")
    loss = max(abs(a - b) for a, b in zip(losses(one), losses(other), strict=True))
    results = [json.loads((run / "results.json").read_text()) for run in (one, other)]
    equal = results[0] == results[1]
    passed = weights <= tolerance and loss <= tolerance and equal
    return {"weights": weights, "losses": loss, "results_equal": equal, "passed": passed}


def kill_test(
    workspace: pathlib.Path,
    folder: pathlib.Path,
    mode: str,
    kills: int,
    seed: int,
    epochs: int = 24,
) -> dict[str, object]:
    """Test one of `MODES`: run once without kills and once with `kills` kills, and compare."""
    generator = random.Random(seed)
    processes = 1 if mode == "one process" else 2
    settings = [
        *MODES[mode],
        *SCHEDULE,
        f"train.num_train_epochs={epochs}",
        f"train.per_device_train_batch_size={16 // processes}",
    ]
    name = mode.replace(" ", "_")
    whole, killed = folder / f"{name}_whole", folder / f"{name}_killed"
    whole_log, killed_log = folder / f"{name}_whole.log", folder / f"{name}_killed.log"
    assert start(overrides(workspace, whole, *settings), processes, whole_log).wait() == 0
    words = [*overrides(workspace, killed, *settings), "train.resume=auto"]
    hits: list[str] = []
    while True:
        process, hit = start(words, processes, killed_log), None
        if len(hits) < kills:
            hit = kill_once(process, killed, len(hits) % 2 == 0, generator)
        if hit is None:
            assert process.wait() == 0, killed_log.read_text()[-3000:]
            break
        hits.append(hit)
    counts = {place: hits.count(place) for place in sorted(set(hits))}
    tolerance = 0.0 if processes == 1 else 1e-6
    return {"mode": mode, "killed": counts, **compare(whole, killed, tolerance)}


def main() -> int:
    """Test all modes; return 1 if one of them failed."""
    parser = argument_parser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="the sum over all modes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    third = options.kills // 3
    rows = []
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        folder = pathlib.Path(name)
        workspace = make_workspace(folder)
        for mode, kills in zip(MODES, [options.kills - 2 * third, third, third]):
            rows.append(kill_test(workspace, folder, mode, kills, options.seed))
            print(rows[-1], flush=True)
            write_result(options.output, rows)
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
