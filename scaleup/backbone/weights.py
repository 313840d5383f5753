"""The weight files of a pretrained model: find, identify and read them tensor by tensor.

This is the only file that uses transformers' renaming of checkpoint keys.
"""

import copy
import ctypes
import hashlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

from scaleup.io import read_json, samples

# The file of `checkpoint-N/` with the state of the optimizer. It holds nothing of a model.
STATE = "training_state.safetensors"


class Weights:
    """The tensors of a checkpoint by their names in a model, read one by one from mapped files.

    A tensor may be made of several in the files: the hub's format has the weights of each expert
    apart.
    """

    def __init__(self, model: PreTrainedModel, folder: pathlib.Path):
        files = weight_files(folder)
        if not files:
            raise ValueError(f"{folder} has no weights (model*.safetensors or pytorch_model*.bin)")
        mapping = get_model_conversion_mapping(model)
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        expected = dict(model.named_parameters(remove_duplicate=False))
        expected |= dict(model.named_buffers(remove_duplicate=False))
        self._model, self._expected = model, expected
        self._sources: dict[str, tuple[Any, str]] = {}
        # What makes a tensor, and its parts: source, key, and the pattern that the key matches.
        self._made: dict[str, tuple[WeightConverter, list[tuple[Any, str, str]]]] = {}
        keys: list[tuple[Any, str]] = []
        for path in files:
            if path.suffix == ".safetensors":
                source = safe_open(path, framework="pt")
            else:
                source = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
            keys += [(source, key) for key in source.keys()]  # noqa: SIM118 (no mapping)
        for source, key in sorted(keys, key=lambda pair: dot_natural_key(pair[1])):
            name, pattern = rename_source_key(
                key, renamings, converters, model.base_model_prefix, expected
            )
            if pattern is None:
                self._sources[name] = (source, key)
                continue
            converter = by_pattern[pattern]
            if len(converter.target_patterns) > 1:
                problem = f"{key} has to be split while loading, which is not possible here"
                raise ValueError(f"{problem}; rename it in the files")
            self._made.setdefault(name, (converter, []))[1].append((source, key, pattern))

    def get(self, names: Iterable[str], rows: slice | None = None) -> torch.Tensor | None:
        """Return the tensor under the first of the names that the checkpoint contains.

        Args:
            rows: only these rows are read.
        """
        for name in names:
            if name in self._sources:
                return _read(*self._sources[name], rows)
            if name in self._made:
                made = self._make(name)
                return made if rows is None else made[rows]
        return None

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of the tensors by their names in the model.

        Those that are made of several in the files are taken to have the shape in the model.
        """
        shapes = {name: _shape(*source) for name, source in self._sources.items()}
        return shapes | {name: self._expected[name].shape for name in self._made}

    def _make(self, name: str) -> torch.Tensor:
        """Return a tensor that is made of several, as transformers makes it."""
        converter, parts = self._made[name]
        converter = copy.deepcopy(converter)  # it collects the parts of one tensor
        for source, key, pattern in parts:
            tensor: Any = _read(source, key)
            converter.add_tensor(name, key, pattern, tensor)
        (made,) = converter.convert(name, model=self._model, config=self._model.config).values()
        return made


def _read(source: Any, key: str, rows: slice | None = None) -> torch.Tensor:
    if isinstance(source, dict):
        return source[key] if rows is None else source[key][rows]
    return source.get_tensor(key) if rows is None else source.get_slice(key)[rows]


def _shape(source: Any, key: str) -> torch.Size:
    if isinstance(source, dict):
        return source[key].shape
    return torch.Size(source.get_slice(key).get_shape())


def tensor_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of a checkpoint that hold its trained tensors."""
    files = (p for p in folder.glob("*.safetensors") if p.name != STATE)
    return sorted(p for p in files if not p.name.startswith("."))


def is_alone() -> bool:
    """Return whether this process is the only one of its run."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def communication_device() -> torch.device:
    """Return the device whose tensors the processes exchange: NCCL knows only those of GPUs."""
    nccl = "nccl" in dist.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def from_first(value: Any) -> Any:
    """Return the small, picklable value of rank 0 on every process. All processes call this."""
    if is_alone():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0, device=communication_device())
    return values[0]


def read_once(files: Sequence[pathlib.Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of safetensors files with their names, in the same order on every process.

    Only rank 0 reads the files; the other processes receive its copies. All processes iterate.
    """
    reads = is_alone() or dist.get_rank() == 0
    for number in range(from_first(len(files))):
        source: Any = safe_open(files[number], framework="pt") if reads else None
        if is_alone():
            yield from ((name, source.get_tensor(name)) for name in source.keys())  # noqa: SIM118
            continue
        tensors = {}
        if reads:
            tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
        entries = from_first([(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])
        for name, dtype, shape in entries:
            tensor = tensors.pop(name) if reads else torch.empty(shape, dtype=dtype)
            yield name, copy_of_first(tensor)


def copy_of_first(tensor: torch.Tensor) -> torch.Tensor:
    """Return rank 0's values of a tensor that has one shape and type on all processes."""
    if is_alone():
        return tensor
    sent = tensor.to(communication_device()).contiguous()
    dist.broadcast(sent.flatten().view(torch.uint8) if sent.numel() else sent, 0)
    return sent.to(tensor.device)


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the weight files of a model folder that transformers reads; safetensors are preferred.

    Beside them, a folder may have others, such as copies of the weights in another type.
    """
    patterns = (("model", ".safetensors"), ("pytorch_model", ".bin"))
    for stem, ending in patterns:
        whole = folder / f"{stem}{ending}"
        found = [whole] if whole.exists() else _indexed(folder / f"{stem}{ending}.index.json")
        if found:
            return found
    others = (sorted(folder.glob(f"{stem}*{ending}")) for stem, ending in patterns)
    return next((files for files in others if files), [])


def _indexed(index: pathlib.Path) -> list[pathlib.Path]:
    """Return the files beside an index of weights that it names, [] if it cannot be read."""
    try:
        names = set(read_json(index)["weight_map"].values())
        return sorted(path for path in index.parent.iterdir() if path.name in names)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []


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
    weight file, of its size, the index of tensors at its start and pieces of it (`io.samples`).
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
            for piece in samples(file, size):
                digest.update(piece)
    return f"sha256 {digest.hexdigest()}"


def return_freed_memory() -> None:
    """Return freed memory to the system.

    glibc keeps freed pieces of a few MiB. While a whole backbone is loaded, they add up to more
    than the backbone itself.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries do not need it
    if trim is not None:
        trim(0)
