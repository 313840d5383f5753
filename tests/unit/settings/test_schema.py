"""Settings: defaults, fields of TrainingArguments, and that a written config loads again."""

import dataclasses

import pytest
from transformers import TrainingArguments

from scaleup.settings import rules
from scaleup.settings import schema as config
from scaleup.settings.describe import describe
from scaleup.settings.schema import load
from scaleup.unipelt.config import UniPeltConfig
from scaleup.unipelt.submodules import SUBMODULES
from tests.utils.configs import GLUE, problems, write

CHECKPOINTING = "train.gradient_checkpointing_kwargs"


def test_the_defaults_are_the_papers():
    run = load(None, [GLUE])
    method, train = run.method, run.train
    assert (method.name, method.submodules, method.resolved_gates) == (
        "unipelt",
        ["adapter", "prefix", "lora"],
        "learned",
    )
    assert (
        method.adapter_size,
        method.adapter_activation,
        method.prefix_length,
        method.prefix_hidden_size,
    ) == (48, "relu", 10, 512)
    assert (method.r, method.lora_alpha, method.lora_dropout, method.prefix_reparameterization) == (
        8,
        16,
        0,
        "mlp",
    )
    assert (run.learning_rate, train.num_train_epochs, train.early_stopping_patience) == (
        5e-4,
        50,
        10,
    )
    assert (
        train.per_device_train_batch_size,
        train.warmup_steps,
        train.weight_decay,
        run.data.dev_size,
    ) == (16, 0.06, 0, 1000)
    assert run.model.name == "facebook/bart-large"


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        (["method=full"], 2e-5),
        (["method=bitfit"], 1e-4),
        (["method.submodules=[adapter]"], 1e-4),
        (["method.submodules=[prefix]"], 2e-4),
        (["method.submodules=[lora]"], 5e-4),
        (["method.submodules=[adapter, prefix]"], 5e-4),
        (["method=full", "train.learning_rate=0.1"], 0.1),
    ],
)
def test_the_learning_rate_is_the_papers_for_the_method_unless_set(overrides, rate):
    assert load(None, [GLUE, *overrides]).learning_rate == rate


@pytest.mark.parametrize(
    ("overrides", "gates"),
    [
        (["method.submodules=[lora]"], "none"),
        (["method.submodules=[lora]", "method.gates=learned"], "learned"),
        (["method.submodules=[lora, adapter]"], "learned"),
        (["method.gates=none"], "none"),
    ],
)
def test_one_submodule_alone_is_ungated_unless_asked_for(overrides, gates):
    assert load(None, [GLUE, *overrides]).method.resolved_gates == gates


def test_the_settings_of_the_method_are_those_of_the_peft_config():
    peft_config, settings = UniPeltConfig(), config.MethodSettings()
    names = set(config.MethodSettings.model_fields) - {"name"}
    assert {"submodules", "gates", "gate_pooling", "adapter_size", "prefix_length", "r"} <= names
    for name in names - {"gates"}:
        assert getattr(settings, name) == getattr(peft_config, name), name
    assert settings.resolved_gates == peft_config.gates
    for submodule in SUBMODULES.values():
        declared = {field.name for field in dataclasses.fields(submodule.options)}
        alone = [name for name in SUBMODULES if name != submodule.name][:1]
        run = load(None, [GLUE, f"method.submodules=[{alone[0]}]"])
        idle = rules.without_effect({name: getattr(run, name) for name in config.SECTIONS})
        assert {f"method.{name}" for name in declared} <= set(idle)


def test_submodules_have_one_order_whatever_the_order_written():
    assert load(None, [GLUE, "method.submodules=[lora, adapter]"]).method.submodules == [
        "adapter",
        "lora",
    ]


@pytest.mark.parametrize("section", config.SECTIONS)
def test_every_setting_and_section_is_described(section):
    cls = config.SECTIONS[section]
    assert (cls.__doc__ or "").strip()
    assert [
        name for name, field in cls.model_fields.items() if not (field.description or "").strip()
    ] == []
    own = config.DeclaredTrainSettings if section == "train" else cls
    shown = describe()
    assert [name for name in own.model_fields if f"  {section}.{name}" not in shown] == []


# TrainingArguments


@pytest.mark.parametrize("name", sorted(rules.MANAGED))
def test_a_field_the_run_decides_is_refused_with_the_reason(name):
    assert problems(GLUE, f"train.{name}=true") == [
        f"train.{name}: is decided by scaleup: {rules.MANAGED[name]}"
    ]


def test_every_managed_field_exists_in_transformers():
    # transformers renames such fields now and then, and a stale name here would protect nothing.
    assert set(rules.MANAGED) - set(TrainingArguments.__dataclass_fields__) == set()


def test_fields_of_training_arguments_pass_through_with_their_types():
    run = load(
        None,
        [
            GLUE,
            "train.max_grad_norm=0.5",
            "train.lr_scheduler_type=cosine",
            "train.dataloader_num_workers=2",
        ],
    )
    arguments = run.train.training_arguments
    assert {
        k: arguments[k]
        for k in (
            "max_grad_norm",
            "lr_scheduler_type",
            "dataloader_num_workers",
            "weight_decay",
            "seed",
        )
    } == {
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "cosine",
        "dataloader_num_workers": 2,
        "weight_decay": 0.0,
        "seed": 42,
    }
    assert "adam_beta1" not in arguments, "what the user leaves alone keeps the Trainer's default"
    assert set(arguments) <= set(TrainingArguments.__dataclass_fields__)
    assert problems(GLUE, "train.max_grad_norm=much")[0].startswith("train.max_grad_norm: ")
    assert problems(GLUE, "train.lr_scheduler_type=circle")[0].startswith(
        "train.lr_scheduler_type: "
    )


# Writing


@pytest.mark.parametrize(
    "overrides",
    [
        [GLUE],
        [GLUE, "method=full", "data.k=100", "data.seed=3"],
        [GLUE, "method=bitfit", "train.max_steps=7", "train.max_grad_norm=0.5"],
        [GLUE, "method.submodules=[lora]", "method.lora_alpha=4", "train.learning_rate=1e-5"],
        [GLUE, "method.submodules=[lora]", "method.gates=learned", "method.gate_pooling=causal"],
        [
            GLUE,
            "method.submodules=[prefix, adapter]",
            "method.prefix_reparameterization=none",
            "train.report_to=[tensorboard, wandb]",
        ],
        [
            GLUE,
            "method.gates=none",
            "train.gradient_checkpointing=true",
            f"{CHECKPOINTING}={{use_reentrant: false}}",
        ],
        [
            "data.train_file='ünï code: 1.csv'",
            'data.text_column="5e-4"',
            "data.pad_to_max_length=true",
            "data.task=regression",
        ],
        [
            GLUE,
            "train.deepspeed=zero3",
            "train.bf16=true",
            "train.lr_scheduler_type=cosine",
            "train.warmup_steps=1e-2",
        ],
    ],
    ids=" ".join,
)
def test_what_is_written_loads_to_the_same_run(tmp_path, overrides):
    run = load(None, overrides)
    again = load(write(tmp_path, config.to_yaml(run)))
    assert again.dump() == run.dump() and config.to_yaml(again) == config.to_yaml(run)
    assert (
        again.learning_rate == run.learning_rate
        and again.method.resolved_gates == run.method.resolved_gates
    )
    idle = rules.without_effect({name: getattr(run, name) for name in config.SECTIONS})
    mine, theirs = run.model_dump(), again.model_dump()
    same = {"method.gates", "train.learning_rate"}  # resolved in the file
    for name in config.SECTIONS:
        differ = {f"{name}.{key}" for key in mine[name] if mine[name][key] != theirs[name][key]}
        assert differ - same - set(idle) == set()
    if run.data.k != "all":
        assert (again.data.seed, again.data.k) == (run.data.seed, run.data.k)


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert (
        config.TrainSettings(output_dir="~/run").output_dir == "/home/me/run"
        and config.ModelSettings(name="~/bert").name == "/home/me/bert"
    )
