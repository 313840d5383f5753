"""The state of an optimizer goes by name into another one, which goes on as the first would."""

import copy
import types

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from scaleup.errors import CheckpointError, ConfigError
from scaleup.training.engines import PlainEngine, set_hyperparameters, state_keys

OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1, amsgrad=True),
    "fused AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.1),
    "Adafactor": lambda groups: Adafactor(groups, lr=0.1, relative_step=False),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def step(trained: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x_BI = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    trained(x_BI).square().sum().backward()
    optimizer.step()


def items(state):
    for name, tensor in state.tensors.items():
        yield (*name.split("/"), tensor)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_with_other_groups_goes_on_as_the_first_one(name):
    one, make = model(), OPTIMIZERS[name]
    first = make([{"params": list(one.parameters())}])
    keys = state_keys(first, whole=False)
    first = make([{"params": list(one.parameters())}])
    for seed in range(3):
        step(one, first, seed)
    first.param_groups[0]["lr"] = 0.05  # as a schedule does
    state = copy.deepcopy(PlainEngine(one, first, None, True).read())  # as a file holds it
    assert {name.split("/")[0] for name in state.tensors} == keys
    other = copy.deepcopy(one)
    weights = [p for n, p in other.named_parameters() if "weight" in n]
    biases = [p for n, p in other.named_parameters() if "bias" in n]
    second = make([{"params": biases}, {"params": weights}])
    PlainEngine(other, second, None, True).write(items(state), state)
    for seed in range(3, 6):
        step(one, first, seed)
        step(other, second, seed)
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters()))


def test_looking_at_an_optimizer_changes_no_parameter():
    trained = model()
    before = copy.deepcopy(trained.state_dict())
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1, weight_decay=0.5)
    assert state_keys(optimizer, whole=True) == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert all(p.grad is None for p in trained.parameters())


def test_a_state_without_a_number_for_each_weight_cannot_be_cut_into_pieces():
    optimizer = OPTIMIZERS["Adafactor"]([{"params": list(model().parameters())}])
    with pytest.raises(ConfigError, match="exp_avg_sq_row.*has another shape.*like adamw_torch"):
        state_keys(optimizer, whole=True)


def test_a_state_with_an_object_is_refused():
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["projector"] = object()

    with pytest.raises(ConfigError, match="'projector' in the state of Odd is a object"):
        state_keys(Odd(model().parameters(), lr=0.1), whole=False)


def test_a_group_of_parameters_that_had_several_rates_is_refused():
    stored = [{"names": ["a"], "lr": 0.1}, {"names": ["b"], "lr": 0.2}]
    with pytest.raises(CheckpointError, match="several values of lr"):
        set_hyperparameters([({"params": [], "lr": 0.3}, ["a", "b"])], stored)


def test_the_loss_scale_goes_from_torch_to_deepspeed_and_back():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from scaleup.training.zero_state import ZeroEngine

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": 7})
    state = PlainEngine(model(), None, scaler, True)._loss_scale()
    engine = ZeroEngine.__new__(ZeroEngine)
    target = DynamicLossScaler(16.0, 1000, 1.0, 2, False)
    engine.zero = types.SimpleNamespace(loss_scaler=target)
    engine._set_loss_scale(state)
    assert engine._loss_scale() == {"scale": 64.0, "good_steps": 7, "hysteresis": 2}
