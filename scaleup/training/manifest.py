"""The manifest of a checkpoint: what the checkpoint was trained on, and its files."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any, Literal, NotRequired

import pydantic
from typing_extensions import TypedDict

from scaleup.errors import CheckpointError, ConfigError
from scaleup.io import read_json
from scaleup.settings.data import DataSettings
from scaleup.settings.derived import Section
from scaleup.settings.loading import flat
from scaleup.settings.schema import EARLIER, MethodSettings, ModelSettings, Settings

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
ALTERED = "the checkpoint was altered; copy it again from where it was trained"
# Optimizer, schedule and order of examples depend on these settings. The other settings of the
# section may change when a run continues.
FIXED_IN_TRAINING = (
    "learning_rate gate_learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps"
    " weight_decay optim optim_args adam_beta1 adam_beta2 adam_epsilon seed group_by_length"
)
# Paths may change when folders move. The fingerprint of the backbone and the hashes of the data
# cover what the paths name. The section `method` is in the manifest itself.
PATHS = ("model.name", "data.path", "data.train_file", "data.validation_file", "data.test_file")
# Where and how data is prepared does not change it.
ANY = ("data.cache_dir", "data.workers")


class _Method(TypedDict):
    name: Literal["unipelt", "full", "bitfit"]
    submodules: NotRequired[list[str]]


class _Backbone(TypedDict):
    name: str
    revision: str | None
    quantization: str
    fingerprint: str
    dtype: NotRequired[str]


class _Source(TypedDict):
    split: str
    sha256: NotRequired[str]


class _Run(TypedDict):
    processes: int
    zero_stage: int


class _Tensor(TypedDict):
    shape: list[int]
    dtype: str
    sha256: str


class _File(TypedDict):
    bytes: int
    sha256: str


class _Content(pydantic.BaseModel, strict=True):
    """The types of the entries of a manifest."""

    method: _Method
    backbone: _Backbone
    task: str
    labels: list[str] | None
    data: list[_Source]
    run: _Run
    export: str | None = None
    config: dict[str, str] | None = None
    tensors: dict[str, _Tensor]
    files: dict[str, _File]
    format_version: int

    @pydantic.model_validator(mode="after")
    def _check(self) -> "_Content":
        if self.method["name"] == "unipelt" and not self.method.get("submodules"):
            raise ValueError("method has no submodules")
        return self


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        method: the run's section of that name.
        backbone: name, revision, quantization, fingerprint, and `dtype`, the data type in which the
            run stored it (missing in checkpoints of earlier versions).
        labels: class names in id order, or None for other tasks.
        data: file, rows and hash of every split (`scaleup.data.classification.provenance`).
        run: `processes` and `zero_stage` that the checkpoint was trained with.
        export: kind of an exported folder, or None for a checkpoint of a run.
        config: hash of every setting that the checkpoint depends on (`setting_hashes`), or None in
            checkpoints of earlier versions.
        tensors: shape, data type and hash of every tensor. `commit_checkpoint` fills this in.
        files: size and hash of every other file. `commit_checkpoint` fills this in.
    """

    method: dict[str, Any]
    backbone: dict[str, str | None]
    task: str
    labels: list[str] | None
    data: list[dict[str, Any]]
    run: dict[str, int]
    export: str | None = None
    config: dict[str, str] | None = None
    tensors: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        content = dataclasses.asdict(self)
        for name in ("export", "config"):
            if content[name] is None:
                del content[name]
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Manifest":
        """Read the manifest of a checkpoint; if that is impossible, raise CheckpointError."""
        path = folder / MANIFEST
        if not path.is_file():
            problem = f"no {MANIFEST}; this is not a finished checkpoint of scaleup"
            raise CheckpointError(f"{folder}: {problem}")
        try:
            content = read_json(path)
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(f"{path}: not readable ({reason}); {ALTERED}") from None
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            problem = f"format version {version!r:.40}; this scaleup reads {FORMAT_VERSION}"
            raise CheckpointError(f"{folder}: {problem}")
        unknown = content.keys() - _Content.model_fields.keys()
        if unknown:
            raise CheckpointError(f"{path}: unknown entry {min(unknown):.40}; {ALTERED}")
        try:
            _Content.model_validate(content)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))[:100]
            text = f"{where}: {first['msg']}" if where else first["msg"]
            raise CheckpointError(f"{path}: {text}; {ALTERED}") from None
        return cls(**content)

    def check_settings(self, settings: Settings, path: pathlib.Path) -> None:
        """Raise ConfigError if the settings in the file `path` are not those of the checkpoint."""
        try:
            trained = MethodSettings.model_validate(self.method)
        except pydantic.ValidationError as error:
            key = ".".join(map(str, error.errors()[0]["loc"]))
            raise CheckpointError(f"{MANIFEST}: method.{key} is not valid; {ALTERED}") from None
        now = settings.dump()["method"]
        then = settings.model_copy(update={"method": trained}).dump()["method"]
        different = [
            f"method.{key}"
            for key in sorted(now.keys() | then.keys())
            if now.get(key) != then.get(key)
        ]
        if self.config is not None:
            # Settings that the version of that time did not have yet had today's defaults.
            hashes = setting_hashes(settings)
            then_hashes = default_hashes() | self.config
            # Earlier checkpoints hash the files of sources, too.
            sources = _hash(settings.dump()["data"].get("sources"))
            if then_hashes.get("data.sources") == sources:
                hashes["data.sources"] = sources
            different += [key for key in hashes if hashes[key] != then_hashes.get(key)]
        if different:
            raise ConfigError(
                f"{path}: the checkpoint was trained with a different {', '.join(different)}; "
                "restore the config.yaml of the run"
            )


def setting_hashes(settings: Settings) -> dict[str, str]:
    """Return a hash of each setting that a checkpoint depends on and that is not a path."""
    fixed = [f"train.{key}" for key in FIXED_IN_TRAINING.split()]
    sections = settings.dump()
    for source in sections["data"].get("sources") or ():
        source.pop("file")
    return {
        key: _hash(value)
        for key, value in flat(sections).items()
        if key not in PATHS + ANY and (key.startswith(("model.", "data.")) or key in fixed)
    }


def default_hashes() -> dict[str, str]:
    """Return a hash of what each setting of `model` and `data` was before it could be set."""
    sections: dict[str, Section] = {"model": ModelSettings(), "data": DataSettings()}
    defaults = {name: section.model_dump(mode="json") for name, section in sections.items()}
    defaults["data"] |= EARLIER["data"]
    return {key: _hash(value) for key, value in flat(defaults).items()}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
