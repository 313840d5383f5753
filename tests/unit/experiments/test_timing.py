"""Steps in pieces: when variants hand over, whose time counts, and how times are compared."""

import time

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from scaleup.experiments import bench, timing
from scaleup.experiments.timing import LAYERS, PausingStep
from scaleup.experiments.variants import BenchOptions, Variant


class SleepingLayer(GradientCheckpointingLayer):
    """Calls a function, then sleeps."""

    def __init__(self, seconds: float = 0.0, call=lambda: None):
        super().__init__()
        self.seconds, self.call = seconds, call

    def forward(self, x):
        self.call()
        time.sleep(self.seconds)
        return x


class LinearLayer(GradientCheckpointingLayer):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return self.inner(x)


def forward_variant(*layers: nn.Module) -> Variant:
    model = nn.Sequential(*layers)
    return Variant(lambda: model(torch.zeros(1)), 0, model)


def time_variants(variants, rounds, interleave=True):
    return bench.time_variants(variants, BenchOptions("inference", rounds=rounds), interleave)


@pytest.fixture
def one_layer_pieces(monkeypatch):
    monkeypatch.setattr(timing, "LAYERS", 1)


def test_variants_hand_over_after_each_piece_and_only_their_own_work_counts(one_layer_pieces):
    calls, variants = [], {}
    for name, seconds in {"quick": 0.05, "slow": 0.15}.items():
        layers = [SleepingLayer(seconds, lambda name=name: calls.append(name)) for _ in range(2)]
        variants[name] = forward_variant(*layers)
    seconds = time_variants(variants, 2)
    first, second = ["quick", "slow"] * 2, ["slow", "quick"] * 2
    assert calls == first + second + first + second
    pieces = [[len(step) for step in steps] for steps in seconds.values()]
    assert pieces == [[3, 3]] * 2, "one piece before the first layer, and one for each layer"
    assert all(0.1 <= sum(step) < 0.2 for step in seconds["quick"])
    assert all(0.3 <= sum(step) < 0.5 for step in seconds["slow"])
    assert not variants["quick"].model[0]._forward_pre_hooks


def test_a_training_step_pauses_in_both_passes_and_computes_the_same_gradients(one_layer_pieces):
    model, x = nn.Sequential(LinearLayer(), LinearLayer()), torch.ones(2, 3, requires_grad=True)
    step = PausingStep(lambda: model(2 * x).square().sum().backward(), model)
    # The pieces end before layer 0, before layer 1, and after the backward pass of layer 1.
    assert [step.resume()[0] for _ in range(3)] == [False] * 3
    assert model[1].inner.bias.grad is not None and model[0].inner.bias.grad is None
    assert [step.resume()[0] for _ in range(2)] == [False, True]
    gradients = [p.grad.clone() for p in model.parameters()]
    step.close()
    model.zero_grad()
    model(2 * x).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters()))
    assert step.resume()[0], "after closing, the step is one piece"


def test_a_piece_has_several_layers():
    model = nn.Sequential(*[SleepingLayer() for _ in range(2 * LAYERS)])
    step = PausingStep(lambda: model(torch.zeros(1)), model)
    assert [step.resume()[0] for _ in range(3)] == [False, False, True]
    step.close()


def test_a_failing_step_ends_the_measurement_and_leaves_no_step_waiting(one_layer_pieces):
    def fail() -> None:
        raise ValueError("too long")

    variants = {
        name: forward_variant(SleepingLayer(), SleepingLayer(0.0, call), SleepingLayer())
        for name, call in {"good": lambda: None, "bad": fail, "other": lambda: None}.items()
    }
    with pytest.raises(ValueError, match="too long"):
        time_variants(variants, 1)
    assert not variants["other"].model[0]._forward_pre_hooks


def test_the_order_of_whole_steps_rotates_from_round_to_round():
    calls = []
    variants = {
        name: Variant(lambda name=name: calls.append(name), 0, nn.Module()) for name in "abc"
    }
    seconds = time_variants(variants, 1, interleave=False)
    assert {name: len(steps) for name, steps in seconds.items()} == {"a": 1, "b": 1, "c": 1}
    assert "".join(calls) == "abcbcacab"


def test_ratios_are_paired_and_the_best_step_consists_of_each_pieces_shortest_time():
    pieces = {"bare": [[0.5, 0.5]] * 3, "lora": [[0.5, 0.5], [0.4, 0.8], [0.8, 0.6]]}
    row = timing.compare(pieces, "bare")["lora"]
    assert row == {"ratio": 1.2, "quartiles": [1.1, 1.3], "best": 0.9, "milliseconds": 1200.0}
