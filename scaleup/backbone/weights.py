"""The weight files of a pretrained model: find, identify and read them tensor by tensor.

This is the only file that uses transformers' renaming of checkpoint keys.
"""

import ctypes
import hashlib
import pathlib
from collections.abc import Iterable
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

SAMPLES = 256  # pieces of 1 KiB of each file that identify it


class Weights:
    """The tensors of a checkpoint by their names in a model, read one by one from mapped files."""

    def __init__(self, model: PreTrainedModel, folder: pathlib.Path):
        files = weight_files(folder)
        if not files:
            raise ValueError(f"{folder} has no weights (model*.safetensors or pytorch_model*.bin)")
        mapping = get_model_conversion_mapping(model)
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
        expected = dict(model.named_parameters(remove_duplicate=False))
        expected |= dict(model.named_buffers(remove_duplicate=False))
        self._sources: dict[str, tuple[Any, str]] = {}
        for path in files:
            if path.suffix == ".safetensors":
                source = safe_open(path, framework="pt")
            else:
                source = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
            for key in list(source.keys()):
                name, converted = rename_source_key(
                    key, renamings, converters, model.base_model_prefix, expected
                )
                if converted is not None:
                    problem = f"{key} has to be converted while loading, which is not possible here"
                    raise ValueError(f"{problem}; save the model once with transformers")
                self._sources[name] = (source, key)

    def get(self, names: Iterable[str]) -> torch.Tensor | None:
        """Return the tensor under the first of the names that the checkpoint contains."""
        for name in names:
            if name in self._sources:
                source, key = self._sources[name]
                return source[key] if isinstance(source, dict) else source.get_tensor(key)
        return None


def tensor_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of a checkpoint that hold its trained tensors."""
    return sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("."))


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the weight files of a model folder; safetensors are preferred."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def checkpoint_folder(name: str, revision: str | None) -> pathlib.Path:
    """Return the local folder of a model, after downloading it from the hub if necessary."""
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    patterns = ["*.safetensors", "*.json"]
    folder = pathlib.Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    if not weight_files(folder):  # most models on the hub have both formats
        patterns.append("pytorch_model*.bin")
        folder = pathlib.Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    return folder


def fingerprint(name: str, commit: str | None) -> str:
    """Identify a backbone without reading all of its weights.

    A model of the hub has its `commit`. A local folder has a hash of its config.json and, for each
    weight file, of its size, the index of tensors at its start and `SAMPLES` pieces of it.
    """
    folder = pathlib.Path(name)
    if not folder.is_dir():
        return f"commit {commit}"
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                digest.update(file.read(int.from_bytes(file.read(8), "little")))
            for i in range(SAMPLES):
                file.seek(size * i // SAMPLES)
                digest.update(file.read(1024))
    return f"sha256 {digest.hexdigest()}"


def return_freed_memory() -> None:
    """Return freed memory to the system.

    glibc keeps freed pieces of a few MiB. While a whole backbone is loaded, they add up to more
    than the backbone itself.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries do not need it
    if trim is not None:
        trim(0)
