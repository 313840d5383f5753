"""No input whatever ends in a traceback, takes longer than 20 seconds, or prints more than 2 KB.

With the 1,200 configs of tests/unit/settings/test_config_fuzz.py these are 2,000 mutations. The
slow test tries ten times as many.
"""

import json
import pathlib
import random
import shutil
import time
from collections.abc import Callable

import pytest
import torch

from scaleup.backbone import loading
from scaleup.backbone.method import load_run_model
from scaleup.cli import bench as bench_command
from scaleup.cli import entry
from scaleup.data import tasks
from scaleup.errors import CheckpointError, ConfigError
from scaleup.settings import schema
from scaleup.settings.data import DataSettings
from scaleup.training.checkpoint import verify
from scaleup.training.deepspeed_file import deepspeed_problems
from scaleup.training.preflight import CHECKS
from tests.utils.mutations import WORDS, make_odd_files, mutated_bytes, mutated_json
from tests.utils.workspace import ROOT, make_workspace, overrides

CHECKPOINT = ROOT / "tests" / "fixtures" / "format_0_1" / "best"
SECONDS = 20


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def arguments(rng: random.Random, workspace: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Return a command line, mostly with a mistake, that starts no work where it has none."""
    run = overrides(workspace, folder / "run")
    commands = {
        "train": ["--print-config", "--config", "empty", *run],
        "plan": ["--config", "empty", "--world", "2", "--gpu-memory", "24GiB", *run],
        "export": ["--checkpoint", "folder", "--output", "out", "--kind", "exact"],
        "sweep": ["sweep.yaml", "--dry-run", "--jobs", "1", "--shard", "1/2", "data.k=64"],
        "report": ["table1", "--runs", "folder", "--output", "out"],
        "bench": ["inference", "--batch", "1", "--length", "8", "--rounds", "1"],
        "schema": ["--output", "schema.json"],
    }
    name = rng.choice(list(commands))
    words = commands[name]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(words) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            words.insert(at, rng.choice(WORDS))
        elif kind == 1 and at < len(words):
            del words[at]
        elif kind == 2 and at < len(words):
            key, equals, _ = words[at].partition("=")
            words[at] = f"{key}={rng.choice(WORDS)}" if equals else rng.choice(WORDS)
        elif at < len(words):
            words[at] = words[at][:-1] + rng.choice(["", "x", "\n", "é"])
    if name == "train" and "--print-config" not in words:
        words.insert(0, "--print-config")
    if name == "sweep" and "--dry-run" not in words:
        words.insert(0, "--dry-run")
    return [rng.choice([name] * 20 + WORDS), *words]


def try_arguments(rng, workspace, folder) -> tuple[str, int]:
    words = arguments(rng, workspace, folder)
    try:
        code = entry.main(words)
    except SystemExit as ended:
        code = ended.code or 0
    assert code in (0, 1, 2), words
    return f"{words}", code


def try_model(rng, workspace, folder) -> tuple[str, int]:
    name = rng.choice(["bert", "bart"])
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(workspace / name, model)
    path = rng.choice(sorted(model.iterdir()))
    kind = rng.randrange(4)
    if kind == 0 or path.suffix != ".json":
        path.write_bytes(mutated_bytes(rng, path.read_bytes()))
    elif kind == 1:
        path.unlink()
        shutil.copy(folder / rng.choice(["empty", "pointer", "binary"]), path)
    else:
        path.write_text(mutated_json(rng, json.loads(path.read_text())))
    words = overrides(workspace, folder / "run", f"model.name={model}")

    def prepare() -> None:
        settings = schema.load(None, words, checks=CHECKS)
        config = loading.load_config(settings.model)
        auto = tasks.of(settings.data).auto
        load_run_model(settings, config, auto, ["bad", "good"], torch.device("cpu"))

    return path.name, refusal(prepare)


def try_deepspeed(rng, workspace, folder) -> tuple[str, int]:
    preset = ROOT / "scaleup" / "settings" / "deepspeed" / "zero3_offload.json"
    text = mutated_json(rng, json.loads(preset.read_text()))
    content = text.encode("utf-8", "surrogatepass")
    content = mutated_bytes(rng, content) if rng.random() < 0.3 else content
    (folder / "zero.json").write_bytes(content)
    problems = deepspeed_problems(str(folder / "zero.json"))
    return text, report(problems)


def try_data(rng, workspace, folder) -> tuple[str, int]:
    suffix = rng.choice(["csv", "jsonl"])
    rows = [{"text": f"good film {i}", "label": "pos" if i % 2 else "neg"} for i in range(8)]
    if suffix == "csv":
        content = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)
    else:
        content = "".join(mutated_json(rng, row) + "\n" for row in rows)
    file = folder / f"data.{suffix}"
    file.write_bytes(mutated_bytes(rng, content.encode("utf-8", "surrogatepass")))
    task = rng.choice(["sequence_classification", "regression", "causal_lm"])
    target = "target_column" if task == "causal_lm" else "label_column"
    data = DataSettings(train_file=str(file), task=task, dev_size=2, **{target: "label"})
    return content, report(tasks.check({"data": data}))


def try_checkpoint(rng, workspace, folder) -> tuple[str, int]:
    best = folder / "best"
    shutil.rmtree(best, ignore_errors=True)
    shutil.copytree(CHECKPOINT, best)
    path = rng.choice(sorted(best.iterdir()))
    if path.suffix == ".json" and rng.random() < 0.5:
        path.write_text(mutated_json(rng, json.loads(path.read_text())))
    else:
        path.write_bytes(mutated_bytes(rng, path.read_bytes()))
    return path.name, refusal(lambda: verify(best))


def refusal(check: Callable) -> int:
    """Return 2 if an input is refused in words, and 0 if it is accepted."""
    try:
        check()
    except ConfigError as error:
        return report(error.problems)
    except CheckpointError as error:
        return report([str(error)])
    return 0


def report(problems: list[str]) -> int:
    assert all(isinstance(problem, str) and problem.strip() for problem in problems)
    assert all(len(problem) < 2000 for problem in problems), max(problems, key=len)
    return 2 if problems else 0


KINDS = {try_arguments: 300, try_model: 120, try_deepspeed: 120, try_data: 160, try_checkpoint: 100}


def fuzz(attempt, seed: int, count: int, workspace, folder, monkeypatch, capfd) -> None:
    make_odd_files(folder)
    monkeypatch.chdir(folder)
    # What a command does after its arguments are checked is not of interest here.
    monkeypatch.setattr("scaleup.memory.plan.make_plan", nothing)
    monkeypatch.setattr("scaleup.memory.report.table", lambda made: [])
    monkeypatch.setattr("scaleup.memory.report.as_json", lambda made: {})
    monkeypatch.setattr("scaleup.experiments.bench.run", nothing)
    for name, value in bench_command.STEADY_ALLOCATOR.items():
        monkeypatch.setenv(name, value)  # or bench would start the tests anew
    rng, outcomes = random.Random(seed), set()
    for _ in range(count):
        (folder / "schema.json").unlink(missing_ok=True)
        begin = time.process_time()
        what, outcome = attempt(rng, workspace, folder)
        assert time.process_time() - begin < SECONDS, what
        error = capfd.readouterr().err
        message = error.partition("error: ")[2] or error
        assert "Traceback" not in error and len(message.encode()) <= 2048, (what, error[:3000])
        outcomes.add(outcome != 0)
    assert outcomes == {True, False} or attempt is try_checkpoint, "only one side was tried"


class nothing:
    """Take any arguments and do nothing."""

    fits = True

    def __init__(self, *_: object, **__: object):
        pass


def test_there_are_two_thousand_mutations():
    assert sum(KINDS.values()) + 30 * 40 == 2000


@pytest.mark.parametrize("attempt", KINDS, ids=lambda attempt: attempt.__name__)
def test_no_input_ends_in_a_traceback(attempt, workspace, tmp_path, monkeypatch, capfd):
    fuzz(attempt, 0, KINDS[attempt], workspace, tmp_path, monkeypatch, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("attempt", KINDS, ids=lambda attempt: attempt.__name__)
def test_nor_do_many_more_inputs(attempt, seed, workspace, tmp_path, monkeypatch, capfd):
    fuzz(attempt, seed, KINDS[attempt], workspace, tmp_path, monkeypatch, capfd)
