"""Adapter checkpoints on disk: written into a staging folder, verified, then committed.

An adapter checkpoint holds the trained tensors as safetensors, the adapter's config, the tokenizer
and manifest.json. `best/` and `final/` are adapter checkpoints. `checkpoint-N/` also holds the
state of the optimizer. A checkpoint is saved in three steps:

1. `create_staging_folder(folder)` makes an empty folder beside `folder`, which everything is
   written into.
2. `commit_checkpoint` reads every tensor back, checks it, hashes every file into the manifest and
   syncs the files to disk.
3. Only then it renames the staging folder to `folder`.

`scaleup.training.resume` chooses the checkpoint that a run continues from.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from scaleup.backbone.sharded import whole_shape
from scaleup.errors import CheckpointError
from scaleup.unipelt.sites import head_names

FORMAT_VERSION = 2
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of manifest.json: what a checkpoint was trained on, and its files.

    Attributes:
        method: the run's section of that name.
        backbone: name, revision, quantization and fingerprint.
        labels: class names in id order, or None for other tasks.
        data: file, rows and hash of every split (`scaleup.data.classification.provenance`).
        run: `processes` and `zero_stage` that the optimizer's state was written with.
        export: kind of an exported folder, or None for a checkpoint of a run.
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
    tensors: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        content = dataclasses.asdict(self)
        if self.export is None:
            del content["export"]
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Manifest":
        """Read the manifest of a checkpoint; if that is impossible, raise CheckpointError."""
        try:
            content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            problem = f"no {MANIFEST}; this is not a finished checkpoint of scaleup"
            raise CheckpointError(f"{folder}: {problem}") from None
        except ValueError:
            content = None
        path, altered = folder / MANIFEST, "the checkpoint was altered"
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: not readable; {altered}")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            problem = f"format version {version}; this scaleup reads {FORMAT_VERSION}"
            raise CheckpointError(f"{folder}: {problem}")
        try:
            return cls(**content)
        except TypeError:
            problem = f"its entries are not those of a manifest; {altered}"
            raise CheckpointError(f"{path}: {problem}") from None


def create_staging_folder(folder: pathlib.Path) -> pathlib.Path:
    """Make the empty staging folder of `folder` and return it."""
    path = staging_folder(folder)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def staging_folder(folder: pathlib.Path) -> pathlib.Path:
    """Return the path of the staging folder of `folder`."""
    return folder.with_name(f".{folder.name}.draft")


def expected_tensors(model: nn.Module) -> dict[str, list[int]]:
    """Return the whole shape of every trained tensor and of the head's, by their names in files.

    Under ZeRO-3 these are the shapes before sharding.
    """
    parameters = dict(model.named_parameters())
    if isinstance(model, PeftModel):
        parameters = get_peft_model_state_dict(
            model, state_dict=parameters, save_embedding_layers=False
        )
    else:
        heads = tuple(f"{name}." for name in head_names(model))
        parameters = {
            name: p for name, p in parameters.items() if p.requires_grad or name.startswith(heads)
        }
    return {name: list(whole_shape(p)) for name, p in parameters.items()}


def _describe_tensors(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Return shape, type and hash of every tensor. Raise CheckpointError if one is not finite."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    problem = "has values that are not finite; nothing was kept"
                    raise CheckpointError(f"{path}: {name} {problem}")
                raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
                tensors[name] = {
                    "shape": list(tensor.shape),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "sha256": hashlib.sha256(raw).hexdigest(),
                }
    return tensors


def _describe_other_files(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Return size in bytes and hash of every file but safetensors and the manifest."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".safetensors" and path.name != MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    return files


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_checkpoint(
    staging: pathlib.Path, folder: pathlib.Path, expected: dict[str, list[int]], manifest: Manifest
) -> None:
    """Verify a staging folder, add its manifest and rename it to `folder`, replacing an older one.

    Args:
        expected: the shape of every tensor that must be there, by name.
        manifest: what to write. Its `tensors` and `files` are filled in.

    Raises:
        CheckpointError: a tensor is missing, has another shape or is not finite. `folder` is then
            left as it was.
    """
    # Trainer pickles its arguments. config.yaml of the run holds the same values.
    (staging / "training_args.bin").unlink(missing_ok=True)
    tensors = _describe_tensors(staging)
    wrong = [n for n, shape in expected.items() if tensors.get(n, {}).get("shape") != shape]
    if wrong:
        raise CheckpointError(
            f"{staging}: {len(wrong)} trained tensors were not written whole, first {wrong[0]};"
            " nothing was kept"
        )
    manifest = dataclasses.replace(manifest, tensors=tensors, files=_describe_other_files(staging))
    (staging / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    mask = os.umask(0)
    os.umask(mask)
    for path in [*staging.rglob("*"), staging]:
        if path.suffix == ".safetensors":  # safetensors makes files readable for their owner only
            path.chmod(0o666 & ~mask)
        _sync(path)
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    staging.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def verify(folder: pathlib.Path) -> Manifest:
    """Return the manifest of a checkpoint; raise CheckpointError if it is damaged or altered."""
    manifest = Manifest.read(folder)
    try:
        tensors, files = _describe_tensors(folder), _describe_other_files(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: a file is damaged: {error}") from None
    difference = f"from {MANIFEST}; the checkpoint was altered"
    if tensors != manifest.tensors:
        raise CheckpointError(f"{folder}: the tensors differ {difference}")
    for name, entry in sorted(manifest.files.items()):
        if files.get(name) != entry:
            raise CheckpointError(f"{folder}: {name} is missing or differs {difference}")
    return manifest
