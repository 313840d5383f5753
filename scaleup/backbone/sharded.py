"""The files of a pretrained model: which ones they are, and loading them straight into ZeRO-3 shares.

transformers' own loader for ZeRO-3 reads the whole checkpoint first, cannot replace a head of another size and cannot
quantise. This one maps the files, and for each module reads its tensors, quantises the linear ones if asked, and hands
them to DeepSpeed, which keeps this rank's share and frees the rest: one module at a time is whole.

This is the only file that touches DeepSpeed's parameter partitioning and transformers' key renaming.
"""

import ctypes
import hashlib
import pathlib
from collections.abc import Iterable

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.integrations.deepspeed import deepspeed_config

from scaleup.backbone.int8 import Int8Linear, quantise

TRIM_EVERY = 1 << 24  # weights
SAMPLES = 256  # of a KiB


class Weights:
    """The tensors of a checkpoint by their names in a model, read one by one from mapped files."""

    def __init__(self, model: PreTrainedModel, folder: pathlib.Path):
        """Raises ValueError if there are no weights or the checkpoint needs tensors to be joined or split."""
        files = _files(folder)
        if not files:
            raise ValueError(f"{folder} has no weights (model*.safetensors or pytorch_model*.bin)")
        mapping = get_model_conversion_mapping(model)
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
        expected = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self._where: dict[str, tuple[object, str]] = {}
        for path in files:
            if path.suffix == ".safetensors":
                source = safe_open(path, framework="pt")
                keys = list(source.keys())
            else:
                source = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
                keys = list(source)
            for key in keys:
                name, converted = rename_source_key(
                    key, renamings, converters, model.base_model_prefix, expected
                )
                if converted is not None:
                    raise ValueError(
                        f"{key} has to be converted while loading, which ZeRO-3 loading here cannot do; save the model once with transformers"
                    )
                self._where[name] = (source, key)

    def get(self, names: Iterable[str]) -> torch.Tensor | None:
        """The tensor under the first of the names that the checkpoint has."""
        found = next((self._where[name] for name in names if name in self._where), None)
        if found is None:
            return None
        source, key = found
        return source[key] if isinstance(source, dict) else source.get_tensor(key)


def checkpoint_folder(name: str, revision: str | None) -> pathlib.Path:
    """The local folder of a model, downloaded from the hub if it is not one already."""
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    wanted = ["*.safetensors", "*.json"]
    folder = pathlib.Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    if _files(folder):  # most models are there in both formats
        return folder
    return pathlib.Path(
        snapshot_download(name, revision=revision, allow_patterns=[*wanted, "pytorch_model*.bin"])
    )


def fingerprint(name: str, commit: str | None) -> str:
    """Identity of a backbone without reading all of its weights: the hub's `commit`, or for a local folder a hash of its config.json
    and, of every weights file, the size, the index of tensors at its start and SAMPLES pieces spread over it."""
    folder = pathlib.Path(name)
    if not folder.is_dir():
        return f"commit {commit}"
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in _files(folder):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                digest.update(file.read(int.from_bytes(file.read(8), "little")))
        with path.open("rb") as file:
            for i in range(SAMPLES):
                file.seek(path.stat().st_size * i // SAMPLES)
                digest.update(file.read(1024))
    return f"sha256 {digest.hexdigest()}"


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


class _Partitioner:
    """Turns parameters into ZeRO-3 parameters, of which this process keeps its share."""

    def __init__(self) -> None:
        self.first: nn.Parameter | None = None

    def __call__(self, module: nn.Module, parameters: list[nn.Parameter]) -> None:
        if self.first is not None:
            self.first.convert_to_zero_parameters(param_list=parameters)
        elif parameters:
            import deepspeed  # slow to import, and only here needed

            deepspeed.zero.Init(module=module, config_dict_or_path=deepspeed_config())
            self.first = parameters[0]


def load_sharded(
    model: PreTrainedModel, weights: Weights, device: torch.device
) -> dict[str, set[str]]:
    """Fills a model of meta tensors. Call after TrainingArguments have told transformers of ZeRO-3.

    Returns `missing_keys` (initialised as transformers does) and `mismatched_keys` (another shape in the checkpoint,
    initialised too), in the form of transformers' loading info. `Int8Linear` weights are quantised on the way.
    """
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    partition, done, read = _Partitioner(), {}, 0
    info: dict[str, set[str]] = {"missing_keys": set(), "mismatched_keys": set()}
    for prefix, module in model.named_modules():
        fresh, new = False, []
        for name, empty in list(module._parameters.items()):
            if empty is None or (isinstance(module, Int8Linear) and name == "scale"):
                continue
            if id(empty) in done:  # tied weights stay one parameter
                module._parameters[name] = done[id(empty)][1]
                continue
            value = _read(weights, names_of[id(empty)], empty, module, info)
            fresh = fresh or value is None
            done[id(empty)] = (
                empty,
                nn.Parameter(
                    torch.empty_like(empty, device=device) if value is None else value.to(device),
                    empty.requires_grad,
                ),
            )
            module._parameters[name] = parameter = done[id(empty)][1]
            parameter._is_hf_initialized = value is not None
            new.append(parameter)
            if isinstance(module, Int8Linear) and name == "weight":
                parameter.data, scale_O = quantise(parameter.data)
                module.scale = nn.Parameter(scale_O.to(device), requires_grad=False)
                module.scale._is_hf_initialized = True
                new.append(module.scale)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                value = weights.get([f"{prefix}.{name}"])
                module._buffers[name] = (
                    torch.empty_like(buffer, device=device)
                    if value is None
                    else value.to(device, buffer.dtype)
                )
                fresh = fresh or value is None
        if fresh:
            model._init_weights(module)
        partition(module, new)
        read += sum(p.ds_numel for p in new)
        if read > TRIM_EVERY:
            return_freed_memory()
            read = 0
    return_freed_memory()
    return info


def set_values(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Writes a parameter, whole or, under ZeRO-3, shared out: then each process writes the whole and keeps its share."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(values)
        return
    import deepspeed  # slow to import, and only here needed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(values)


def return_freed_memory() -> None:
    """glibc keeps freed pieces of a few MiB: over a whole backbone more than the backbone itself."""
    trim = getattr(
        ctypes.CDLL(None), "malloc_trim", None
    )  # other C libraries have none and need none
    if trim is not None:
        trim(0)


def _read(
    weights: Weights,
    names: list[str],
    empty: torch.Tensor,
    module: nn.Module,
    info: dict[str, set[str]],
) -> torch.Tensor | None:
    """A private copy of the tensor in the model's type; None, noted in `info`, if the checkpoint has none that fits."""
    value = weights.get(names)
    if value is None or value.shape != empty.shape:
        info["missing_keys" if value is None else "mismatched_keys"].add(names[0])
        return None
    # bitsandbytes quantises from float16 whatever the checkpoint holds.
    return value.to(
        torch.float16
        if isinstance(module, Int8Linear) and empty.dtype == torch.int8
        else empty.dtype,
        copy=True,
    )


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Return the shape of a parameter, also where ZeRO-3 keeps only a share of it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
