"""Runs of token classification, multi-label classification and question answering."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from benchmarks.cases import start_cases
from scaleup.data.metrics import answer_scores, entity_scores
from scaleup.errors import ConfigError, Preempted
from scaleup.export import export
from scaleup.export.report import ExportOptions
from scaleup.memory.plan import make_plan
from scaleup.settings import schema as config
from scaleup.training import run as train
from scaleup.training.preflight import CHECKS
from tests.utils.tasks import MAKERS, task_overrides, write_task
from tests.utils.workspace import ROOT, add_writer, environment, losses, make_workspace

TASKS = list(MAKERS)
# The head of a text reads the first token only, which learns more slowly.
EPOCHS = {"token_classification": 5, "question_answering": 5, "multi_label_classification": 24}
LEARNT = {"token_classification": 0.9, "question_answering": 0.8, "multi_label_classification": 0.7}
SHORT = ("train.max_steps=6", "train.eval_strategy=steps", "train.eval_steps=3")
every_task = pytest.mark.parametrize("task", TASKS)
# One task by default, whose labels differ most from those of a classification.
mostly_slow = pytest.mark.parametrize(
    "task",
    [
        "question_answering",
        pytest.param("token_classification", marks=pytest.mark.slow),
        pytest.param("multi_label_classification", marks=pytest.mark.slow),
    ],
)

pytestmark = pytest.mark.usefixtures("signal_handlers")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    folder = make_workspace(tmp_path_factory.mktemp("tasks"))
    for task in TASKS:
        write_task(folder, task)
    return folder


def run(workspace, out, task, *more, callbacks=(), family="bert") -> dict:
    words = task_overrides(workspace, out, task, *more, family=family)
    return train.run(config.load(None, words, checks=CHECKS), callbacks)


def _lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _plain_f1(task: str, lines: list[dict]) -> float:
    """Return the F1 of predictions.jsonl, computed from the predictions alone."""
    if task == "token_classification":
        return entity_scores(
            [line["tags"] for line in lines], [line["references"] for line in lines]
        )["f1"]
    if task == "question_answering":
        references = [line["references"] for line in lines]
        return answer_scores([line["answer"] for line in lines], references)["f1"]
    pairs = [(set(line["labels"]), set(line["references"])) for line in lines]
    right = sum(len(guess & truth) for guess, truth in pairs)
    return 2 * right / sum(len(guess) + len(truth) for guess, truth in pairs)


@every_task
def test_a_tiny_model_learns_the_task(workspace, tmp_path, task):
    epochs = f"train.num_train_epochs={EPOCHS[task]}"
    results = run(workspace, tmp_path / "run", task, epochs, "train.learning_rate=4e-3")
    assert results["test"]["f1"] > LEARNT[task] and results["task"] == task
    lines = _lines(tmp_path / "run" / "predictions.jsonl")
    rows = _lines(workspace / f"{task}_test.jsonl")
    first = next(iter(rows[0]))  # the text, the words or the question
    assert [line[first] for line in lines] == [row[first] for row in rows]
    assert _plain_f1(task, lines) == pytest.approx(results["test"]["f1"], abs=1e-6)
    manifest = json.loads((tmp_path / "run" / "best" / "manifest.json").read_text())
    labels = {"token_classification": ["O", "B-GOOD", "I-GOOD"], "question_answering": None}
    assert manifest["labels"] == labels.get(task, ["bad", "good"])


class At(TrainerCallback):
    """Send a signal at the end of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@mostly_slow
def test_a_stopped_run_goes_on_to_the_same_end(workspace, tmp_path, task):
    run(workspace, tmp_path / "whole", task, *SHORT)
    with pytest.raises(Preempted):
        run(workspace, tmp_path / "run", task, *SHORT, callbacks=[At(4)])
    run(workspace, tmp_path / "run", task, *SHORT, "train.resume=auto")
    weights = [
        load_file(tmp_path / n / "final/adapter_model.safetensors") for n in ("whole", "run")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("whole", "run")]
    assert results[0] == results[1]
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")


def test_the_loss_of_labels_is_binary_cross_entropy(workspace, tmp_path):
    """Before anything is learnt, each label costs about log 2, whatever the number of labels."""
    more = ("train.max_steps=1", "train.learning_rate=1e-9")
    results = run(workspace, tmp_path / "run", "multi_label_classification", *more)
    assert results["dev"]["loss"] == pytest.approx(0.6931, abs=0.05)


@pytest.mark.parametrize(
    "family, task",
    [
        ("t5", "question_answering"),
        pytest.param("bart", "question_answering", marks=pytest.mark.slow),
        pytest.param("t5", "token_classification", marks=pytest.mark.slow),
        pytest.param("llama", "token_classification", marks=pytest.mark.slow),
        pytest.param("gpt2", "question_answering", marks=pytest.mark.slow),
    ],
)
def test_other_families_run_where_transformers_has_the_head(workspace, tmp_path, family, task):
    if not (workspace / family).exists():
        add_writer(workspace, family)
    results = run(workspace, tmp_path / "run", task, *SHORT, family=family)
    stored = load_file(tmp_path / "run" / "best" / "adapter_model.safetensors")
    assert results["parameters"]["head"] > 0
    assert any(name.split(".")[2] in ("qa_outputs", "classifier", "score") for name in stored)


def test_a_model_without_the_head_is_refused(workspace, tmp_path):
    with pytest.raises(ConfigError, match="no bart model for data.task token_classification"):
        run(workspace, tmp_path / "run", "token_classification", family="bart")
    if not (workspace / "llama").exists():
        add_writer(workspace, "llama")
    with pytest.raises(ConfigError, match="LlamaForQuestionAnswering finds none of its weights"):
        run(workspace, tmp_path / "run", "question_answering", family="llama")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "task, more, expected",
    [
        ("question_answering", "data.streaming=true", "data.streaming: reads texts for data.task"),
        ("question_answering", "data.window_overlap=12", "may share less than half of them"),
        ("question_answering", "data.labels_column=x", "has no effect here"),
        ("question_answering", "train.label_smoothing_factor=0.1", "takes the answers away"),
        ("token_classification", "data.metric=macro_f1", "choose from f1, accuracy"),
        ("token_classification", "model.head_bias=prior", "is for sequence_classification and"),
        ("token_classification", "data.packing=true", "has no effect here"),
    ],
)
def test_settings_that_do_not_fit_are_refused(workspace, tmp_path, task, more, expected):
    with pytest.raises(ConfigError, match=expected):
        config.load(None, task_overrides(workspace, tmp_path, task, more), checks=CHECKS)


@mostly_slow
def test_a_plan_counts_the_head(workspace, tmp_path, task):
    words = task_overrides(workspace, tmp_path, task)
    plan = make_plan(config.load(None, words), 1, device="cpu", configured=True)
    outputs = 3 if task == "token_classification" else 2
    pooler = 0 if task != "multi_label_classification" else plan.counts["head"] - 33 * outputs
    assert plan.counts["head"] == 33 * outputs + pooler and plan.examples == 120
    assert plan.rows[0].step.peak > 0


def _export(checkpoint: pathlib.Path, kind: str, output: pathlib.Path):
    fields = {"rank": 8, "epochs": 1} if kind in ("plain", "lora") else {}
    options = ExportOptions(
        checkpoint=checkpoint,
        kind=kind,
        output=output,
        calibrate="test",
        max_metric_drop=100,
        **fields,
    )
    return export.run(options, lambda line: None)


# The pipeline tag of a card, and the arguments of the pipeline, which transformers 5 has not for
# questions.
PIPELINE = {
    "token_classification": ("token-classification", "'fine film plot'"),
    "multi_label_classification": ("text-classification", "'fine film plot', top_k=None"),
    "question_answering": ("question-answering", None),
}


@pytest.mark.slow
@every_task
def test_exports_are_verified_and_a_pipeline_takes_them(workspace, tmp_path, task):
    run(workspace, tmp_path / "run", task, *SHORT)
    for kind in ("exact", "standalone", "merged", "plain", "lora"):
        report = _export(tmp_path / "run" / "best", kind, tmp_path / kind)
        assert report.proof.reload_difference < 1e-4
        if kind in ("exact", "standalone"):
            assert report.proof.agreement == 1 and report.proof.metric.drop == 0
        pipeline, inputs = PIPELINE[task]
        card = (tmp_path / kind / "README.md").read_text()
        assert f"pipeline_tag: {pipeline}" in card
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert report.proof.metric.before == pytest.approx(100 * results["test"]["f1"], abs=1e-3)
    if inputs is None:
        return
    code = (
        "import sys, json; sys.modules['scaleup'] = sys.modules['peft'] = None\n"
        "from transformers import pipeline\n"
        f"folder = {str(tmp_path / 'standalone')!r}\n"
        f"found = pipeline({pipeline!r}, folder, trust_remote_code=True)\n"
        f"print(json.dumps(found({inputs}), default=str))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if task == "multi_label_classification":
        assert {row["label"] for row in found} == {"good", "bad"}
    else:
        assert all(row["entity"] in ("B-GOOD", "I-GOOD") for row in found)


@pytest.mark.slow
def test_the_real_commands_prepare_and_train(workspace, tmp_path):
    words = task_overrides(workspace, tmp_path / "run", "question_answering", *SHORT)
    for command in (["-m", "scaleup", "prepare"], [str(ROOT / "launch" / "train.py")]):
        done = subprocess.run(
            [sys.executable, *command, *words],
            capture_output=True,
            text=True,
            env=environment(),
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 6


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_scores_of_one(workspace):
    """With batches of half the size; 40 examples are no multiple of 2 x 7."""
    cases: dict[int, dict[str, list[str]]] = {1: {}, 2: {}}
    for task in TASKS:
        for processes, batch in ((1, 8), (2, 4)):
            name = f"{processes}-{task}"
            cases[processes][name] = task_overrides(
                *(workspace, workspace / name, task, *SHORT, "train.group_by_length=false"),
                f"train.per_device_train_batch_size={batch}",
                "train.per_device_eval_batch_size=7",
            )
    for processes, chosen in cases.items():
        path = workspace / f"cases{processes}.json"
        done = start_cases(chosen, path, processes, timeout=600, env=environment())
        assert done == dict.fromkeys(chosen)
    for task in TASKS:
        folders = [workspace / f"{processes}-{task}" for processes in (1, 2)]
        one, two = (json.loads((folder / "results.json").read_text()) for folder in folders)
        for split in ("dev", "test"):
            assert two[split] == pytest.approx(one[split], abs=5e-5)
        assert losses(folders[1]) == pytest.approx(losses(folders[0]), abs=1e-5)
        lines = [(folder / "predictions.jsonl").read_text() for folder in folders]
        assert lines[0] == lines[1]
