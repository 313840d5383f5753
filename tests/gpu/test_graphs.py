"""Recorded training steps on a GPU: `pytest -m gpu`."""

import pytest
import torch

from scaleup.training.graphs import WARM_UPS, StepGraphs
from tests.utils.tiny import adapt, backbone, inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("family", ["bert", "bart", "llama"])
def test_recorded_steps_have_the_losses_and_gradients_of_plain_steps(family):
    torch.manual_seed(0)
    model = adapt(backbone(family)).cuda().train()
    batch = {name: tensor.cuda() for name, tensor in inputs(model, labels=True).items()}

    def step(tensors):
        loss = model(**tensors).loss
        loss.backward()
        return loss.detach()

    steps = StepGraphs(model.parameters(), step)
    trained = [p for p in model.parameters() if p.requires_grad]
    for index in range(WARM_UPS + 4):
        fresh = {
            name: torch.randint_like(x, 3, 20) if name == "input_ids" else x
            for name, x in batch.items()
        }
        model.zero_grad()
        expected = step(fresh)
        gradients = [p.grad.clone() for p in trained]
        model.zero_grad()
        assert torch.allclose(steps(fresh), expected, rtol=1e-4)
        for parameter, gradient in zip(trained, gradients):
            scale = gradient.abs().max().clamp(min=1e-6)
            assert ((parameter.grad - gradient).abs().max() / scale) < 1e-3, index
    assert len(steps.recorded) == 1
