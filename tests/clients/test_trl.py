"""The trainers of TRL with default settings, as docs/clients.md shows them."""

import math

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

pytest.importorskip("trl", reason="TRL is not installed; `make test-clients` runs these tests")

TRAINERS = {"SFTTrainer": "sft", "DPOTrainer": "dpo", "RewardTrainer": "reward"}
every_trainer = pytest.mark.parametrize("section", TRAINERS)


def backbone_of(section: str) -> torch.nn.Module:
    if section == "RewardTrainer":
        model = AutoModelForSequenceClassification.from_pretrained("backbone", num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained("backbone")
    return model.eval()


def arguments(**changes: object) -> dict[str, str]:
    """Return what to replace in an example to set arguments of its trainer."""
    written = "".join(f"{name}={value!r}, " for name, value in changes.items())
    return {"use_cpu=": f"{written}use_cpu="}


def token_batch(trainer) -> dict[str, torch.Tensor]:
    batch = next(iter(trainer.get_train_dataloader()))
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@every_trainer
def test_default_settings_train_unipelt_alone_and_the_adapter_reloads(
    decoder, run, training, section
):
    trainer = run(section)["trainer"]
    assert trainer.args.bf16 and trainer.model.is_gradient_checkpointing
    training.check(trainer.model, backbone_of(section))
    inputs = token_batch(trainer)
    with torch.no_grad():
        # Without the bfloat16 of the trainer, the adapter has to give the same to the last bits.
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        expected = model.eval()(**inputs).logits
        loaded = PeftModel.from_pretrained(backbone_of(section), TRAINERS[section]).eval()
        torch.testing.assert_close(loaded(**inputs).logits, expected)
        bare = backbone_of(section)(**inputs).logits
    assert (bare - expected).abs().max() > 1e-3


@every_trainer
def test_the_loss_falls(decoder, run, section):
    logged = arguments(learning_rate=5e-3, logging_steps=1, num_train_epochs=6)
    history = run(section, replace=logged)["trainer"].state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert sum(losses[-5:]) / 5 < 0.95 * losses[0]


@every_trainer
def test_gradient_checkpointing_changes_neither_losses_nor_weights(decoder, run, section):
    runs = []
    for checkpointing in (True, False):
        changes = arguments(
            gradient_checkpointing=checkpointing, learning_rate=1e-3, logging_steps=1
        )
        trainer = run(section, replace=changes)["trainer"]
        assert trainer.model.is_gradient_checkpointing is checkpointing
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((losses, load_file(f"{TRAINERS[section]}/adapter_model.safetensors")))
    (losses, weights), (plain_losses, plain_weights) = runs
    assert len(losses) > 10
    assert losses == pytest.approx(plain_losses, abs=1e-5)
    torch.testing.assert_close(weights, plain_weights)


def log_probabilities(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the log-probability of each completion, [chosen and then rejected]."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    chosen = batch["input_ids"][:, 1:, None]
    of_tokens = logits[:, :-1].log_softmax(-1).gather(2, chosen)[..., 0]
    return (of_tokens * batch["completion_mask"][:, 1:]).sum(1)


def dpo_loss(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """Return equation 7 of Rafailov et al. (2023)."""
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def test_the_reference_of_dpo_is_the_backbone(decoder, run):
    changes = arguments(learning_rate=1e-3, bf16=False)
    trainer = run("DPOTrainer", replace=changes)["trainer"]
    batch = next(iter(trainer.get_train_dataloader()))
    model, backbone = trainer.model.eval(), backbone_of("DPOTrainer")
    inputs = token_batch(trainer)
    with torch.no_grad():
        with model.disable_adapter():
            torch.testing.assert_close(model(**inputs).logits, backbone(**inputs).logits)
        policy, reference = log_probabilities(model, batch), log_probabilities(backbone, batch)
        found = torch.cat(trainer.compute_ref_log_probs(model, batch))
        torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-5)
        assert (policy - reference).abs().max() > 0.01
        expected = dpo_loss(policy, reference, trainer.args.beta)
        torch.testing.assert_close(trainer.compute_loss(model, batch), expected)


def test_dpo_continues_an_adapter_with_a_copy_of_it_as_reference(decoder, run):
    run("SFTTrainer", replace=arguments(learning_rate=5e-3))
    before = load_file("sft/adapter_model.safetensors")
    changes = arguments(learning_rate=1e-3, logging_steps=1, bf16=False)
    trainer = run("DPOTrainer", 1, replace=changes)["trainer"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < math.log(2)
    torch.testing.assert_close(load_file("dpo/ref/adapter_model.safetensors"), before)
    after = load_file("dpo/adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert not [name for name in after if torch.equal(after[name], before[name])]


def test_a_chat_template_that_adds_tokens_is_refused_before_the_training(decoder, run):
    tokenizer = AutoTokenizer.from_pretrained("backbone")
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    tokenizer.save_pretrained("template")
    with pytest.raises(ValueError, match="leave out trainable_token_indices"):
        run("SFTTrainer", replace=arguments(chat_template_path="template"))
