"""The sections of a config, typed: `model`, `method`, `data` and `train`.

Every setting has a type, a default, bounds and a description. All problems of a config are reported
together, before a model is loaded: unknown keys (with the nearest valid name), wrong types,
combinations that cannot work, and settings that would have no effect. The settings of the method
are those of `UniPeltConfig`, and `train` also takes any field of transformers' TrainingArguments.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field

from scaleup.errors import ConfigError
from scaleup.settings.data import Count, DataSettings, Path, Seed
from scaleup.settings.derived import MOST, Section, method_fields, trainer_fields
from scaleup.settings.loading import Dumper, alternatives_problem, read, validation_problem
from scaleup.settings.rules import MANAGED, impossible, without_effect
from scaleup.unipelt.submodules import SUBMODULES

BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]
LearningRate = Annotated[float, Field(gt=0, le=100)]


class ModelSettings(Section):
    """The frozen backbone."""

    name: Path = Field("facebook/bart-large", min_length=1)
    """Hub id or local folder of the backbone."""
    revision: str | None = None
    """Branch, tag or commit on the hub; has no effect on a local folder."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Storage type of the frozen weights. auto: bfloat16 where train.bf16 is on, else float32."""
    quantization: Literal["none", "8bit", "nf4"] = "none"
    """Quantise frozen linear weights to int8 (by bitsandbytes; under ZeRO-3 and FSDP by scaleup,
    which shards them) or to 4 bits (NF4)."""
    attention: Literal["sdpa", "flash", "eager"] = "sdpa"
    """Attention implementation. flash: torch's flash kernel on a GPU in half precision, without
    masks for padded batches and packed rows. eager is slow but works for every model."""
    head_bias: Literal["default", "prior"] = "default"
    """Initial bias of a new head. prior: the mean of the training labels (regression) or the
    logarithms of the class shares, which saves the hundreds of steps that learn this constant.
    default: as transformers makes it, as in the paper."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models you trust."""

    @property
    def portable_attention(self) -> str:
        """Return an implementation of the same attention that needs neither GPU nor scaleup."""
        return "sdpa" if self.attention == "flash" else self.attention


class _Method(Section):
    name: Literal["unipelt", "full", "bitfit"] = "unipelt"
    """unipelt; full: fine-tuning of every weight; bitfit: the biases only."""


_Options: Any = pydantic.create_model("_Options", __base__=_Method, **method_fields())


class MethodSettings(_Options):
    """What is trained."""

    if TYPE_CHECKING:  # the fields of UniPeltConfig

        def __getattr__(self, name: str) -> Any: ...

    @pydantic.field_validator("submodules", check_fields=False)
    @classmethod
    def _sort_submodules(cls, names: list[str]) -> list[str]:
        if len(set(names)) != len(names):
            raise ValueError("names a submodule twice")
        return [name for name in SUBMODULES if name in names]

    @property
    def resolved_gates(self) -> Literal["learned", "none"]:
        """`gates`; by default one submodule alone is ungated, as in the paper."""
        default: Literal["learned", "none"] = "learned" if len(self.submodules) > 1 else "none"
        return self.gates or default


# What a run did before the setting existed, where that is not the default.
EARLIER = {"data": {"train_on": "last"}}

# The paper's learning rates (section 4.1). A submodule states the one that it has when it is alone.
LEARNING_RATES = {"full": 2e-5, "bitfit": 1e-4, "unipelt": 5e-4}


# Settings of `train` that reach TrainingArguments under another name or not at all.
_TRANSLATED = {"resume", "keep_checkpoints", "early_stopping_patience", "learning_rate", "bf16"}
_TRANSLATED |= {"push_to_hub", "hub_model_id", "hub_private_repo"}
_TRANSLATED |= {"group_by_length", "deepspeed", "fsdp", "gate_learning_rate", "cuda_graphs"}


class DeclaredTrainSettings(Section):
    """The settings of `train` with defaults of their own."""

    output_dir: Path = Field("runs/unipelt", min_length=1)
    """Folder for everything that the run leaves."""
    resume: Literal["never", "auto", "weights_only"] = "never"
    """auto: continue from the newest checkpoint in output_dir. weights_only: start anew from
    its trained weights, where the state of its training does not fit (another optimizer, schedule
    or number of examples in a step)."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoint-N folders to keep, besides the best one."""
    early_stopping_patience: int = Field(10, ge=0, le=MOST)
    """Stop after this many evaluations without a better dev metric; 0: never."""
    learning_rate: LearningRate | None = None
    """Peak learning rate of AdamW. Default: the paper's for the method."""
    gate_learning_rate: LearningRate | None = None
    """Peak learning rate of the gates. Default: that of everything else (paper)."""
    num_train_epochs: float = Field(50, gt=0, le=1e6)
    """Largest number of passes over the training set; train.max_steps overrides it."""
    max_steps: int = Field(-1, ge=-1, le=MOST)
    """Number of optimizer steps; -1: num_train_epochs decides."""
    per_device_train_batch_size: BatchSize = 16
    """Examples per process and forward pass."""
    per_device_eval_batch_size: BatchSize = 64
    """Examples per process and forward pass in evaluation."""
    gradient_accumulation_steps: BatchSize = 1
    """Forward passes per optimizer step."""
    warmup_steps: float = Field(0.06, ge=0, le=MOST)
    """Linear warmup: number of steps or, below 1, the share of all steps."""
    weight_decay: float = Field(0.0, ge=0, le=10)
    """Decoupled weight decay of AdamW."""
    seed: Seed = 42
    """Seed of initialisation, dropout and the order of batches."""
    bf16: Literal["auto"] | bool = "auto"
    """bfloat16 autocast. auto: on where the GPU's hardware computes in it (emulation does not
    count), off on CPU."""
    fp16: bool = False
    """float16 autocast with loss scaling, for GPUs without bfloat16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    cuda_graphs: bool = False
    """Record each training step once per batch length (in multiples of 32 tokens) and repeat it as
    a CUDA graph, which makes steps of small batches several times as fast. One process on one GPU,
    without DeepSpeed, quantisation, torch_compile and gradient_checkpointing."""
    group_by_length: bool = True
    """Form batches of similar length; has no effect with data.pad_to_max_length."""
    deepspeed: Path | None = None
    """ZeRO preset (zero1, zero2, zero3, zero3_hpz, zero3_offload) or a DeepSpeed JSON file."""
    fsdp: Literal["full", "hybrid"] | None = None
    """Shard the frozen weights with torch's FSDP2, without DeepSpeed. full: among all processes.
    hybrid: among those of each host, which keeps the gathering within hosts. What is trained is
    whole on every process, so that checkpoints are those of a run without it."""
    logging_steps: float = Field(10, ge=0, le=MOST)
    """Optimizer steps between lines of log.jsonl or, below 1, the share of all steps."""
    push_to_hub: bool = False
    """Upload the best checkpoint to the Hugging Face hub once the run is complete."""
    hub_model_id: str | None = Field(None, min_length=1)
    """push_to_hub: the repository, such as me/film-reviews."""
    hub_private_repo: bool = False
    """push_to_hub: whether a new repository can only be seen by its owner."""
    report_to: list[str] | str = "none"
    """Trackers such as tensorboard or wandb; none: no tracker."""

    @property
    def training_arguments(self) -> dict[str, Any]:
        """The fields that TrainingArguments takes unchanged: scaleup's and those that were set."""
        names = {*DeclaredTrainSettings.model_fields, *self.model_fields_set} - _TRANSLATED
        return {name: getattr(self, name) for name in type(self).model_fields if name in names}


_Arguments: Any = pydantic.create_model(
    "_Arguments",
    __base__=DeclaredTrainSettings,
    **trainer_fields(excluded=DeclaredTrainSettings.model_fields),
)


class TrainSettings(_Arguments):
    """How it is trained. Any other field of transformers' TrainingArguments passes through."""

    if TYPE_CHECKING:  # the fields of TrainingArguments

        def __getattr__(self, name: str) -> Any: ...


class Settings(Section):
    """A whole run."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    method: MethodSettings = Field(default_factory=MethodSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)

    @property
    def learning_rate(self) -> float:
        """`train.learning_rate`; by default the paper's for this method."""
        if self.train.learning_rate is not None:
            return float(self.train.learning_rate)
        if self.method.name == "unipelt" and len(self.method.submodules) == 1:
            return SUBMODULES[self.method.submodules[0]].learning_rate
        return LEARNING_RATES[self.method.name]

    def dump(self) -> dict[str, dict[str, Any]]:
        """Return the resolved run, which loads again unchanged.

        Defaults are filled in and settings without effect are left out.
        """
        idle = without_effect({name: getattr(self, name) for name in SECTIONS})
        sections: dict[str, dict[str, Any]] = {}
        for name, cls in SECTIONS.items():
            section = getattr(self, name)
            shown = set(cls.model_fields)
            if name == "train":
                shown = section.model_fields_set | set(DeclaredTrainSettings.model_fields)
            values = section.model_dump(mode="json", include=shown)
            sections[name] = {k: v for k, v in values.items() if f"{name}.{k}" not in idle}
        if self.method.name == "unipelt":
            sections["method"]["gates"] = self.method.resolved_gates
        sections["train"]["learning_rate"] = self.learning_rate
        return sections


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "method": MethodSettings,
    "data": DataSettings,
    "train": TrainSettings,
}


def _section_problems(name: str, error: pydantic.ValidationError) -> list[str]:
    """Return one sentence per key, which names all alternatives of a union."""
    by_key: dict[str, list[dict[str, Any]]] = {}
    for item in error.errors():
        by_key.setdefault(str(item["loc"][0]) if item["loc"] else "", []).append(dict(item))
    problems = []
    for key, items in by_key.items():
        messages = [validation_problem(item, SECTIONS[name].model_fields) for item in items]
        message = "; or ".join(dict.fromkeys(messages))
        if name == "train" and key in MANAGED:
            message = f"is decided by scaleup: {MANAGED[key]}"
        elif len(items) > 1:
            message = alternatives_problem(items) or message
        problems.append(f"{name}.{key}: {message}")
    return problems


def load(
    path: str | None,
    overrides: Sequence[str] = (),
    checks: Sequence[Callable[[dict[str, Section]], list[str]]] = (),
    earlier: bool = False,
) -> Settings:
    """Read and check a config.

    Args:
        path: YAML file; None: the defaults.
        overrides: words `section.key=value` with YAML values.
        checks: further checks, such as `scaleup.training.preflight.CHECKS`. Each gets the valid
            sections by name and returns its problems.
        earlier: whether an earlier version may have written the file. It may then have settings
            without effect that were not refused yet.

    Raises:
        ConfigError: lists every problem."""
    raw, problems = read(path, overrides, tuple(SECTIONS))
    sections: dict[str, Section] = {}
    for name, cls in SECTIONS.items():
        try:
            sections[name] = cls.model_validate(raw.get(name, {}))
        except pydantic.ValidationError as error:
            problems += _section_problems(name, error)
    for key, reason in () if earlier else without_effect(sections).items():
        name, _, field = key.partition(".")
        section = sections[name]
        default = type(section).model_fields[field].get_default(call_default_factory=True)
        # Only a value other than the default would be ignored.
        if field in section.model_fields_set and getattr(section, field) != default:
            problems.append(f"{key}: has no effect here ({reason}); remove it")
    problems += impossible(sections)
    for check in checks:
        problems += check(sections)
    if problems:
        raise ConfigError(problems)
    return Settings.model_validate(sections)


def stored(path: str | None, overrides: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Return the resolved run that a run's config.yaml, or its settings as overrides, describes.

    Settings that are missing have their defaults: an earlier version wrote the run without them.

    Raises:
        ConfigError: the file is damaged.
    """
    return load(path, [*earlier_settings(path), *overrides], earlier=True).dump()


def earlier_settings(path: str | None) -> list[str]:
    """Return, as overrides, what the run of a config.yaml did before a setting for it existed."""
    data = {} if path is None else read(path, [], ["data"])[0].get("data", {})
    if data.get("messages_column") is None or "train_on" in data:
        return []
    return [f"data.{key}={value}" for key, value in EARLIER["data"].items()]


def to_yaml(settings: Settings) -> str:
    """Return the resolved config as YAML, which `load` reads back to the same run."""
    return str(yaml.dump(settings.dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True))
