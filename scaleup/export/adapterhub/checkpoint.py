"""The files of a checkpoint of the library `adapters`, as its `save_adapter` writes them.

    adapter_config.json   adapter.safetensors or pytorch_adapter.bin
    head_config.json      model_head.safetensors or pytorch_model_head.bin, if there is a head

Files in torch's format are read without running any code that is in them.
"""

import dataclasses
import pathlib
import pickle
import re
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from scaleup.errors import ConfigError, one_line
from scaleup.io import read_json

CONFIG, HEAD_CONFIG = "adapter_config.json", "head_config.json"
WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")
VERSIONS = ("adapters.1.1.", "adapters.1.2.", "adapters.1.3.")  # 1.0 scaled LoRA differently
# Containers of the modules of an adapter, by which its tensors are named: PATH.CONTAINER.NAME.PART
CONTAINERS = ("adapters", "loras", "prefix_gates", "prefix_tunings")

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Head:
    """The head of a checkpoint.

    Attributes:
        config: settings of a head of an AdapterModel, None for the head of a transformers class.
        labels: class names in id order.
        tensors: by their names in the file.
    """

    config: dict[str, Any] | None
    labels: list[str]
    tensors: Tensors


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of one adapter.

    Attributes:
        folder: where it is.
        model_name: the backbone's folder or hub id when it was trained.
        model_type, model_class: transformers' name of the architecture; name of the model's class.
        methods: the configs of the methods that the adapter combines.
        modules: container → path of a module → part of its parameters' names → tensor. The paths
            are those in the model's class.
        head: the head, None if there is none.
    """

    folder: pathlib.Path
    model_name: str
    model_type: str
    model_class: str
    methods: list[dict[str, Any]]
    modules: dict[str, dict[str, Tensors]]
    head: Head | None


def read(folder: pathlib.Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ConfigError: the folder is not a checkpoint, is damaged, or comes from another version.
    """
    if not (folder / CONFIG).is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        advice = f"; its subfolders {', '.join(inner)} have one" if inner else ""
        raise ConfigError(f"DIR: {folder} has no {CONFIG}{advice}")
    config = _json(folder / CONFIG)
    if "peft_type" in config:
        raise ConfigError(f"DIR: {folder} is an adapter of PEFT already; load it with PeftModel")
    version = str(config.get("version"))
    if not version.startswith(VERSIONS) or not isinstance(config.get("config"), dict):
        raise ConfigError(
            f"DIR: {folder} was not written by adapters 1.1 to 1.3 (version: {version}); load and "
            "save it with adapters 1.3 first"
        )
    method = config["config"]
    union = method.get("architecture") == "union"
    methods = method.get("configs") if union else [method]
    if not isinstance(methods, list) or not all(isinstance(part, dict) for part in methods):
        raise ConfigError(f"DIR: {folder / CONFIG} has no list of methods in config.configs")
    return Checkpoint(
        folder=folder,
        model_name=str(config.get("model_name") or ""),
        model_type=str(config.get("model_type")),
        model_class=str(config.get("model_class")),
        methods=methods,
        modules=_modules(folder, str(config.get("name")), _tensors(folder, WEIGHTS)),
        head=_head(folder),
    )


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"DIR: {path} cannot be read: {one_line(error, 200)}") from None


def _tensors(folder: pathlib.Path, names: tuple[str, str]) -> Tensors:
    """Return the tensors of the first of the files that exists, in float32."""
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise ConfigError(f"DIR: {folder} has neither {names[0]} nor {names[1]}")
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ConfigError(f"DIR: {path} cannot be read: {one_line(error, 200)}") from None
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(map(torch.is_tensor, tensors.values())):
        raise ConfigError(f"DIR: {path} holds something other than named tensors")
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ConfigError(f"DIR: {path} has NaN or infinity in {bad[0]}; its training diverged")
    return {name: tensor.float() for name, tensor in tensors.items()}


def _modules(folder: pathlib.Path, name: str, tensors: Tensors) -> dict[str, dict[str, Tensors]]:
    """Sort the tensors of the adapter `name` by container and module."""
    modules: dict[str, dict[str, Tensors]] = {container: {} for container in CONTAINERS}
    pattern = re.compile(rf"(?:(.+)\.)?({'|'.join(CONTAINERS)})\.{re.escape(name)}\.(.+)")
    for key, tensor in tensors.items():
        match = pattern.fullmatch(key)
        if match is None:
            raise ConfigError(f"DIR: {folder} holds {key}, which has no counterpart in scaleup")
        path, container, part = match.groups("")
        if not path.endswith(".pool"):  # every layer contains the prefixes again
            modules[container].setdefault(path, {})[part] = tensor
    return modules


def _head(folder: pathlib.Path) -> Head | None:
    if not (folder / HEAD_CONFIG).is_file():
        return None
    content = _json(folder / HEAD_CONFIG)
    config = content.get("config")
    about = config or content
    try:
        ids = about.get("label2id")
        if not ids:
            ids = {f"LABEL_{i}": i for i in range(int(about.get("num_labels") or 0))}
        numbers = {label: int(number) for label, number in ids.items()}
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(
            f"DIR: {folder / HEAD_CONFIG} has no valid label2id or num_labels"
        ) from None
    labels = sorted(numbers, key=lambda label: numbers[label])
    if [numbers[label] for label in labels] != list(range(len(labels))):
        raise ConfigError(
            f"DIR: {folder / HEAD_CONFIG} does not number its labels 0, 1, 2, … in label2id"
        )
    return Head(config, labels, _tensors(folder, HEAD_WEIGHTS))
