"""Every setting of a run: typed, with its unit and default, read from YAML, overridden by `section.key=value`, checked once.

Four sections (`model`, `method`, `data`, `train`). All problems of a config are reported together, before a model is
loaded: unknown keys (with the nearest valid name), wrong types, combinations that cannot work, settings that would have
no effect. `train` also takes any field of transformers' TrainingArguments.
"""

import dataclasses
import enum
import os
import re
import textwrap
import types
import typing
from typing import Annotated, Any, Callable, Literal

import pydantic
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from transformers import TrainingArguments

from scaleup.errors import ConfigError
from scaleup.settings.loading import Dumper, nearest, read, shown
from scaleup.settings.rules import MANAGED, ZERO_PRESETS, impossible, without_effect
from scaleup.unipelt.submodules import SUBMODULES

__all__ = [
    "ConfigError",
    "SUBMODULES",
    "ZERO_PRESETS",
    "Settings",
    "describe",
    "json_schema",
    "load",
    "to_yaml",
]

GLUE_TASKS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")

Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes


class Section(BaseModel):
    """What the sections share: no unknown keys, no infinities, and yes or no is not a number."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        if isinstance(value, bool) and bool not in _alternatives(
            cls.model_fields[info.field_name].annotation
        ):
            raise ValueError("should be a number or a text, not yes or no")
        return value


def _alternatives(hint: Any) -> set[Any]:
    """The types of a union, however nested."""
    parts = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )
    return {hint} if parts == (hint,) else set().union(*map(_alternatives, parts))


def _home(value: Any) -> Any:
    """A path may begin with ~: no shell expands it in a file."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


HOME = pydantic.BeforeValidator(_home)


class ModelSettings(Section):
    """The frozen backbone."""

    name: Annotated[str, HOME] = Field(
        "facebook/bart-large", min_length=1, description="Hub id or local folder of the backbone."
    )
    revision: str | None = Field(
        None, description="Hub branch, tag or commit; no effect on a local folder."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Storage type of the frozen weights. auto: bfloat16 where train.bf16 is on, else float32.",
    )
    quantization: Literal["none", "8bit", "nf4"] = Field(
        "none",
        description="Frozen linear weights in 8 bit (bitsandbytes; under ZeRO-3 scaleup's own, which are sharded) or 4 bit (NF4).",
    )
    attention: Literal["sdpa", "eager"] = Field(
        "sdpa", description="Attention implementation; eager is the slow, plain one."
    )
    head_bias: Literal["default", "prior"] = Field(
        "default",
        description="Where the bias of a fresh head starts. prior: at the mean of the training labels (regression), or the logarithms of the "
        "classes' shares; else the first hundreds of steps go into learning that constant. default: as transformers makes it, the paper's.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Only for models you trust."
    )


class MethodSettings(Section):
    """What is trained."""

    name: Literal["unipelt", "full", "bitfit"] = Field(
        "unipelt",
        description="unipelt; full: fine-tuning of every weight; bitfit: the biases only.",
    )
    submodules: list[Literal["adapter", "prefix", "lora"]] = Field(
        list(SUBMODULES), min_length=1, description="Any subset of adapter, prefix, lora."
    )
    gates: Literal["learned", "none"] | None = Field(
        None,
        description="learned, or none (NoGate). Default: learned for two or three submodules, none for one, as in the paper.",
    )
    gate_pooling: Literal["auto", "paper", "masked", "causal"] = Field(
        "auto",
        description="Mean of the per-token gates over: every position (paper), real tokens (masked), tokens so far (causal). "
        "auto: masked in bidirectional attention, causal in causal attention and its layer.",
    )
    adapter_size: PositiveInt = Field(48, description="Bottleneck size, units.")
    adapter_activation: Literal["relu", "gelu", "silu", "tanh"] = Field(
        "relu", description="Nonlinearity of the bottleneck."
    )
    prefix_length: PositiveInt = Field(
        10, description="Learned keys and values in front of each attention, positions."
    )
    prefix_hidden_size: PositiveInt = Field(
        512, description="Hidden size of the MLP that produces the prefix, units."
    )
    prefix_reparameterization: Literal["mlp", "none"] = Field(
        "mlp",
        description="Train the prefix through an MLP (paper; ~10M more weights while training), or directly.",
    )
    r: PositiveInt = Field(8, description="Rank of the LoRA update.")
    lora_alpha: PositiveFloat = Field(
        16, description="Ungated LoRA is scaled by alpha/r; a learned gate replaces that factor."
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the input of LoRA, probability."
    )

    @pydantic.field_validator("submodules")
    @classmethod
    def _unique(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("names a submodule twice")
        return [name for name in SUBMODULES if name in value]

    @property
    def resolved_gates(self) -> Literal["learned", "none"]:
        """One submodule alone is ungated in the paper; asking for `gates: learned` gates it all the same."""
        return self.gates or ("learned" if len(self.submodules) > 1 else "none")


class DataSettings(Section):
    """Where examples come from and how they become batches."""

    name: Literal[GLUE_TASKS] | None = Field(
        None, description="GLUE task by name; leave out for your own files."
    )
    task: Literal["sequence_classification", "regression", "seq2seq", "causal_lm"] | None = Field(
        None,
        description="Kind of task. Default: the GLUE task's own, else sequence_classification. seq2seq: write a target for a text "
        "(encoder-decoder models); causal_lm: complete a prompt or a chat (decoders).",
    )
    path: Annotated[str | None, HOME] = Field(
        None,
        description="Local folder with <task>/{train,validation}.parquet, or the task's own; or a hub dataset id. Default: nyu-mll/glue.",
    )
    train_file: Annotated[str | None, HOME] = Field(
        None, description="Your own training data: .csv, .tsv, .jsonl, .json (lines) or .parquet."
    )
    validation_file: Annotated[str | None, HOME] = Field(
        None, description="Your own development data, same columns."
    )
    test_file: Annotated[str | None, HOME] = Field(
        None, description="Your own test data, same columns; scored once, at the end."
    )
    text_column: str = Field(
        "text", min_length=1, description="Column with the text, for your own files."
    )
    text_pair_column: str | None = Field(
        None, description="Column with the second text of a pair, for your own files."
    )
    label_column: str = Field(
        "label",
        min_length=1,
        description="Column with the class name or number, for your own files.",
    )
    target_column: str = Field(
        "target",
        min_length=1,
        description="Column with the text to write, for seq2seq and causal_lm.",
    )
    messages_column: str | None = Field(
        None,
        description="causal_lm: column with chats, lists of {role, content} that end with the assistant, instead of text and target.",
    )
    k: PositiveInt | Literal["all"] = Field(
        "all",
        description="Training examples: the first K of the shuffled training set (low-resource protocol), or all.",
    )
    dev_size: PositiveInt = Field(
        1000,
        description="Development examples cut from the training set: after the first K, or with k all and no validation set.",
    )
    seed: Seed = Field(
        0, description="Seed of the shuffle that picks the K training and the development examples."
    )
    metric: (
        Literal["accuracy", "f1", "matthews", "spearman", "bleu", "rouge_l", "exact_match", "loss"]
        | None
    ) = Field(
        None,
        description="Metric that picks the best checkpoint. Default: the GLUE task's; accuracy or spearman for your own files; bleu for "
        "seq2seq; loss for causal_lm, where nothing is written in evaluation unless another metric asks for it.",
    )
    max_length: PositiveInt = Field(
        128,
        description="Longest input, tokens; longer ones are cut. causal_lm: prompt and completion together.",
    )
    max_target_length: PositiveInt = Field(
        128, description="Longest target of seq2seq, and most tokens written in evaluation."
    )
    num_beams: PositiveInt = Field(
        1, description="Beams with which texts are written in evaluation; 1: greedy."
    )
    packing: bool = Field(
        False,
        description="causal_lm: join texts in rows of max_length tokens; they do not see each other.",
    )
    pad_to_max_length: bool = Field(
        False,
        description="Pad every batch to max_length (paper) instead of to its longest example.",
    )


# The paper's learning rates (section 4.1): one for each method alone, 5e-4 for LoRA and every combination.
LEARNING_RATES = {
    "full": 2e-5,
    "bitfit": 1e-3,
    "adapter": 1e-4,
    "prefix": 2e-4,
    "lora": 5e-4,
    "unipelt": 5e-4,
}


class _Train(Section):
    """How it is trained. Any other field of transformers' TrainingArguments passes through."""

    output_dir: Annotated[str, HOME] = Field(
        "runs/unipelt", min_length=1, description="Folder for everything the run leaves."
    )
    resume: Literal["never", "auto", "weights_only"] = Field(
        "never",
        description="auto: continue from the newest checkpoint in output_dir. weights_only: where its optimizer state does not fit "
        "(another number of processes or ZeRO stage), start anew from its trained weights.",
    )
    keep_checkpoints: PositiveInt = Field(
        2, description="Newest checkpoint-N folders to keep, besides the best one."
    )
    early_stopping_patience: NonNegativeInt = Field(
        10,
        description="Stop after this many evaluations without a better dev metric; 0: never stop early.",
    )
    learning_rate: PositiveFloat | None = Field(
        None, description="Peak rate of AdamW. Default: the paper's for the method."
    )
    num_train_epochs: PositiveFloat = Field(
        50, description="Passes over the training set, at most; train.max_steps goes before."
    )
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps; -1: num_train_epochs decides.")
    per_device_train_batch_size: PositiveInt = Field(
        16, description="Examples per process and forward pass."
    )
    per_device_eval_batch_size: PositiveInt = Field(
        64, description="Examples per process and forward pass in evaluation."
    )
    gradient_accumulation_steps: PositiveInt = Field(
        1, description="Forward passes per optimizer step."
    )
    warmup_steps: NonNegativeFloat = Field(
        0.06, description="Linear warmup: steps, or below 1 the share of all steps."
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="Decoupled weight decay of AdamW.")
    seed: Seed = Field(42, description="Seed of initialisation, dropout and the order of batches.")
    bf16: Literal["auto"] | bool = Field(
        "auto", description="bfloat16 autocast. auto: on where the GPU computes in it, off on CPU."
    )
    fp16: bool = Field(
        False, description="float16 autocast with loss scaling, for GPUs without bfloat16."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
    group_by_length: bool = Field(
        True, description="Batches of similar length; no effect with data.pad_to_max_length."
    )
    deepspeed: str | None = Field(
        None,
        description="ZeRO preset (zero1, zero2, zero3, zero3_offload) or a DeepSpeed JSON file.",
    )
    logging_steps: NonNegativeFloat = Field(
        10, description="Optimizer steps between lines of log.jsonl; below 1: share of all steps."
    )
    report_to: list[str] | str = Field("none", description="Trackers: tensorboard, wandb, …; none.")

    @property
    def training_arguments(self) -> dict[str, Any]:
        """The fields that go to TrainingArguments as they stand: our defaults, and what the user set beyond them."""
        own = {
            "resume",
            "keep_checkpoints",
            "early_stopping_patience",
            "learning_rate",
            "bf16",
            "group_by_length",
            "deepspeed",
        }
        return {
            k: getattr(self, k)
            for k in type(self).model_fields
            if k not in own and (k in _Train.model_fields or k in self.model_fields_set)
        }


def _enum_only(hint: Any) -> Any:
    """`SchedulerType | str` would take any text; the enumeration alone takes its values, written as text."""
    kinds = [t for t in typing.get_args(hint) if isinstance(t, type) and issubclass(t, enum.Enum)]
    return kinds[0] if kinds and str in typing.get_args(hint) else hint


def _pass_through() -> dict[str, tuple[Any, Any]]:
    """Fields of TrainingArguments that `train` takes besides its own, with their types."""
    hints = {
        name: _enum_only(hint) for name, hint in typing.get_type_hints(TrainingArguments).items()
    }
    names = [
        f.name
        for f in dataclasses.fields(TrainingArguments)
        if f.init and not f.name.startswith("_")
    ]
    return {
        name: (hints[name] | None, Field(None, description="transformers.TrainingArguments"))
        for name in names
        if name not in _Train.model_fields and name not in MANAGED
    }


TrainSettings = pydantic.create_model(
    "TrainSettings", __base__=_Train, __doc__=_Train.__doc__, **_pass_through()
)


class Settings(Section):
    """A whole run."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    method: MethodSettings = Field(default_factory=MethodSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)

    @property
    def learning_rate(self) -> float:
        """The rate set, or the paper's for this method."""
        if self.train.learning_rate is not None:
            return self.train.learning_rate
        alone = self.method.name == "unipelt" and len(self.method.submodules) == 1
        return LEARNING_RATES[self.method.submodules[0] if alone else self.method.name]

    def dump(self) -> dict[str, dict[str, Any]]:
        """The resolved run: defaults filled in, settings without effect left out, so that it loads again as it is."""
        idle = without_effect({name: getattr(self, name) for name in SECTIONS})
        out: dict[str, dict[str, Any]] = {}
        for name in SECTIONS:
            section = getattr(self, name)
            shown = (
                section.model_fields_set | set(_Train.model_fields)
                if name == "train"
                else set(type(section).model_fields)
            )
            values = section.model_dump(mode="json", include=shown)
            out[name] = {k: v for k, v in values.items() if f"{name}.{k}" not in idle}
        if self.method.name == "unipelt":
            out["method"]["gates"] = self.method.resolved_gates
        out["train"]["learning_rate"] = self.learning_rate
        return out


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "method": MethodSettings,
    "data": DataSettings,
    "train": TrainSettings,
}


def _section_problems(name: str, error: pydantic.ValidationError) -> list[str]:
    """One sentence per key. Alternatives of a union are reported together, not one by one."""
    by_key: dict[str, list[str]] = {}
    model = SECTIONS[name]
    for item in error.errors():
        key = str(item["loc"][0]) if item["loc"] else ""
        if item["type"] == "extra_forbidden":
            if name == "train" and key in MANAGED:
                message = f"is decided by scaleup: {MANAGED[key]}"
            else:
                message = "unknown setting" + nearest(key, model.model_fields)
        else:
            message = (
                re.sub(r"^(Value error, |Input )", "", item["msg"])
                + f" (got {shown(item['input'])})"
            )
        by_key.setdefault(key, []).append(message)
    return [f"{name}.{key}: {'; or '.join(dict.fromkeys(found))}" for key, found in by_key.items()]


def load(
    path: str | None,
    overrides: typing.Sequence[str] = (),
    checks: typing.Sequence[Callable[[dict[str, Section]], list[str]]] = (),
) -> Settings:
    """Reads and checks a config.

    `overrides` are `section.key=value` with YAML values. Each of `checks` gets the valid sections by name and returns
    further problems (files, columns, labels). Raises ConfigError with every problem found.
    """
    raw, problems = read(path, overrides, tuple(SECTIONS))
    sections: dict[str, Section] = {}
    for name, cls in SECTIONS.items():
        try:
            sections[name] = cls.model_validate(raw.get(name, {}))
        except pydantic.ValidationError as error:
            problems += _section_problems(name, error)
    for key, why in without_effect(sections).items():
        section, _, field = key.partition(".")
        # Saying the default out loud is no mistake; a value that would be ignored is.
        if (
            field in sections[section].model_fields_set
            and getattr(sections[section], field)
            != type(sections[section]).model_fields[field].get_default()
        ):
            problems.append(f"{key}: has no effect here ({why}); remove it")
    problems += impossible(sections)
    for check in checks:
        problems += check(sections)
    if problems:
        raise ConfigError(problems)
    return Settings(**sections)


def to_yaml(settings: Settings) -> str:
    """The resolved config as YAML; `load` reads it back to the same run."""
    return yaml.dump(settings.dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def describe(columns: int = 100) -> str:
    """Describe every setting with its default, by section, in lines of at most `columns`."""
    lines = []
    for name, cls in SECTIONS.items():
        lines += ["", *textwrap.wrap(f"{name}: {cls.__doc__}", columns)]
        for field, info in (_Train if name == "train" else cls).model_fields.items():
            default = "" if info.default is None else f" [{info.get_default()}]"
            lines.append(f"  {name}.{field}{default}")
            indent = " " * 6
            lines += textwrap.wrap(
                info.description or "", columns, initial_indent=indent, subsequent_indent=indent
            )
    return "\n".join(lines)


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file, for editors (configs/schema.json)."""
    schema = Settings.model_json_schema()
    schema["properties"]["method"] = {
        "anyOf": [
            schema["properties"]["method"],
            {"type": "string", "enum": ["unipelt", "full", "bitfit"]},
        ]
    }
    return schema | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "scaleup run",
    }
