"""DeepSpeed files of the user: what is filled in, and what is refused before a run starts."""

import json
import os

import pytest

from scaleup.errors import ConfigError
from scaleup.settings.presets import deepspeed_file, read_deepspeed
from scaleup.settings.rules import ZERO_PRESETS
from scaleup.settings.schema import TrainSettings
from scaleup.training.deepspeed_file import deepspeed_problems, section_problems


def problems(folder, content) -> list[str]:
    path = folder / "zero.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return [p.replace(str(path), "FILE") for p in deepspeed_problems(str(path))]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_plain_stage_is_completed(tmp_path, stage):
    content = {"zero_optimization": {"stage": stage}}
    assert problems(tmp_path, content) == []
    config = read_deepspeed(str(tmp_path / "zero.json"))
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config[key] == "auto"
    assert config["bf16"] == config["fp16"] == {"enabled": "auto"}


def test_what_a_file_says_is_kept(tmp_path):
    content = {
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 0.5,
        "fp16": {"enabled": True},
    }
    assert problems(tmp_path, content) == []
    config = read_deepspeed(str(tmp_path / "zero.json"))
    assert config["gradient_clipping"] == 0.5 and config["fp16"] == {"enabled": True}
    assert "bf16" not in config


def test_an_optimizer_and_a_scheduler_of_the_file_get_the_numbers_of_the_run(tmp_path):
    """DeepSpeed's own defaults, such as a learning rate of 0.001, replaced them silently."""
    content = {
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}},
        "scheduler": {"type": "WarmupDecayLR"},
    }
    assert problems(tmp_path, content) == []
    config = read_deepspeed(str(tmp_path / "zero.json"))
    assert config["optimizer"]["params"] == {
        "lr": "auto",
        "weight_decay": 0.1,
        "betas": "auto",
        "eps": "auto",
    }
    numbers = ("warmup_max_lr", "warmup_num_steps", "total_num_steps")
    assert config["scheduler"]["params"] == dict.fromkeys(numbers, "auto")


@pytest.mark.parametrize("name", ZERO_PRESETS)
def test_presets_are_complete(name):
    with open(str(deepspeed_file(name)), encoding="utf-8") as file:
        expected = json.load(file)
    if name == "zero3_hpz":  # only a run knows how many processes a host has
        assert expected["zero_optimization"]["zero_hpz_partition_size"] == "auto"
        expected["zero_optimization"]["zero_hpz_partition_size"] = 4
    assert read_deepspeed(name, per_host=4) == expected
    assert deepspeed_problems(name) == []


STAGES = 'FILE is not a DeepSpeed config: its ZeRO stage must be 0, 1, 2 or 3, as in {"zero'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "FILE is not a DeepSpeed config: Expecting property name"),
        ("", "FILE is not a DeepSpeed config: Expecting value"),
        ("[" * 100_000, "FILE is not a DeepSpeed config: maximum recursion depth"),
        ("[1]", "FILE is not a DeepSpeed config: it holds a list, not an object"),
        ("null", "FILE is not a DeepSpeed config: it holds a NoneType, not an object"),
        (" " * 300_000, "FILE cannot be read: it is larger than 256 KiB"),
        ({"zero_optimization": {"stage": 4}}, STAGES),
        ({"zero_optimization": {"stage": -1}}, STAGES),
        ({"zero_optimization": {"stage": "2"}}, STAGES),
        ({"zero_optimization": {"stage": 2.5}}, STAGES),
        ({"zero_optimization": {"stage": 2.0}}, STAGES),
        ({"zero_optimization": {"stage": True}}, STAGES),
        ({"zero_optimization": {"stage": None}}, STAGES),
        ({"zero_optimization": {"stage": [2]}}, STAGES),
        ({"zero_optimization": []}, STAGES),
        ({"zero_optimization": True}, STAGES),
        ({"zero_optimisation": {"stage": 2}}, "did you mean zero_optimization?"),
        ({"train_micro_batch_size": 4}, "did you mean train_micro_batch_size_per_gpu?"),
        ({"zero_optimization": {"stage": 2, "bucket": 5}}, "FILE is refused by DeepSpeed: "),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -5}}, "refused by DeepSpeed: "),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "mars"}}},
            "refused by DeepSpeed: ",
        ),
        ({"bf16": 5}, "FILE is refused by DeepSpeed: "),
        ({"bf16": {"enabled": "x"}}, "FILE is refused by DeepSpeed: "),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "simultaneously enabled"),
        ({"optimizer": 5}, "FILE is refused by DeepSpeed: "),
        ({"optimizer": {"type": "Foo"}}, "unknown optimizer 'Foo'"),
        (
            {"optimizer": {"type": "Lamb"}},
            "no checkpoint could store the state of Lamb by name; use one of adam, adamw, ",
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu", "ratio": 0.5},
                }
            },
            "offload_optimizer must be whole and to the device cpu",
        ),
        ({"scheduler": {"type": "Foo"}}, "unknown scheduler 'Foo'"),
        ({"activation_checkpointing": 5}, "FILE is refused by DeepSpeed: "),
        ({"elasticity": {"enabled": True}}, "FILE is refused by DeepSpeed: "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_that_cannot_work_is_refused_in_one_line(tmp_path, content, words, capfd):
    (problem,) = problems(tmp_path, content)
    assert problem.startswith("train.deepspeed: ") and words in problem
    assert "\n" not in problem and len(problem) < 600
    assert capfd.readouterr().out == "", "DeepSpeed prints every valid setting"


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "zero.json").write_bytes(b'{"a": "\xe9"}')
    (problem,) = deepspeed_problems(str(tmp_path / "zero.json"))
    assert problem.endswith("zero.json is not a DeepSpeed config: it is not UTF-8 text")


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (problem,) = deepspeed_problems(str(tmp_path / "fifo"))
    assert problem.endswith("fifo cannot be read: it is a pipe, a socket or a device, not a file")
    assert deepspeed_problems(str(tmp_path))[0].endswith("cannot be read: Is a directory")
    assert "is neither a file nor one of zero1" in deepspeed_problems("zero4")[0]
    with pytest.raises(ConfigError, match="No such file"):
        read_deepspeed("zero4")


@pytest.mark.parametrize(
    ("section", "setting"),
    [
        ("optimizer", {"gate_learning_rate": 0.01}),
        ("optimizer", {"optim": "adafactor"}),
        ("scheduler", {"gate_learning_rate": 0.01}),
        ("scheduler", {"lr_scheduler_type": "cosine"}),
    ],
)
def test_a_setting_that_a_section_of_the_file_replaces_is_refused(tmp_path, section, setting):
    """With its own optimizer, for example, all weights had one learning rate silently."""
    path, (key,) = tmp_path / "zero.json", setting
    plain = {"zero_optimization": {"stage": 2}}
    path.write_text(json.dumps(plain | {section: {"type": "X"}}))
    assert section_problems(TrainSettings(deepspeed=str(path))) == []
    assert section_problems(TrainSettings(deepspeed=str(path), **setting)) == [
        f"train.{key}: has no effect, because {path} has a section {section!r} of its own; remove "
        "one of them"
    ]
    path.write_text(json.dumps(plain))
    assert section_problems(TrainSettings(deepspeed=str(path), **setting)) == []
    assert section_problems(TrainSettings(deepspeed="zero2", **setting)) == []


@pytest.mark.parametrize("name", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_a_scheduler_of_the_file_that_takes_the_warmup_of_the_run_needs_one(tmp_path, name):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"scheduler": {"type": name}}))
    assert section_problems(TrainSettings(deepspeed=str(path))) == []
    assert section_problems(TrainSettings(deepspeed=str(path), warmup_steps=0)) == [
        f"train.warmup_steps: the scheduler of {path} needs at least 1"
    ]
    path.write_text(json.dumps({"scheduler": {"type": name, "params": {"warmup_num_steps": 5}}}))
    assert section_problems(TrainSettings(deepspeed=str(path), warmup_steps=0)) == []
    path.write_text(json.dumps({"scheduler": {"type": name, "params": 5}}))
    assert section_problems(TrainSettings(deepspeed=str(path), warmup_steps=0)) == []
