"""The options of an export, and the scores in its report."""

import pathlib

import pytest

import scaleup
from scaleup.errors import ConfigError
from scaleup.export.report import Metric


@pytest.mark.parametrize(
    ("metric", "drop", "shown"),
    [
        (Metric("accuracy", 91.25, 90.0), 1.25, ("91.25", "90.00")),
        (Metric("accuracy", 90.0, 91.0), -1.0, ("90.00", "91.00")),
        (Metric("loss", 2.9485, 2.9585), 1.0, ("2.9485", "2.9585")),
    ],
)
def test_a_metric_is_in_points_and_a_loss_as_it_is(metric, drop, shown):
    assert metric.drop == pytest.approx(drop)
    assert metric.shown == shown


def test_a_kind_that_does_not_exist_is_refused():
    folder = pathlib.Path("missing")
    with pytest.raises(ConfigError, match="--kind: mergd is none of exact, standalone, merged, "):
        scaleup.export(folder, folder / "out", kind="mergd")
