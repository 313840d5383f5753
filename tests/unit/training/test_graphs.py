"""Steps as CUDA graphs, with a recorder for CPUs that repeats the recorded function."""

import copy

import pytest
import torch
from torch import nn
from transformers import BartConfig

from scaleup.errors import ConfigError
from scaleup.settings.schema import load
from scaleup.training import graphs
from scaleup.training.distributed import World
from scaleup.training.graphs import MOST_GRAPHS, WARM_UPS, StepGraphs


class Recorder:
    """Counts the recordings. A recorded function sees only the tensors that it was recorded with,
    as on a GPU."""

    def __init__(self):
        self.recordings = self.replays = 0

    def __call__(self, function):
        self.recordings += 1

        def replay():
            self.replays += 1
            return function()

        return replay


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)

    def step(inputs):
        loss = (model(inputs["x"]) - inputs["y"]).square().mean()
        loss.backward()
        return loss.detach()

    recorder = Recorder()
    steps = StepGraphs(model.parameters(), step, recorder, warm_up=lambda function: function())
    return model, step, steps, recorder


def batch(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, 4, generator=generator),
        "y": torch.randn(rows, 1, generator=generator),
    }


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_recorded_steps_train_as_plain_steps_do(set_to_none, accumulated):
    weights = []
    for recorded in (False, True):
        model, step, steps, recorder = make()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for index in range(24):
            run = steps if recorded else step
            losses.append(run(batch(5 if index % 4 else 2, index)).item())
            if index % accumulated == accumulated - 1:
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
        weights.append((losses, copy.deepcopy(model.state_dict())))
    assert recorder.recordings == 2 and recorder.replays == 24 - 2 * WARM_UPS
    assert weights[0][0] == weights[1][0]
    for name, value in weights[0][1].items():
        assert torch.equal(value, weights[1][1][name]), name
    assert model[0].bias.grad is None


def test_the_number_of_graphs_is_limited():
    _, _, steps, recorder = make()
    for rows in range(1, MOST_GRAPHS + 3):
        for seed in range(WARM_UPS + 2):
            steps(batch(rows, seed))
    assert recorder.recordings == MOST_GRAPHS == len(steps.recorded)


@pytest.mark.parametrize(
    "setting",
    [
        "train.deepspeed=zero2",
        "train.gradient_checkpointing=true",
        "train.torch_compile=true",
        "model.quantization=8bit",
    ],
)
def test_what_cannot_be_recorded_is_refused(setting):
    with pytest.raises(ConfigError, match=r"train\.cuda_graphs: .*leave one of them out"):
        load(None, ["data.name=rte", "train.cuda_graphs=true", setting])


@pytest.mark.parametrize(
    "device, processes, layerdrop, words",
    [
        ("cpu", 1, 0.0, ["needs a CUDA GPU"]),
        ("cuda", 2, 0.0, ["works with one process, not with 2"]),
        ("cuda", 1, 0.1, ["encoder_layerdrop", "set it to 0"]),
        ("cuda", 1, 0.0, []),
    ],
)
def test_a_run_that_cannot_be_recorded_is_refused(device, processes, layerdrop, words):
    settings = load(None, ["data.name=rte", "train.cuda_graphs=true"])
    world = World(0, 0, processes, torch.device(device), False)
    config = BartConfig(encoder_layerdrop=layerdrop)
    found = graphs.problems(settings, world, config)
    assert len(found) == bool(words)
    assert all(word in found[0] for word in words)
    assert not graphs.problems(load(None, ["data.name=rte"]), world, config)
