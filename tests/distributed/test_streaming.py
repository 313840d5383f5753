"""A run on a stream of rows: the same with any number of processes, and after a stop."""

import json
import subprocess
import sys

import pytest

from benchmarks.cases import start_cases
from tests.utils.workspace import ROOT, add_writer, environment, losses, writing

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
# 12 steps of 16 rows take more than one pass over the 120 rows.
SHARED = (
    "data.streaming=true",
    "data.shuffle_buffer=32",
    "data.k=all",
    "train.eval_strategy=steps",
    "train.eval_steps=3",
    "train.lr_scheduler_type=constant",
    "train.resume=auto",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs `one` without a stop, and `parts` that continues with two processes after 9 steps."""
    folder = tmp_path_factory.mktemp("streaming")
    add_writer(folder, "llama")

    def words(name: str, steps: int, *more: str) -> list[str]:
        common = [
            word
            for word in writing(folder, folder / name, "llama", "causal_lm", *SHARED, *more)
            if not word.startswith(("train.num_train_epochs", "data.dev_size", "data.k=64"))
        ]
        return [
            *common,
            f"data.validation_file={folder / 'pairs_test.jsonl'}",
            f"data.test_file={folder / 'chats_test.jsonl'}",
            f"train.max_steps={steps}",
        ]

    rows = [json.loads(line) for line in (folder / "pairs_test.jsonl").read_text().splitlines()]
    lines = [json.dumps(row) + "\n" for row in rows[:24]]
    (folder / "pairs_test.jsonl").write_text("".join(lines))
    (folder / "chats_test.jsonl").write_text("".join(lines[:8]))
    path = folder / "cases.json"
    for processes, cases in (
        (1, {"one": (12, 16), "parts": (9, 16), "packed": (3, 16)}),
        (1, {"dropout": (12, 16), "dropout-parts": (9, 16)}),
        (1, {"dropout-parts": (12, 16)}),
        (2, {"parts": (12, 8), "packed-two": (3, 8)}),
    ):
        words_by_name = {
            name: words(
                name,
                steps,
                f"train.per_device_train_batch_size={batch}",
                *(["data.packing=true", "data.max_length=24"] if "packed" in name else []),
                *(["method.lora_dropout=0.2"] if "dropout" in name else []),
            )
            for name, (steps, batch) in cases.items()
        }
        found = start_cases(words_by_name, path, processes, timeout=500, env=environment())
        assert found == dict.fromkeys(words_by_name), found
    return folder


def test_a_run_continues_in_the_second_pass_with_two_processes(runs):
    one, parts = runs / "one", runs / "parts"
    assert losses(one, "step") == losses(parts, "step")
    assert losses(parts) == pytest.approx(losses(one), abs=1e-5)
    assert losses(parts, "eval_loss") == pytest.approx(losses(one, "eval_loss"), abs=1e-5)
    results = json.loads((one / "results.json").read_text())
    assert results["examples"] == {"train": None, "dev": 24, "test": 8}
    assert results["steps"] == 12


def test_a_run_with_dropout_continues_exactly(runs):
    assert losses(runs / "dropout-parts") == losses(runs / "dropout") != losses(runs / "one")


def test_a_streamed_run_is_exported(runs, tmp_path):
    words = ["--checkpoint", str(runs / "parts" / "best"), "--output", str(tmp_path / "export")]
    done = subprocess.run(
        [sys.executable, "-m", "scaleup", "export", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "- train: own file, read as a stream" in (tmp_path / "export/README.md").read_text()


def test_packed_rows_are_the_same_on_two_processes(runs):
    assert losses(runs / "packed-two") == pytest.approx(losses(runs / "packed"), abs=1e-5)
