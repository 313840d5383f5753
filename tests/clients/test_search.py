"""Hyperparameter search of transformers' Trainer, as docs/clients.md shows it."""

import json
import pathlib

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

pytest.importorskip(
    "optuna", reason="Optuna is not installed; `make test-clients` runs these tests"
)


def last_checkpoint(folder: pathlib.Path) -> pathlib.Path:
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def test_every_trial_trains_and_the_best_can_be_loaded(encoder, run, training):
    variables = run("Hyperparameter search")
    best, trainer = variables["best"], variables["trainer"]
    backbone = AutoModelForSequenceClassification.from_pretrained("backbone", num_labels=2)
    assert training.initial
    assert not [p for p, initial in training.initial.items() if torch.equal(p, initial)]
    losses = set()
    for folder in pathlib.Path("search").glob("run-*"):
        checkpoint = last_checkpoint(folder)
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert state["global_step"] == state["max_steps"]
        losses.add(state["log_history"][-1]["eval_loss"])
    assert len(losses) == 3 and best.objective == min(losses)

    checkpoint = last_checkpoint(pathlib.Path("search", f"run-{best.run_id}"))
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert config["prefix_length"] == best.hyperparameters["prefix_length"]
    again = Trainer(
        model=PeftModel.from_pretrained(backbone, checkpoint),
        args=TrainingArguments("again"),
        eval_dataset=trainer.eval_dataset,
        processing_class=variables["tokenizer"],
    )
    assert again.evaluate()["eval_loss"] == pytest.approx(best.objective, abs=1e-5)
