"""Write a transformers folder that contains UniPELT: modelling code, config and weights.

The modelling code is a short generated file beside unchanged copies of files of `scaleup/unipelt/`.
The weights are streamed from the backbone's files, one shard at a time.
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

from scaleup import __version__
from scaleup.backbone.weights import Weights, return_freed_memory
from scaleup.export.fold import Folded
from scaleup.unipelt import exported

CODE = "modeling_unipelt"
CODE_ENTRIES = ("auto_map", "custom_pipelines")  # entries of config.json that name Python code
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

MODELLING_CODE = '''\
"""{model} with UniPELT, exported by scaleup {version}. Needs torch and transformers."""

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

    @classmethod
    def is_custom_code(cls):
        return False  # else transformers would not let a backbone fill the buffers of its layers
'''
STRICT = '    _keep_in_fp32_modules_strict = ["unipelt"]  # gates average many tokens\n'


def modelling_files() -> dict[str, pathlib.Path]:
    """Return the files of `unipelt/` that an exported model needs, by their names in the folder.

    They are copied unchanged. transformers follows relative imports within one folder, so the
    folder is flat: `kernels/__init__.py` becomes kernels.py, beside the files of `kernels/`.
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


class FolderWriter:
    """Writes the config, the modelling code and the weights of one folder.

    Args:
        model: an empty model of the backbone's class.
        folded: the folded adapter.
        dtype: data type of the backbone's weights. Modules of UniPELT are float32 if gates stay
            learned, because gates average many tokens.
        folder: where to write.
    """

    def __init__(
        self, model: PreTrainedModel, folded: Folded, dtype: torch.dtype, folder: pathlib.Path
    ):
        self.model, self.folded, self.dtype, self.folder = model, folded, dtype, folder
        gates = folded.specification["gates"] if folded.specification is not None else {}
        self.learned = any(None in site.values() for site in gates.values())
        self.added_dtype = torch.float32 if self.learned else dtype
        stored = model.state_dict().keys()
        self.buffers = {name: b for name, b in model.named_buffers() if name in stored}
        self.tensors = dict(model.named_parameters(remove_duplicate=False)) | self.buffers
        self.added = {n: t for n, t in folded.tensors.items() if n not in self.tensors}
        names: dict[int, list[str]] = {}
        for name, tensor in self.tensors.items():
            names.setdefault(id(tensor), []).append(name)
        # Tied weights are written once, under the first of their names.
        self.aliases = {aliases[0]: aliases for aliases in names.values()}

    def write_config(self, auto: str) -> None:
        """Write config.json, and the modelling code if anything but plain weights remains.

        Args:
            auto: name of transformers' AutoModelFor… class of the task.
        """
        config = self.model.config
        # The classes of transformers need no other code. With such an entry, people who load the
        # export with trust_remote_code=True would run code that the backbone's folder names.
        is_own_class = type(self.model).__module__.startswith("transformers.")
        left_out = {"quantization_config", *(CODE_ENTRIES if is_own_class else ())}
        values: dict[str, Any] = {
            key: value
            for key, value in config.to_dict().items()
            if not key.startswith("_") and key not in left_out
        }
        name, config_name = type(self.model).__name__, type(config).__name__
        values |= {"architectures": [name], "dtype": str(self.dtype).removeprefix("torch.")}
        if self.folded.specification is not None:
            model_type = exported_type(config.model_type)
            classes = {"AutoConfig": config_name, "AutoModel": name, auto: name}
            values |= {
                "model_type": model_type,
                "auto_map": {key: f"{CODE}.{cls}" for key, cls in classes.items()},
                "unipelt": self.folded.specification,
            }
            code = MODELLING_CODE.format(
                model=name,
                config=config_name,
                model_type=model_type,
                version=__version__,
                strict=STRICT if self.learned else "",
            )
            (self.folder / f"{CODE}.py").write_text(code, encoding="utf-8")
            for file, source in modelling_files().items():
                shutil.copyfile(source, self.folder / file)
        text = json.dumps(values, indent=1, sort_keys=True) + "\n"
        (self.folder / "config.json").write_text(text, encoding="utf-8")

    def write_weights(self, source: pathlib.Path, shard_bytes: int) -> int:
        """Write the backbone's tensors, updated, and the tensors that UniPELT adds.

        Only one shard is in memory at a time.

        Args:
            source: folder of the backbone.
            shard_bytes: largest size of a file that holds several tensors.

        Returns:
            The bytes written.

        Raises:
            ValueError: a tensor is neither in the backbone's files nor in the checkpoint.
        """
        index: dict[str, str] = {}
        total, shards = 0, self._shards(shard_bytes)
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = WEIGHTS if len(shards) == 1 else file
            content = self._content(names, source)
            save_file(content, str(self.folder / file), metadata={"format": "pt"})
            index |= dict.fromkeys(content, file)
            total += sum(tensor.numel() * tensor.itemsize for tensor in content.values())
            del content
            return_freed_memory()
        if len(shards) > 1:
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
            (self.folder / INDEX).write_text(text + "\n", encoding="utf-8")
        return total

    def _shards(self, shard_bytes: int) -> list[list[str]]:
        """Return the names of the tensors in each file."""
        sizes = {n: self.tensors[n].numel() * self.dtype.itemsize for n in self.aliases}
        sizes |= {n: t.numel() * self.added_dtype.itemsize for n, t in self.added.items()}
        shards: list[list[str]] = [[]]
        room = shard_bytes
        for name, size in sizes.items():
            if shards[-1] and size > room:
                shards.append([])
                room = shard_bytes
            shards[-1].append(name)
            room -= size
        return shards

    def _content(self, names: list[str], source: pathlib.Path) -> dict[str, torch.Tensor]:
        """Return the tensors of one file."""
        # Opened for each file, because pages of a mapped file stay in memory until it is closed.
        weights = Weights(self.model, source)
        content = {}
        for name in names:
            tensor = self._tensor(name, weights)
            if tensor is None and name in self.buffers:
                continue  # the model creates it
            if tensor is None:
                raise ValueError(
                    f"{name} is neither in {source} nor in the checkpoint, so this is not the "
                    "backbone that was trained on"
                )
            if name in self.tensors and tensor.shape != self.tensors[name].shape:
                raise ValueError(
                    f"{name} has the shape {list(tensor.shape)}, and the model needs "
                    f"{list(self.tensors[name].shape)}"
                )
            if tensor.is_floating_point():
                tensor = tensor.to(self.added_dtype if name in self.added else self.dtype)
            module, _, parameter = name.rpartition(".")
            if module in self.folded.renamed:
                name = f"{self.folded.renamed[module]}.{parameter}"
            content[name] = tensor.contiguous()
        return content

    def _tensor(self, name: str, weights: Weights) -> torch.Tensor | None:
        """Return the exported value of a tensor, None if it is stored nowhere."""
        if name in self.added:
            return self.added[name]
        aliases, trained = self.aliases[name], self.folded.tensors
        alias = next((alias for alias in aliases if alias in trained), None)  # a trained head
        tensor = weights.get(aliases) if alias is None else trained[alias]
        update = self.folded.updates.get(name)
        if tensor is None or update is None:
            return tensor
        delta_OI = update()
        is_transposed = isinstance(self.model.get_submodule(name.rpartition(".")[0]), Conv1D)
        return tensor.float() + (delta_OI.t() if is_transposed else delta_OI)
