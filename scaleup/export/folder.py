"""Writing a transformers folder that contains UniPELT: modelling code, config and weights.

The modelling code is a short generated file beside unchanged copies of files of `scaleup/unipelt/`. The
weights are streamed from the backbone's files, one shard at a time.
"""

import json
import pathlib
import re
import shutil
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scaleup.backbone.weights import Weights, return_freed_memory
from scaleup.export.fold import Folded
from scaleup.unipelt import exported

CODE = "modeling_unipelt"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

MODELLING_CODE = '''"""{model} with UniPELT, exported by scaleup {version}. Needs torch and transformers."""

import transformers

from .exported import attach_exported


class {config}(transformers.{config}):
    model_type = "{model_type}"


class {model}(transformers.{model}):
    config_class = {config}
{strict}
    def __init__(self, config: {config}):
        super().__init__(config)
        attach_exported(self, config.unipelt)
'''


def modelling_files() -> dict[str, pathlib.Path]:
    """Return the files of `unipelt/` that an exported model needs, by their names in the folder.

    They are copied unchanged. transformers follows relative imports within one folder, so the folder is
    flat: `kernels/__init__.py` becomes kernels.py, beside the files of `kernels/`.
    """
    package = pathlib.Path(exported.__file__).parent
    files: dict[str, pathlib.Path] = {}
    names = ["exported"]
    while names:
        name = names.pop()
        places = (f"{name}.py", f"{name}/__init__.py", f"kernels/{name}.py")
        source = next(path for place in places if (path := package / place).is_file())
        files[f"{name}.py"] = source
        imported = re.findall(r"^ *from \.(\w+) import", source.read_text(encoding="utf-8"), re.M)
        names += [other for other in imported if f"{other}.py" not in files]
    return files


def exported_type(model_type: str) -> str:
    """Return a model type that transformers does not know.

    With a known type, loading without `trust_remote_code` would silently give the bare backbone.
    """
    return f"unipelt_{model_type}"


def write_config(
    model: PreTrainedModel,
    auto: str,
    folded: Folded,
    learned: bool,
    dtype: torch.dtype,
    folder: pathlib.Path,
    version: str,
) -> None:
    """Write config.json, and the modelling code if anything but plain weights remains.

    Args:
        model: an empty model of the backbone's class.
        auto: the name of transformers' auto class for the task.
        folded: the folded adapter.
        learned: whether its gates stay learned.
        dtype: of the weights.
        folder: where to write.
        version: of scaleup.
    """
    values: dict[str, Any] = {
        key: value
        for key, value in model.config.to_dict().items()
        if not key.startswith("_") and key != "quantization_config"
    }
    name, config = type(model).__name__, type(model.config).__name__
    values |= {"architectures": [name], "dtype": str(dtype).removeprefix("torch.")}
    if folded.specification is not None:
        model_type = exported_type(model.config.model_type)
        classes = {"AutoConfig": config, "AutoModel": name, auto: name}
        values |= {
            "model_type": model_type,
            "auto_map": {key: f"{CODE}.{cls}" for key, cls in classes.items()},
            "unipelt": folded.specification,
        }
        strict = '    _keep_in_fp32_modules_strict = ["unipelt"]  # gates average many tokens\n'
        code = MODELLING_CODE.format(
            model=name,
            config=config,
            model_type=model_type,
            version=version,
            strict=strict if learned else "",
        )
        (folder / f"{CODE}.py").write_text(code, encoding="utf-8")
        for file, source in modelling_files().items():
            shutil.copyfile(source, folder / file)
    text = json.dumps(values, indent=1, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _new_name(name: str, renamed: dict[str, str]) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{renamed.get(module, module)}.{parameter}" if module else parameter


def write_weights(
    model: PreTrainedModel,
    files: pathlib.Path,
    folded: Folded,
    dtype: torch.dtype,
    additions: torch.dtype,
    folder: pathlib.Path,
    shard_bytes: int,
) -> int:
    """The backbone's tensors as `dtype`, updated, and what is added as `additions`, in shards of at most `shard_bytes` (or one tensor).

    `model`: an empty one. Only one shard is in memory at a time. Returns the bytes written. Raises ValueError for a backbone
    that lacks a tensor which the bundle has not.
    """
    names_of: dict[int, list[str]] = {}  # tied weights are written once
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | buffers
    for name, tensor in tensors.items():
        names_of.setdefault(id(tensor), []).append(name)
    jobs: list[tuple[str, int]] = [
        (names[0], tensors[names[0]].numel() * dtype.itemsize) for names in names_of.values()
    ]
    extra = [name for name in folded.tensors if name not in tensors]
    jobs += [(name, folded.tensors[name].numel() * additions.itemsize) for name in extra]
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in jobs:
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    conv = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    index, total = {}, 0
    for number, shard in enumerate(shards):
        file = (
            WEIGHTS
            if len(shards) == 1
            else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        )
        content, source = (
            {},
            Weights(model, files),
        )  # opened anew: pages of a mapped file stay in memory until it is closed
        for name in shard:
            aliases = names_of[id(tensors[name])] if name in tensors else [name]
            tensor = _tensor(name, aliases, source, folded, conv, name in extra)
            if tensor is None and name in buffers:
                continue  # made anew with the model
            if tensor is None:
                raise ValueError(
                    f"{files} has no {name}, and neither has the checkpoint; it is not the backbone that was trained on"
                )
            kind = additions if name in extra else dtype
            content[_new_name(name, folded.renamed)] = (
                tensor.to(kind).contiguous() if tensor.is_floating_point() else tensor.contiguous()
            )
        save_file(content, str(folder / file), metadata={"format": "pt"})
        index |= dict.fromkeys(content, file)
        total += sum(t.numel() * t.itemsize for t in content.values())
        del content, source, tensor
        return_freed_memory()
    if len(shards) > 1:
        (folder / INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1) + "\n",
            encoding="utf-8",
        )
    return total


def _tensor(
    name: str, aliases: list[str], source: Weights, folded: Folded, conv: set[str], is_new: bool
) -> torch.Tensor | None:
    if is_new:
        return folded.tensors[name]
    own = next(
        (folded.tensors[alias] for alias in aliases if alias in folded.tensors), None
    )  # a trained head
    tensor = own if own is not None else source.get(aliases)
    update = folded.updates.get(name)
    if tensor is None or update is None:
        return tensor
    delta_OI = update()
    return tensor.float() + (delta_OI.t() if name.rpartition(".")[0] in conv else delta_OI)
