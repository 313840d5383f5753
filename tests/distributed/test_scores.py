"""Scores and training losses on two processes: padding duplicates and batch sizes change nothing.

Accelerate repeats examples until all processes have whole batches. 24 development and 40 test
examples are no multiple of the batches here.
"""

import json
import pathlib

import pytest

from benchmarks.cases import start_cases
from tests.utils.workspace import (
    add_writer,
    environment,
    losses,
    make_workspace,
    overrides,
    writing,
)

pytestmark = pytest.mark.distributed
STILL = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
COMMON = ("train.max_steps=2", "train.group_by_length=false", "data.dev_size=24")
FAMILY = {"causal_lm": "llama", "writer": "llama", "seq2seq": "bart"}
# The global batch is 8 in every variant.
VARIANTS = {
    "one": (1, 8, 1, 8),
    "accumulated": (1, 4, 2, 7),
    "two": (2, 4, 1, 5),
    "two-accumulated": (2, 2, 2, 16),
}


def _case(workspace: pathlib.Path, name: str, variant: str) -> list[str]:
    _, batch, accumulation, eval_batch = VARIANTS[variant]
    more = [
        *COMMON,
        f"train.per_device_train_batch_size={batch}",
        f"train.gradient_accumulation_steps={accumulation}",
        f"train.per_device_eval_batch_size={eval_batch}",
    ]
    out = workspace / f"{variant}-{name}"
    if name in FAMILY:
        task = "causal_lm" if name == "writer" else name
        more += ["train.dataloader_drop_last=true"] if variant == "accumulated" else []
        more += ["data.metric=rouge_l"] if name == "writer" else []
        more += ["data.max_target_length=8"] if name != "causal_lm" else []
        return writing(workspace, out, FAMILY[name], task, *more)
    label = ["data.task=regression", "data.label_column=score"] if name == "regression" else []
    return overrides(workspace, out, "train.disable_tqdm=true", *more, *label)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> pathlib.Path:
    """Runs of every task on one and on two processes."""
    workspace = make_workspace(tmp_path_factory.mktemp("scores"))
    add_writer(workspace, "bart", **STILL)
    add_writer(workspace, "llama")
    rows = [json.loads(line) for line in (workspace / "pairs.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):  # targets of one to six words
        row["target"] = " ".join((row["text"].split() * 2)[: number % 6 + 1])
    (workspace / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for processes in (1, 2):
        cases = {
            f"{variant}-{name}": _case(workspace, name, variant)
            for variant, (count, *_) in VARIANTS.items()
            for name in (*FAMILY, "regression", "classification")
            if count == processes
        }
        path = workspace / f"cases{processes}.json"
        done = start_cases(cases, path, processes, timeout=900, env=environment())
        assert done == dict.fromkeys(cases)
    return workspace


def _results(run: pathlib.Path) -> dict:
    return json.loads((run / "results.json").read_text())


@pytest.mark.parametrize("variant", ["accumulated", "two", "two-accumulated"])
@pytest.mark.parametrize("name", [*FAMILY, "regression", "classification"])
def test_scores_and_gates_do_not_depend_on_processes_and_batches(runs, name, variant):
    one, other = (_results(runs / f"{kind}-{name}") for kind in ("one", variant))
    for split in ("dev", "test"):
        assert other[split]["loss"] == pytest.approx(one[split]["loss"], abs=2e-6)
        assert other[split] == pytest.approx(one[split], abs=5e-5)
    for site, gates in one["gates"].items():
        if "decoder" in site:  # the gates at the padding of targets are counted
            continue
        for submodule, values in gates.items():
            assert other["gates"][site][submodule] == pytest.approx(values, abs=2e-5)


@pytest.mark.parametrize("variant", ["accumulated", "two", "two-accumulated"])
@pytest.mark.parametrize("name", ["causal_lm", "seq2seq"])
def test_the_training_loss_is_a_mean_over_the_tokens_of_a_step(runs, name, variant):
    one, other = (losses(runs / f"{kind}-{name}") for kind in ("one", variant))
    assert other == pytest.approx(one, abs=2e-6)
    one, other = (losses(runs / f"{kind}-{name}", "eval_loss") for kind in ("one", variant))
    assert len(one) == 1 and other == pytest.approx(one, abs=2e-6)


def test_the_loss_of_generated_text_is_a_mean_over_tokens(runs):
    """The 24 development examples have targets of different lengths."""
    causal, writer = (
        _results(runs / f"one-{name}")["dev"]["loss"] for name in ("causal_lm", "writer")
    )
    assert causal == pytest.approx(writer, abs=2e-6)
