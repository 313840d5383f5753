"""Metrics of classification and regression."""

import json

import datasets
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics
from transformers import EvalPrediction

from scaleup.data import classification as data


def made(task="sequence_classification", labels=("a", "b"), metric="accuracy") -> data.Examples:
    """Return examples for the metrics, which read no rows."""
    rows = datasets.Dataset.from_dict({"text": ["x"], "label": [0]})
    names = list(labels) if labels else None
    return data.Examples(rows, rows, None, names, metric, task, False, [])


def score(examples: data.Examples, outputs, truth) -> dict[str, float]:
    prediction = EvalPrediction(predictions=outputs, label_ids=np.asarray(truth))
    return data.compute_metrics(examples, None)(prediction)


def logits(guesses, classes=2) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(len(guesses), classes))
    noise[np.arange(len(guesses)), guesses] = 9.0
    return noise


def test_the_metrics_of_two_classes_by_hand():
    truth, guess = [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0]  # TP 2, FN 1, FP 1, TN 4
    assert score(made(metric="accuracy"), logits(guess), truth) == {"accuracy": 0.75}
    assert score(made(metric="f1"), logits(guess), truth) == pytest.approx(
        {"accuracy": 0.75, "f1": 2 / 3}
    )
    matthews = (2 * 4 - 1 * 1) / (3 * 3 * 5 * 5) ** 0.5
    assert score(made(metric="matthews"), logits(guess), truth) == pytest.approx(
        {"accuracy": 0.75, "matthews": matthews}
    )


def test_f1_of_two_classes_is_that_of_class_one():
    truth, guess = [0, 0, 0, 1], [0, 0, 1, 0]
    assert score(made(metric="f1"), logits(guess), truth)["f1"] == 0.0, "class 0 would have 2/3"


def test_f1_of_three_classes_is_the_macro_average():
    truth, guess = [0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 2, 2]
    found = score(made(labels="abc", metric="f1"), logits(guess, 3), truth)["f1"]
    assert found == pytest.approx((1 + 2 / 3 + 4 / 5) / 3)


def test_metrics_equal_independent_calls_on_random_predictions():
    draw = np.random.default_rng(7)
    for classes in (2, 3, 5):
        truth, outputs = (
            draw.integers(0, classes, 200),
            draw.normal(size=(200, classes)).astype(np.float16),
        )
        guess, names = outputs.argmax(1), [str(i) for i in range(classes)]
        average = "binary" if classes == 2 else "macro"
        assert score(made(labels=names, metric="f1"), outputs, truth)["f1"] == pytest.approx(
            metrics.f1_score(truth, guess, average=average)
        )
        found = score(made(labels=names, metric="matthews"), outputs, truth)
        assert found == pytest.approx(
            {
                "accuracy": (truth == guess).mean(),
                "matthews": metrics.matthews_corrcoef(truth, guess),
            }
        )
    truth, outputs = (
        draw.normal(size=300).astype(np.float32),
        draw.normal(size=(300, 1)).astype(np.float32),
    )
    found = score(made("regression", None, "spearman"), outputs, truth)
    ranks = np.corrcoef(stats.rankdata(outputs[:, 0]), stats.rankdata(truth))[0, 1]
    assert found == pytest.approx(
        {
            "spearman": ranks,
            "pearson": np.corrcoef(outputs[:, 0].astype(float), truth.astype(float))[0, 1],
        }
    )


def test_the_correlations_by_hand():
    found = score(
        made("regression", None, "spearman"), np.array([[1.0], [2.0], [9.0]]), [1.0, 2.0, 3.0]
    )
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(8 / (2 * 38) ** 0.5)


def test_the_logits_come_first_where_a_model_returns_more():
    outputs = (logits([0, 1, 1]), np.zeros((3, 7, 4)))
    assert score(made(), outputs, [0, 1, 0]) == pytest.approx({"accuracy": 2 / 3})


def test_constant_predictions_score_zero_without_a_warning(recwarn):
    assert score(
        made("regression", None, "spearman"), np.full((4, 1), 0.3), [1.0, 2.0, 3.0, 4.0]
    ) == {"spearman": 0.0, "pearson": 0.0}
    assert score(made("regression", None, "spearman"), np.array([[1.0], [2.0]]), [3.0, 3.0]) == {
        "spearman": 0.0,
        "pearson": 0.0,
    }
    assert score(made(metric="matthews"), logits([0, 0, 0, 0]), [0, 1, 0, 1]) == {
        "accuracy": 0.5,
        "matthews": 0.0,
    }
    assert score(made(metric="f1"), logits([0, 0, 0, 0]), [0, 0, 0, 0]) == {
        "accuracy": 1.0,
        "f1": 0.0,
    }
    assert not [
        warning
        for warning in recwarn
        if issubclass(warning.category, (RuntimeWarning, UserWarning))
    ]


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
def test_an_example_with_nan_outputs_is_wrong(metric):
    outputs = logits([0, 1, 0, 1])
    assert score(made(metric=metric), outputs, [0, 1, 0, 1])[metric] == 1.0
    outputs[0, 1] = np.nan
    found = score(made(metric=metric), outputs, [0, 1, 0, 1])
    assert found["accuracy"] == 0.75 and np.isfinite(found[metric])
    lost = score(made(metric=metric), np.full((4, 2), np.nan), [0, 1, 0, 1])
    assert lost["accuracy"] == 0.0 and lost[metric] == 0.0


def test_the_macro_average_counts_no_class_for_nan_outputs():
    outputs = logits([0, 0, 1, 1, 2, 2], 3)
    outputs[0] = np.nan
    found = score(made(labels="abc", metric="f1"), outputs, [0, 0, 1, 1, 2, 2])["f1"]
    assert found == pytest.approx((2 / 3 + 1 + 1) / 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_regression_with_outputs_that_are_no_numbers_scores_zero(value):
    outputs = np.array([[1.0], [2.0], [value]])
    assert score(made("regression", None, "spearman"), outputs, [1.0, 2.0, 3.0]) == {
        "spearman": 0.0,
        "pearson": 0.0,
    }


def test_scores_are_plain_floats_that_json_takes():
    found = score(made(metric="f1"), logits([0, 1]).astype(np.float32), [0, 1])
    assert json.loads(json.dumps(found)) == found and all(
        type(value) is float for value in found.values()
    )
