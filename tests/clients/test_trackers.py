"""TensorBoard receives what `scaleup train` logs, as docs/clients.md says."""

import json
import shlex

import pytest

from scaleup.cli import main
from tests.clients.conftest import PAGE, example
from tests.utils.workspace import overrides

pytest.importorskip(
    "tensorboard", reason="TensorBoard is not installed; `make test-clients` runs these tests"
)

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_tensorboard_receives_the_curves_of_the_gates(encoder, monkeypatch):
    monkeypatch.chdir(PAGE.parents[1])  # the command names a file of the repository
    (encoder / "backbone").rename(encoder / "bert")
    command = shlex.split(example("Trackers", language="bash"))
    assert command[:2] == ["scaleup", "train"]
    out = encoder / "out"
    assert main([*command[1:], *overrides(encoder, out, "data.max_length=32")]) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    (events,) = out.glob("runs/*")
    received = EventAccumulator(str(events)).Reload()
    for group, loss in (("train", "loss"), ("eval", "eval_loss")):
        start = f"{group}/gates/"
        tags = [tag for tag in received.Tags()["scalars"] if tag.startswith(start)]
        lines = [line for line in log if loss in line]
        assert len(lines) >= 3
        assert len(tags) == sum(map(len, lines[0]["gates"].values())) >= 9
        for tag in tags:
            site, submodule = tag.removeprefix(start).rsplit("/", 1)
            curve = {event.step: event.value for event in received.Scalars(tag)}
            means = {line["step"]: line["gates"][site][submodule]["mean"] for line in lines}
            assert curve == pytest.approx(means)
            assert len(set(curve.values())) > 1
