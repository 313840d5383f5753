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
import os
import pathlib
import shutil
import stat
from collections.abc import Collection
from typing import Any

import torch
from peft import PeftModel, PeftType
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig

from scaleup.backbone import loading
from scaleup.backbone.method import apply_method, saved_parameters
from scaleup.backbone.sharded import whole_shape
from scaleup.backbone.weights import tensor_files
from scaleup.errors import CheckpointError, one_line
from scaleup.io import file_hash, read_json
from scaleup.settings.schema import Settings
from scaleup.training.manifest import ALTERED, MANIFEST, Manifest
from scaleup.unipelt.config import UniPeltConfig
from scaleup.unipelt.sites import head_names

ADAPTER_CONFIG = "adapter_config.json"

# Files that operating systems add to folders. No library reads them, nor hidden files.
SYSTEM_FILES = ("Thumbs.db", "desktop.ini")


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
    return {name: list(whole_shape(p)) for name, p in saved_parameters(model).items()}


def _describe_tensors(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Return shape, type and hash of every tensor.

    Raises:
        CheckpointError: a tensor is not finite or is in two files, or a file has no tensor.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for path in tensor_files(folder):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            twice = [name for name in names if name in tensors]
            if twice or not names:
                problem = f"has {twice[0]}, as another file has" if twice else "has no tensors"
                raise CheckpointError(f"{path}: {problem}; remove the file")
            for name in names:
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


def _is_ignored(name: str) -> bool:
    """Return whether a file is hidden or of the operating system, so that no library reads it."""
    parts = pathlib.PurePosixPath(name).parts
    return parts[-1] in SYSTEM_FILES or any(part.startswith(".") for part in parts)


def _other_files(folder: pathlib.Path, listed: Collection[str] = ()) -> dict[str, pathlib.Path]:
    """Return every file but the manifest and those with the tensors, by its name in the folder.

    Args:
        listed: names that count although they are hidden.

    Raises:
        CheckpointError: there is a symbolic link, or something else than a file or a folder.
    """
    files = {}
    tensors = tensor_files(folder)
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name not in listed and _is_ignored(name):
            continue
        kind = path.lstat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            what = "a symbolic link" if stat.S_ISLNK(kind) else "not a plain file"
            raise CheckpointError(f"{folder}: {name} is {what}; remove it")
        if stat.S_ISREG(kind) and path not in tensors and name != MANIFEST:
            files[name] = path
    return files


def describe_file(path: pathlib.Path) -> dict[str, Any]:
    """Return size in bytes and hash of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}


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
    files = {name: describe_file(path) for name, path in _other_files(staging).items()}
    manifest = dataclasses.replace(manifest, tensors=tensors, files=files)
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
    """Return the manifest of a checkpoint; raise CheckpointError if it is damaged or altered.

    Nothing may be in the folder that the manifest does not list, because loaders read files such as
    chat templates wherever they find them. Hidden files and `SYSTEM_FILES` are ignored.
    """
    difference = f"from {MANIFEST}; {ALTERED}"
    try:
        if (folder / MANIFEST).is_symlink():
            raise CheckpointError(f"{folder}: {MANIFEST} is a symbolic link; remove it")
        manifest = Manifest.read(folder)
        files = _other_files(folder, manifest.files)
        for name in files:
            if name not in manifest.files:
                problem = f"{name} is not listed in {MANIFEST}; remove it"
                raise CheckpointError(f"{folder}: {problem}")
        tensors = _describe_tensors(folder)
        if tensors != manifest.tensors:
            raise CheckpointError(f"{folder}: the tensors differ {difference}")
        for name, entry in sorted(manifest.files.items()):
            if name not in files or describe_file(files[name]) != entry:
                raise CheckpointError(f"{folder}: {name} is missing or differs {difference}")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: a file is damaged: {error}") from None
    if manifest.method["name"] == "unipelt" and manifest.export in (None, "exact"):
        _check_adapter_config(folder / ADAPTER_CONFIG, manifest)
    return manifest


def _check_adapter_config(path: pathlib.Path, manifest: Manifest) -> None:
    """Raise CheckpointError if an adapter's config is not that of the method in the manifest."""
    known = {field.name for field in dataclasses.fields(UniPeltConfig)} - {"peft_type"}
    try:
        content = read_json(path)
        if content.get("peft_type") != PeftType.UNIPELT.value:
            raise ValueError(f"peft_type is not {PeftType.UNIPELT.value}")
        default = UniPeltConfig()
        for key, value in content.items():
            if key in known and not _is_same_kind(value, getattr(default, key)):
                raise ValueError(f"{key} has the wrong type")
        config = UniPeltConfig(**{key: value for key, value in content.items() if key in known})
        kept = config.modules_to_save
        if kept is not None and not _is_texts(kept):
            raise ValueError("modules_to_save is not a list of names")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file; {ALTERED}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: {one_line(error, 200)}; {ALTERED}") from None
    for key, value in manifest.method.items():
        there: Any = getattr(config, key, None)
        if key == "submodules":
            there, value = sorted(there), sorted(value)
        if key != "name" and there != value:
            problem = f"{key} is {there!r:.80} here and {value!r:.80} in {MANIFEST}"
            raise CheckpointError(f"{path}: {problem}; {ALTERED}")


def check_tensors(folder: pathlib.Path, manifest: Manifest, model: nn.Module) -> None:
    """Compare a checkpoint with the tensors that a model needs, by name and shape.

    Loaders leave a tensor that is missing at its initial value, and accept tensors of the backbone
    instead of the trained ones.

    Args:
        model: the model with the run's method. It may be on the meta device or sharded.

    Raises:
        CheckpointError: a tensor is missing or has another shape. An adapter checkpoint may also
            have no other tensors. Other methods save the whole model.
    """
    there = {name: entry["shape"] for name, entry in manifest.tensors.items()}
    expected = expected_tensors(model)
    for name, shape in expected.items():
        if there.get(name) != shape:
            has = f"has the shape {there[name]}" if name in there else "is missing"
            problem = f"{name} {has}, and the model needs {shape}"
            raise CheckpointError(f"{folder}: {problem}; {ALTERED}")
    extra = sorted(there.keys() - expected.keys())
    if extra and isinstance(model, PeftModel):
        raise CheckpointError(f"{folder}: the model has no place for {extra[0]}; {ALTERED}")


def check_adapter_tensors(
    folder: pathlib.Path,
    manifest: Manifest,
    settings: Settings,
    config: PretrainedConfig,
    auto: Any,
) -> None:
    """Compare an adapter checkpoint with the tensors that its model needs, without its backbone.

    Args:
        config: config of the backbone with the run's labels.
        auto: transformers' AutoModelFor… class of the task.

    Raises:
        CheckpointError: see `check_tensors`.
    """
    empty = loading.empty_model(config, settings.model.attention, None, auto)
    saved = read_json(folder / ADAPTER_CONFIG).get("modules_to_save") or []
    heads, modules = head_names(empty), dict(empty.named_modules())
    missing = [name for name in saved if name in modules and name not in heads]
    if other := [name for name in missing if not name.endswith("pooler")]:
        problem = f"modules_to_save names {other[0]!r:.80}, which the backbone's files contain"
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {problem}; {ALTERED}")
    check_tensors(folder, manifest, apply_method(empty, settings.method, missing))


def _is_same_kind(value: object, default: object) -> bool:
    """Return whether a value has the type of the default, as far as the default shows it."""
    if value is None or default is None:
        return True
    kinds = int | float
    both_numbers = isinstance(value, kinds) and isinstance(default, kinds)
    return type(value) is type(default) or both_numbers


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
