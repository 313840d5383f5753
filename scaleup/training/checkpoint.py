"""The bundle on disk: the trained tensors as safetensors, the adapter config, the tokenizer and a manifest.

Whoever writes one saves into `create_staging_folder(folder)` and then calls `seal`: every expected tensor is read back and checked
(present, right shape, finite), every file hashed into manifest.json and synced to disk, and only then does the folder get
its name. `best/` and `final/` are bundles; `checkpoint-N/` is one with the optimizer's state beside it. What resuming needs
of them is in scaleup.training.resume.
"""

import hashlib
import json
import os
import pathlib
import shutil

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from scaleup.errors import CheckpointError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"


def create_staging_folder(folder: pathlib.Path) -> pathlib.Path:
    """The empty folder beside `folder` to write into before it is sealed."""
    path = staging_folder(folder)
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def staging_folder(folder: pathlib.Path) -> pathlib.Path:
    """Where `draft` puts it."""
    return folder.with_name(f".{folder.name}.draft")


def expected_tensors(model: nn.Module) -> dict[str, list[int]]:
    """Name in the file → shape, of every trained tensor. Shapes are whole even where ZeRO-3 keeps a share."""
    parameters = dict(model.named_parameters())
    if isinstance(model, PeftModel):
        parameters = get_peft_model_state_dict(
            model, state_dict=parameters, save_embedding_layers=False
        )
    else:
        parameters = {name: p for name, p in parameters.items() if p.requires_grad}
    return {
        name: list(p.ds_shape if hasattr(p, "ds_shape") else p.shape)
        for name, p in parameters.items()
    }


def _tensors(folder: pathlib.Path) -> dict[str, dict]:
    """Shape, type and hash of every tensor in the folder's safetensors. Raises CheckpointError for one that is not finite."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise CheckpointError(
                        f"{path}: {name} has values that are not finite; nothing was kept"
                    )
                digest = hashlib.sha256(
                    tensor.contiguous().flatten().view(torch.uint8).numpy()
                ).hexdigest()
                found[name] = {
                    "shape": list(tensor.shape),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "sha256": digest,
                }
    return found


def _other_files(folder: pathlib.Path) -> dict[str, dict]:
    """Size in bytes and hash of every other file: optimizer state, tokenizer, configs."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".safetensors" and path.name != MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_checkpoint(
    written: pathlib.Path, folder: pathlib.Path, expected: dict[str, list[int]], about: dict
) -> None:
    """Checks what was written, adds the manifest and gives the folder its name, replacing an older one.

    `about` goes into the manifest (method, backbone, labels, …). Raises CheckpointError if a tensor is missing, has another
    shape or is not finite; then nothing gets the final name.
    """
    (written / "training_args.bin").unlink(
        missing_ok=True
    )  # Trainer's pickle; the run's config.yaml says the same
    tensors = _tensors(written)
    wrong = [
        name
        for name, shape in expected.items()
        if name not in tensors or tensors[name]["shape"] != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{written}: {len(wrong)} trained tensors were not written whole, first {wrong[0]}; nothing was kept"
        )
    manifest = {
        "format_version": FORMAT_VERSION,
        **about,
        "tensors": tensors,
        "files": _other_files(written),
    }
    (written / MANIFEST).write_text(
        json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
    mask = os.umask(0)
    os.umask(mask)
    for path in [*written.rglob("*"), written]:
        if path.suffix == ".safetensors":  # safetensors writes for the owner alone
            path.chmod(0o666 & ~mask)
        _sync(path)
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    written.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def verify(folder: pathlib.Path) -> dict:
    """The manifest of a whole, unaltered bundle. Raises CheckpointError otherwise."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no {MANIFEST}; not a bundle of scaleup, or one that was not finished"
        ) from None
    except ValueError:
        raise CheckpointError(
            f"{folder}/{MANIFEST}: not readable; the bundle was altered"
        ) from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: format version {version}; this scaleup reads {FORMAT_VERSION}"
        )
    try:
        tensors, files = _tensors(folder), _other_files(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: a file is damaged: {error}") from None
    if tensors != manifest.get("tensors"):
        raise CheckpointError(
            f"{folder}: the tensors are not the ones in {MANIFEST}; the bundle was altered"
        )
    changed = sorted(
        name for name, entry in manifest.get("files", {}).items() if files.get(name) != entry
    )
    if changed:
        raise CheckpointError(
            f"{folder}: {changed[0]} is missing or not the one in {MANIFEST}; the bundle was altered"
        )
    return manifest
