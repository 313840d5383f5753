"""Every number of a config has bounds, so that a value without a meaning is refused."""

import typing

import pytest

from scaleup.settings import schema as config
from scaleup.settings.derived import alternatives
from scaleup.unipelt.config import UniPeltConfig
from tests.utils.configs import problems

FILE = "data.train_file=a.csv"


def _numbers() -> list[str]:
    """Return every setting that takes a number."""
    names = []
    for section, cls in config.SECTIONS.items():
        for name, field in cls.model_fields.items():
            kinds = alternatives(field.annotation)
            if kinds & {int, float} or any(
                alternatives(typing.get_args(kind)[0]) & {int, float}
                for kind in kinds
                if typing.get_origin(kind) is typing.Annotated
            ):
                names.append(f"{section}.{name}")
    return names


NUMBERS = _numbers()


def test_the_numbers_are_all_found():
    assert len(NUMBERS) >= 43
    assert {"data.k", "data.seed", "method.r", "method.gate_bias", "train.weight_decay"} <= set(
        NUMBERS
    )
    assert {"train.adam_epsilon", "train.neftune_noise_alpha", "train.ddp_timeout"} <= set(NUMBERS)


@pytest.mark.parametrize("value", [10**30, -(10**30), "1e30", "-1e30", -2])
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_beyond_reason_is_refused(key, value):
    if (key, value) == ("method.gate_bias", -2):
        return  # starts the gates at 0.12
    found = problems(FILE, f"{key}={value}")
    refused = [problem for problem in found if problem.startswith(f"{key}: ")]
    assert refused and "has no effect" not in refused[0], found


@pytest.mark.parametrize(
    "override",
    [
        "train.label_smoothing_factor=-5",
        "train.label_smoothing_factor=1",
        "train.weight_decay=1e30",
        "train.weight_decay=11",
        "train.adam_epsilon=1e30",
        "train.adam_epsilon=0",
        "train.adam_beta1=1",
        "train.adam_beta2=-0.1",
        "train.neftune_noise_alpha=-1",
        "train.max_grad_norm=null",
        "train.max_grad_norm=-1",
        "train.adam_beta1=null",
        "train.ddp_timeout=null",
        "train.lr_scheduler_type=null",
        "train.dataloader_num_workers=null",
        "train.dataloader_num_workers=-1",
        "train.eval_accumulation_steps=0",
        "train.torch_empty_cache_steps=0",
        "train.eval_steps=0",
        "train.save_steps=-1",
        "train.eval_delay=-1",
        "train.learning_rate=1000",
        "train.num_train_epochs=1e9",
        "train.per_device_train_batch_size=100000000",
        "method.adapter_size=1000000",
        "method.prefix_length=1000000",
        "method.r=1000000",
        "method.gate_bias=-1000",
        "method.lora_alpha=1e9",
        "data.max_length=1e12",
    ],
)
def test_a_value_without_a_meaning_is_refused(override):
    key = override.partition("=")[0]
    gates = ["method.gates=none"] if key == "method.lora_alpha" else []
    assert problems(FILE, override, *gates)[0].startswith(f"{key}: ")


@pytest.mark.parametrize(
    "override",
    [
        "train.label_smoothing_factor=0.1",
        "train.weight_decay=0.3",
        "train.adam_epsilon=1e-12",
        "train.adam_beta1=0",
        "train.neftune_noise_alpha=5",
        "train.neftune_noise_alpha=null",
        "train.max_grad_norm=0",
        "train.max_grad_norm=1000",
        "train.eval_steps=0.1",
        "train.eval_steps=null",
        "train.learning_rate=3",
        "train.num_train_epochs=5000",
        "method.adapter_size=4096",
        "method.r=1024",
        "method.gate_bias=-30",
        "data.max_length=1000000",
        "data.k=100000000",
    ],
)
def test_a_value_with_a_meaning_is_accepted(override):
    assert config.load(None, [FILE, override, "train.eval_strategy=steps"])


@pytest.mark.parametrize("values", [{"r": 10**30}, {"gate_bias": 1e30}, {"prefix_length": 65_537}])
def test_the_peft_config_has_the_bounds_of_the_settings(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} must be .*at most"):
        UniPeltConfig(**values)
