"""A training loop of one's own with Accelerate, as docs/clients.md shows it."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel
from transformers import AutoModelForSequenceClassification


def backbone() -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained("backbone", num_labels=2).eval()


def mean_loss(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    with torch.no_grad():
        losses = [model.eval()(**batch).loss.item() for batch in batches]
    return sum(losses) / len(losses)


def test_a_plain_loop_trains_unipelt_alone_and_the_adapter_reloads(encoder, run, training):
    AcceleratorState._reset_state()  # it keeps the precision of earlier tests
    variables = run("Accelerate")
    model = variables["accelerator"].unwrap_model(variables["model"])
    training.check(model, backbone())
    batch = next(iter(variables["loader"]))
    loaded = PeftModel.from_pretrained(backbone(), "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_loss_falls(encoder, run, training, precision):
    AcceleratorState._reset_state()
    replace = {"Accelerator()": f"Accelerator(mixed_precision={precision!r})", "lr=5e-4": "lr=1e-2"}
    variables = run("Accelerate", replace=replace)
    batches = list(variables["loader"])
    after = mean_loss(variables["model"], batches)
    with torch.no_grad():
        for parameter, initial in training.initial.items():
            parameter.copy_(initial)
    assert after < 0.9 * mean_loss(variables["model"], batches)


def test_a_state_of_accelerate_is_saved_and_restored(encoder, run, training):
    AcceleratorState._reset_state()
    variables = run("Accelerate")
    accelerator, model = variables["accelerator"], variables["model"]
    assert isinstance(accelerator, Accelerator)
    accelerator.save_state("state")
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter, initial in training.initial.items():
            parameter.copy_(initial)
    assert not torch.equal(next(iter(trained.values())), next(iter(training.initial.values())))
    accelerator.load_state("state")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, trained[name]), name
