"""Scores of a trained model: the content of results.json and predictions.jsonl."""

import json
from typing import Any

from transformers.trainer_utils import PredictionOutput

from scaleup.io import write_text
from scaleup.training.context import Run
from scaleup.training.trainer import RunTrainer


def score(trainer: RunTrainer, counts: dict[str, Any]) -> dict[str, Any]:
    """Score the best checkpoint on dev and test, and return the content of results.json.

    Args:
        counts: as `scaleup.unipelt.model.parameter_counts` returns them.
    """
    run, state = trainer.run, trainer.state
    settings, examples = run.settings, run.examples
    trainer.gate_statistics.drain()
    dev = _metrics(trainer.predict(examples.dev).metrics)
    gates = trainer.gate_statistics.drain()
    test = dev if examples.test_is_dev else None
    if examples.test is not None and not examples.test_is_dev:
        output = trainer.predict(examples.test)
        test = _metrics(output.metrics)
        if run.task.lines is not None and output.predictions is not None and run.world.main:
            _write_predictions(run, output)
    return {
        "task": settings.data.name or examples.task,
        "metric": examples.metric,
        "test": test,
        "test_is_dev": examples.test_is_dev,
        "dev": dev,
        "best_step": int(state.best_global_step or 0),
        "steps": state.global_step,
        "epochs": round(state.epoch or 0.0, 4),
        "examples": {
            "train": examples.train_rows,  # None: a stream
            "dev": examples.count("dev"),
            "test": examples.count("test"),
        },
        "seeds": {"data": settings.data.seed, "train": settings.train.seed},
        "parameters": counts,
        "gates": gates,
        "method": settings.dump()["method"],
        "learning_rate": settings.learning_rate,
        "sources": examples.sources,
    }


def _metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics of `predict` under their own names, without times."""
    return {
        name.removeprefix("test_"): round(value, 6)
        for name, value in metrics.items()
        if not name.endswith(("runtime", "per_second")) and "model_preparation" not in name
    }


def _write_predictions(run: Run, output: PredictionOutput) -> None:
    """Write predictions.jsonl in the order of the test set, which was evaluated by length."""
    assert run.task.lines is not None
    numbers = output.label_ids.reshape(-1)
    lines = run.task.lines(run.examples, run.tokenizer, output.predictions, numbers)
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(run.out / "predictions.jsonl", content)
