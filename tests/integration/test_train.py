"""launch/train.py on tiny models: the files and the screen of a run, resuming, refusals."""

import csv
import json
import pathlib
import random
import shutil
import subprocess
import sys
import types

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from scaleup.training.checkpoint import verify
from scaleup.training.trainer import RunTrainer
from tests.utils.workspace import ROOT, environment, losses, make_workspace, overrides

TQDM_OFF = "train.disable_tqdm=true"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def train(
    *arguments: str, launcher: tuple[str, ...] = (), env: dict | None = None
) -> subprocess.CompletedProcess:
    """launch/train.py as a user starts it: by itself, or through a launcher."""
    command = [*(launcher or [sys.executable]), str(ROOT / "launch" / "train.py"), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=420,
        cwd=ROOT,
        env=environment() | (env or {}),
    )


def torchrun(processes: int) -> tuple[str, ...]:
    """The command that launch/torchrun.sh builds."""
    port = str(random.randint(20000, 40000))
    words = ("--nproc_per_node", str(processes), "--master_port", port)
    return (sys.executable, "-m", "torch.distributed.run", *words)


def done(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def finished(workspace, tmp_path_factory) -> tuple[pathlib.Path, str, str]:
    """The folder of a finished run, its screen, and its progress bars."""
    out = tmp_path_factory.mktemp("finished") / "run"
    result = train(*overrides(workspace, out, "train.disable_tqdm=false"))
    return out, done(result), result.stderr


def test_a_run_leaves_every_file_of_the_design(finished):
    out = finished[0]
    found = {path.name for path in out.iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "log.jsonl",
        "best",
        "final",
        "results.json",
        "timing.json",
    } <= found
    assert [name for name in found if name.startswith(".")] == [".lock"]
    for name in ("best", "final"):
        manifest = verify(out / name)
        assert manifest.labels == ["bad", "good"] and len(manifest.tensors) > 20
        assert not list((out / name).glob("*.bin")) and not list((out / name).glob("*.pt"))
    results = json.loads((out / "results.json").read_text())
    assert results["examples"] == {"train": 64, "dev": 32, "test": 40} and results["seeds"] == {
        "data": 0,
        "train": 42,
    }
    assert (
        0 <= results["test"]["accuracy"] <= 1
        and results["parameters"]["trained"] > results["parameters"]["stored"] > 0
    )


def test_the_screen_says_what_matters(finished):
    out, screen, _ = finished
    results = json.loads((out / "results.json").read_text())
    best_epoch = results["best_step"] // 4  # four steps an epoch
    for words in (
        "test accuracy",
        f"step {results['best_step']} of 12, epoch {best_epoch})",
        "trained",
        "stored",
        str(out / "results.json"),
        "adapter",
        "prefix",
        "lora",
        "gates",
    ):
        assert words in screen


def test_the_log_has_loss_learning_rate_speed_and_every_gate(finished):
    lines = [json.loads(line) for line in (finished[0] / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert all(line["tokens_per_second"] > 0 and line["learning_rate"] >= 0 for line in steps)
    for line in steps:
        parts = [part for site in line["gates"].values() for part in site]
        assert sorted(parts) == ["adapter"] * 3 + ["lora"] * 3 + ["prefix"] * 3
        assert all(
            0 < value["mean"] < 1 for site in line["gates"].values() for value in site.values()
        )
    assert len([line for line in lines if "eval_accuracy" in line]) == 3


def test_training_and_each_scoring_show_a_progress_bar(finished, workspace, tmp_path):
    bars = finished[2]
    assert "12/12" in bars and "dev accuracy=" in bars
    # Three epochs on dev, then dev and test. Each set is one batch.
    assert bars.count("0/1 [") == 5, bars
    assert bars.count("dev:   0%") == 4 and bars.count("test:   0%") == 1, bars
    quiet = train(*overrides(workspace, tmp_path / "run", "train.max_steps=2", TQDM_OFF))
    assert done(quiet) and "it/s" not in quiet.stderr and "0/1 [" not in quiet.stderr


def test_evaluation_puts_examples_of_like_length_together_and_the_longest_first():
    """Trainer's own groups have no effect on fewer than four batches."""
    args = types.SimpleNamespace(
        train_sampling_strategy="group_by_length", length_column_name="length"
    )
    trainer = types.SimpleNamespace(args=args)
    assert RunTrainer._get_eval_sampler(trainer, {"length": [3, 9, 4, 9, 1]}) == [1, 3, 2, 0, 4]


def test_the_resolved_config_starts_the_same_run_and_gives_the_same_results(finished, tmp_path):
    out = finished[0]
    done(train("--config", str(out / "config.yaml"), f"train.output_dir={tmp_path / 'again'}"))
    assert (tmp_path / "again" / "results.json").read_bytes() == (out / "results.json").read_bytes()
    assert losses(tmp_path / "again") == losses(out)


def test_the_best_checkpoint_gives_the_reported_test_score(finished, workspace):
    out = finished[0]
    tokenizer = AutoTokenizer.from_pretrained(out / "best")
    base = AutoModelForSequenceClassification.from_pretrained(workspace / "bert", num_labels=2)
    model = PeftModel.from_pretrained(base, out / "best").eval()
    rows = list(csv.DictReader((workspace / "test.csv").open()))
    with torch.no_grad():
        logits = model(
            **tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        ).logits
    right = [["bad", "good"][i] == row["label"] for i, row in zip(logits.argmax(-1), rows)]
    assert json.loads((out / "results.json").read_text())["test"]["accuracy"] == pytest.approx(
        sum(right) / len(right)
    )


def test_a_second_run_never_overwrites_the_first(finished, workspace):
    out = finished[0]
    before = (out / "results.json").read_bytes()
    result = train(*overrides(workspace, out))
    assert (
        result.returncode == 2
        and "is not empty; choose another, or set train.resume=auto" in result.stderr
    )
    assert "Traceback" not in result.stderr and (out / "results.json").read_bytes() == before


@pytest.mark.slow
def test_resume_continues_to_the_same_weights(workspace, tmp_path):
    """One epoch by max_steps, then two more, with a constant learning rate."""
    same = ("train.lr_scheduler_type=constant", "train.warmup_steps=0")
    done(train(*overrides(workspace, tmp_path / "whole", *same)))
    done(train(*overrides(workspace, tmp_path / "parts", *same, "train.max_steps=4")))
    done(train(*overrides(workspace, tmp_path / "parts", *same, "train.resume=auto")))
    whole, parts = (verify(tmp_path / name / "final").tensors for name in ("whole", "parts"))
    assert whole == parts
    other = train(
        *overrides(workspace, tmp_path / "parts", *same, "train.resume=auto", "method.r=4")
    )
    assert other.returncode == 2 and "has a different method." in other.stderr


@pytest.mark.parametrize(
    "more",
    [
        ("method=full",),
        ("method=bitfit",),
        ("method.gates=none",),
        ("method.submodules=[adapter]", "data.pad_to_max_length=true", "data.max_length=16"),
        ("data.task=regression", "data.label_column=score", "model.head_bias=prior"),
        ("model.quantization=8bit",),
        ("model.attention=eager", "train.gradient_checkpointing=true", "train.bf16=true"),
    ],
    ids=lambda more: more[0],
)
def test_other_methods_tasks_and_precisions_run(workspace, tmp_path, more):
    out = tmp_path / "run"
    screen = done(train(*overrides(workspace, out, "train.max_steps=3", *more)))
    assert ("where the head starts" in screen) == ("model.head_bias=prior" in more)
    verify(out / "best")
    assert all(loss == loss for loss in losses(out))
    if "train.bf16=true" in more:  # beside a backbone in bfloat16; the head, too
        kinds = {
            name: tensor.dtype
            for name, tensor in load_file(out / "best" / "adapter_model.safetensors").items()
        }
        assert set(kinds.values()) == {torch.float32} and any(
            "classifier" in name for name in kinds
        )


def test_bart_learns_and_is_restored_to_its_best(workspace, tmp_path):
    out = tmp_path / "run"
    done(
        train(
            *overrides(
                workspace,
                out,
                "train.num_train_epochs=20",
                "train.learning_rate=1e-2",
                "data.k=88",
                family="bart",
            )
        )
    )
    results = json.loads((out / "results.json").read_text())
    assert results["test"]["accuracy"] > 0.7
    assert results["dev"]["accuracy"] == pytest.approx(max(losses(out, "eval_accuracy")))


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_equal_one(workspace, tmp_path):
    """One process and DDP on two (gloo), with a global batch of 16 and without dropout.

    tests/distributed/test_zero.py covers ZeRO, and BART on two processes.
    """
    shared = ("train.max_steps=6", "train.group_by_length=false")
    done(train(*overrides(workspace, tmp_path / "one", *shared)))
    screen = done(
        train(
            *overrides(workspace, tmp_path / "two", *shared, "train.per_device_train_batch_size=8"),
            launcher=torchrun(2),
        )
    )
    assert "8 per process x 2 processes" in screen
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")
    )
    assert two["test"]["accuracy"] == one["test"]["accuracy"]

    def values(results: dict, key: str) -> list[float]:
        return [v[key] for parts in results["gates"].values() for v in parts.values()]

    # Both are over the dev examples of all processes.
    assert values(two, "mean") == pytest.approx(values(one, "mean"), abs=1e-5)
    assert values(two, "std") == pytest.approx(values(one, "std"), abs=1e-5)
    assert max(values(one, "std")) > 1e-4
    verify(tmp_path / "two" / "best")


@pytest.mark.slow
@pytest.mark.distributed
def test_the_bart_large_recipe_runs_on_a_local_bart_and_local_glue(workspace, data_dir, tmp_path):
    """The command of the README with two processes: ZeRO-2 on gloo, real RTE sentences."""
    screen = done(
        train(
            "--config",
            "configs/bart_large.yaml",
            f"model.name={workspace / 'bart'}",
            f"data.path={data_dir / 'glue'}",
            "train.max_steps=20",
            f"train.output_dir={tmp_path / 'run'}",
            "data.dev_size=64",
            launcher=torchrun(2),
        )
    )
    assert (
        "16 per process x 2 processes" in screen
        and "deepspeed, zero2" in screen
        and "test 277" in screen
    )
    assert len(losses(tmp_path / "run", "eval_accuracy")) == 2
    verify(tmp_path / "run" / "best")


def test_accelerate_with_several_processes_on_cpu_is_refused_in_one_line(workspace, tmp_path):
    accelerate = str(pathlib.Path(sys.executable).with_name("accelerate"))
    result = train(
        *overrides(workspace, tmp_path / "run"),
        launcher=(accelerate, "launch", "--num_processes", "2"),
    )
    assert result.returncode != 0 and "launch/torchrun.sh" in result.stderr
    assert "error: 1 problem:" in result.stderr and not (tmp_path / "run").exists()


def test_a_loss_that_is_not_a_number_ends_the_run_in_one_line(workspace, tmp_path):
    shutil.copytree(workspace / "bert", tmp_path / "bert")
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    (bias,) = (name for name in weights if name.endswith("embeddings.LayerNorm.bias"))
    weights[bias][0] = torch.nan
    save_file(weights, tmp_path / "bert" / "model.safetensors", {"format": "pt"})
    result = train(
        *overrides(
            workspace, tmp_path / "run", f"model.name={tmp_path / 'bert'}", "train.max_grad_norm=0"
        )
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: the loss is" in result.stderr and "at step" in result.stderr
    assert not (tmp_path / "run" / "results.json").exists()


def test_an_unknown_tracker_is_a_plain_error(workspace, tmp_path):
    result = train(*overrides(workspace, tmp_path / "run", "train.report_to=nope"))
    assert (
        result.returncode == 2
        and "nope is not supported" in result.stderr
        and "Traceback" not in result.stderr
    )


def test_print_config_shows_the_resolved_run(workspace, tmp_path):
    shown = yaml.safe_load(done(train("--print-config", *overrides(workspace, tmp_path / "x"))))
    assert (
        shown["train"]["learning_rate"] == 5e-4
        and shown["method"]["gates"] == "learned"
        and not (tmp_path / "x").exists()
    )


def test_help_shows_every_setting():
    screen = done(train("--help"))
    assert (
        "method.prefix_length [10]" in screen
        and "train.deepspeed" in screen
        and "data.text_column [text]" in screen
    )


def test_everything_wrong_is_said_at_once_with_exit_code_2(workspace, tmp_path):
    result = train(
        f"data.train_file={workspace / 'train.csv'}",
        "data.label_column=lable",
        "model.name=/no/such/folder",
        "train.lerning_rate=1",
        "method.adapter_size=many",
        f"train.output_dir={tmp_path / 'run'}",
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    for words in (
        "did you mean learning_rate",
        "adapter_size: should be a valid integer",
        "no folder /no/such/folder",
        "lable",
    ):
        assert words in result.stderr, result.stderr
    assert not (tmp_path / "run").exists()
