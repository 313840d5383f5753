"""Convert an adapter of the library `adapters` to an adapter checkpoint of scaleup.

    UniPELT there                                    here
    Adapter(n) behind LN, residual before it         adapter, with adapter_input=raw in T5
    prefixes from wte and control_trans              prefix, the MLP evaluated
    loras at query and value, one gate each          lora with lora_gate_scope=projection
    mean of the sigmoids over all positions          gate_pooling=paper

Scaling factors of bottlenecks become part of W_up and b_up. Stochastic depth, and dropout other
than LoRA's, have no effect after training and are left out.
"""

import dataclasses
import pathlib
import tempfile
from typing import Any

import torch
from peft import get_peft_model
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from scaleup.backbone import loading
from scaleup.backbone.method import saved_parameters
from scaleup.errors import ConfigError, one_line
from scaleup.export.adapterhub import heads, methods
from scaleup.export.adapterhub.checkpoint import Checkpoint, Tensors, read
from scaleup.io import write_problem
from scaleup.settings.schema import ModelSettings
from scaleup.unipelt.attention import ATTENTION_CHILD
from scaleup.unipelt.config import UniPeltConfig
from scaleup.unipelt.lora_linear import LINEAR_CHILD
from scaleup.unipelt.model import PEFT_PREFIX
from scaleup.unipelt.prefix_bank import PREFIX_CHILD
from scaleup.unipelt.site_types import AttentionSite, BlockSite
from scaleup.unipelt.sites import find_sites
from scaleup.unipelt.submodules import SUBMODULES

# Not config.json, beside which transformers would look for a whole model.
BACKBONE_CONFIG = "backbone_config.json"
BOTTLENECKS = {"adapter", "parallel_adapter"}
# Names of parameters in the library: of a gate, and of prefixes without and with an MLP.
GATE = ("gate.weight", "gate.bias")
FLAT = ("control_trans",)
MLP = (
    "wte.weight",
    *(f"control_trans.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")),
)


@dataclasses.dataclass(frozen=True)
class Imported:
    """What `import_adapter` has written.

    Attributes:
        output: the folder.
        backbone: folder or hub id of the backbone.
        auto: transformers' class that loads the model.
        labels: class names of the head in id order, which BACKBONE_CONFIG holds too; None
            if the checkpoint has no such head.
        config: settings of the adapter.
    """

    output: pathlib.Path
    backbone: str
    auto: str
    labels: list[str] | None
    config: UniPeltConfig


def import_adapter(
    folder: pathlib.Path,
    output: pathlib.Path,
    backbone: str | None = None,
    attention: str | None = None,
) -> Imported:
    """Convert a checkpoint of the library `adapters`.

    Args:
        folder: what `save_adapter` wrote.
        output: folder to write, which must not exist.
        backbone: folder or hub id of the backbone; by default the one that the checkpoint names.
        attention: the attn_implementation that the adapter was trained with.

    Raises:
        ConfigError: if it cannot be converted exactly. There is one sentence for each reason.
    """
    if output.exists():
        raise ConfigError(f"--output: {output} exists already; choose another folder")
    checkpoint = read(folder)
    backbone = backbone or checkpoint.model_name
    config = _backbone_config(checkpoint, backbone)
    problems = methods.problems(checkpoint, config.is_encoder_decoder, attention)
    if problems:
        raise ConfigError([f"DIR: {problem}" for problem in problems])
    name = heads.ending(checkpoint)
    task, auto = heads.task_of(name)
    head = checkpoint.head
    if head is not None and head.labels:
        config.id2label = dict(enumerate(head.labels))
        config.label2id = {label: i for i, label in enumerate(head.labels)}
    if type(config) not in auto._model_mapping:
        raise ConfigError(f"DIR: transformers has no {task.auto} for {config.model_type}")
    model = loading.empty_model(config, "sdpa", torch.float32, auto)
    head_tensors = heads.tensors_of(checkpoint, model, backbone)
    conversion = _Conversion(checkpoint, model)
    values = methods.options(checkpoint, conversion.bottleneck_sizes())
    to_save = heads.saved_modules(checkpoint) or None
    unipelt = UniPeltConfig(task_type=task.peft, modules_to_save=to_save, **values)
    try:
        tensors = conversion.tensors() | head_tensors
    except RuntimeError as error:
        problem = f"the tensors of {folder} do not fit together: {one_line(error, 200)}"
        raise ConfigError(f"DIR: {problem}") from None
    adapted: Any = get_peft_model(model, unipelt)
    unipelt.base_model_name_or_path, unipelt.inference_mode = backbone, True
    checked = _checked(checkpoint, adapted, tensors, bool(head_tensors))
    labels = head.labels if head_tensors and head is not None and head.labels else None
    try:
        _write(output, unipelt, checked, config if labels else None)
    except (OSError, SafetensorError) as error:  # these name the temporary folder
        problem = f"{output} cannot be written: {write_problem(error)}"
        raise ConfigError(f"--output: {problem}") from None
    return Imported(output, backbone, task.auto, labels, unipelt)


def _backbone_config(checkpoint: Checkpoint, backbone: str) -> Any:
    """Return the config of the backbone."""
    if not backbone:
        raise ConfigError(f"--model: {checkpoint.folder} names no backbone; name it")
    try:
        config = loading.load_config(ModelSettings(name=backbone))
    except ConfigError as error:
        problem = str(error).removeprefix("model.name: ")
        raise ConfigError(f"--model: {problem}") from None
    if config.model_type != checkpoint.model_type:
        raise ConfigError(
            f"--model: {backbone} is a {config.model_type}, and {checkpoint.folder} belongs to a "
            f"{checkpoint.model_type}"
        )
    return config


class _Conversion:
    """Translates the tensors of a checkpoint to those of a model with UniPELT.

    Args:
        checkpoint: the checkpoint.
        model: an empty model of the class that it is for.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel):
        self.checkpoint, self.prefix = checkpoint, f"{model.base_model_prefix}."
        self.attentions, self.blocks = find_sites(model)
        self.methods = methods.by_submodule(checkpoint)
        self.gated = methods.gated(checkpoint)
        self.modules = {
            container: {self._inner(path): parts for path, parts in modules.items()}
            for container, modules in checkpoint.modules.items()
        }

    def _inner(self, path: str) -> str:
        """Return a path below the backbone, whatever class is around it."""
        return path.removeprefix(self.prefix)

    def _take(self, container: str, path: str, *names: str) -> Tensors:
        """Return tensors of a module, which must have no others.

        Raises:
            ConfigError: if tensors are missing or left over.
        """
        parts = self.modules[container].pop(self._inner(path), {})
        folder, place = self.checkpoint.folder, f"{container} at {path}"
        missing = [name for name in names if name not in parts]
        if missing:
            raise ConfigError(f"DIR: {folder} has no {missing[0]} of the {place}; is it complete?")
        if others := parts.keys() - set(names):
            raise ConfigError(f"DIR: scaleup has no {min(others)} of the {place} in {folder}")
        return parts

    def _bottleneck_path(self, site: BlockSite) -> str:
        """Return the path of the module in a block that holds its bottleneck."""
        block = f"{self._inner(site.name)}."
        paths = (path for path in self.modules["adapters"] if path.startswith(block))
        return next(paths, site.name)

    def bottleneck_sizes(self) -> dict[str, int]:
        """Return the bottleneck size of the bottleneck adapter, if there is one."""
        downs = [m.get("adapter_down.0.weight") for m in self.modules["adapters"].values()]
        sizes = {len(down) for down in downs if down is not None}
        if len(sizes) > 1:
            raise ConfigError(
                "DIR: reduction_factor: the layers have bottlenecks of different sizes, and "
                "scaleup has one size for all of them"
            )
        return {name: size for name in BOTTLENECKS & self.methods.keys() for size in sizes}

    def tensors(self) -> Tensors:
        """Return the tensors by their names in the model.

        Raises:
            ConfigError: if tensors are missing or left over.
        """
        tensors: Tensors = {}
        for name in BOTTLENECKS & self.methods.keys():
            for block in self.blocks:
                tensors |= self._bottleneck(name, block)
        if "prefix" in self.methods:
            tensors |= self._prefixes()
        for attention in self.attentions:
            tensors |= self._attention(attention)
        left = [path for modules in self.modules.values() for path in modules]
        if left:
            folder = self.checkpoint.folder
            raise ConfigError(f"DIR: {folder} adapts {left[0]}, which scaleup does not")
        return tensors

    def _bottleneck(self, name: str, site: BlockSite) -> Tensors:
        names = [
            f"adapter_{end}" for end in ("down.0.weight", "down.0.bias", "up.weight", "up.bias")
        ]
        names += GATE if self.gated else ()
        scaling = self.methods[name]["scaling"]
        names += ["scaling"] if scaling in methods.SCALES else []
        parts = self._take("adapters", self._bottleneck_path(site), *names)
        submodule: Any = SUBMODULES[name]
        layer = submodule.layer_path(site)
        entry = f"{layer}{submodule.parameters[0]}"
        scale = parts.get("scaling")
        if scale is None:
            scale = torch.tensor(float(scaling))
        tensors = {
            f"{entry}down.weight": parts["adapter_down.0.weight"],
            f"{entry}down.bias": parts["adapter_down.0.bias"],
            f"{entry}up.weight": scale.reshape(-1, 1) * parts["adapter_up.weight"],
            f"{entry}up.bias": scale * parts["adapter_up.bias"],
        }
        return tensors | (_gate(layer, [parts]) if self.gated else {})

    def _attention(self, site: AttentionSite) -> Tensors:
        """Return LoRA and the gates of an attention, those of prefix and queries as one matrix."""
        tensors: Tensors = {}
        gates: list[Tensors] = []
        if "prefix" in self.methods and self.gated:
            path = f"{site.name}.prefix_tuning"
            gate = self._take("prefix_gates", path, "weight", "bias")
            gates.append({f"gate.{name}": tensor for name, tensor in gate.items()})
        if "lora" in self.methods:
            names = ("lora_A", "lora_B", *(GATE if self.gated else ()))
            query, value = (self._take("loras", path, *names) for path in (site.query, site.value))
            for path, parts in ((site.query, query), (site.value, value)):
                tensors[f"{path}.lora_A.weight"] = parts["lora_A"]
                tensors[f"{path}.lora_B.weight"] = parts["lora_B"]
            if self.gated:
                gates.append(query)
                tensors |= _gate(f"{site.value}.{LINEAR_CHILD}", [value])
        return tensors | (_gate(f"{site.name}.{ATTENTION_CHILD}", gates) if gates else {})

    def _prefixes(self) -> Tensors:
        """Return the prefixes of each parent model and kind of attention."""
        method, tensors = self.methods["prefix"], {}
        several = any(site.cross for site in self.attentions)
        banks = {(site.parent, site.cross): _location(site, several) for site in self.attentions}
        layout = FLAT if method["flat"] else MLP
        names = [f"{place}.{name}" for place in banks.values() for name in layout]
        parts = self._take("prefix_tunings", f"{self.prefix}prefix_tuning", *names)
        for (parent, cross), place in banks.items():
            values = _evaluated(method, [parts[f"{place}.{name}"] for name in layout])
            path = f"{parent}.{PREFIX_CHILD[cross]}.unipelt_prefix.embedding.weight"
            tensors[path.removeprefix(".")] = values.reshape(method["prefix_length"], -1)
        return tensors


def _location(site: AttentionSite, several: bool) -> str:
    """Return the library's name of the prefixes of an attention.

    Args:
        several: whether the model has an encoder and a decoder.
    """
    if several and not site.cross and not site.causal:
        return "encoder_prefix"
    return "cross_prefix" if site.cross else "self_prefix"


def _gate(layer: str, gates: list[Tensors]) -> Tensors:
    """Return the gates of a layer as one projection."""
    return {f"{layer}.unipelt_{name}": torch.cat([parts[name] for parts in gates]) for name in GATE}


def _evaluated(method: dict[str, Any], parts: list[torch.Tensor]) -> torch.Tensor:
    """Return keys and values [L, 2·N·G·E], or flat, from the tensors of FLAT or MLP."""
    if len(parts) == len(FLAT):
        return parts[0]
    embedding, first, first_bias, second, second_bias = parts
    for weight, bias in ((first, first_bias), (second, second_bias)):
        if bias.shape != weight.shape[:1]:  # torch would repeat a shorter bias
            raise RuntimeError(f"a bias has the shape {tuple(bias.shape)}")
    hidden = ACT2FN[methods.activation(method)](nn.functional.linear(embedding, first, first_bias))
    return nn.functional.linear(hidden, second, second_bias)


def _checked(checkpoint: Checkpoint, adapted: Any, tensors: Tensors, with_head: bool) -> Tensors:
    """Return the tensors by their names in a checkpoint, if they match those of the model.

    Args:
        checkpoint: the checkpoint.
        adapted: the empty model with the adapter.
        tensors: by their names in the model.
        with_head: whether they include the head.
    """
    result = {f"{PEFT_PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    expected = saved_parameters(adapted)
    if not with_head:
        modules = adapted.peft_config["default"].modules_to_save or ()
        heads_of_model = tuple(f"{PEFT_PREFIX}{name}." for name in modules)
        expected = {n: p for n, p in expected.items() if not n.startswith(heads_of_model)}
    folder = checkpoint.folder
    if different := sorted(result.keys() ^ expected.keys()):
        name = different[0].removeprefix(PEFT_PREFIX)
        problem = f"has no {name}"
        if different[0] not in expected:
            problem = f"has {name}, which the model does not have"
        raise ConfigError(f"DIR: {folder} {problem}")
    for name, tensor in result.items():
        if tensor.shape != expected[name].shape:
            raise ConfigError(
                f"--model: it is not the backbone of {folder}: {name.removeprefix(PEFT_PREFIX)} is "
                f"{tuple(expected[name].shape)} there instead of {tuple(tensor.shape)}"
            )
    return result


def _write(
    output: pathlib.Path, config: UniPeltConfig, tensors: Tensors, backbone: Any | None
) -> None:
    """Write an adapter checkpoint, whole or not at all.

    Args:
        output: the folder.
        config: settings of the adapter.
        tensors: by their names in a checkpoint.
        backbone: the backbone's config with the labels of the head, to be written too.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as work:
        staging = pathlib.Path(work) / "adapter"
        staging.mkdir()
        config.save_pretrained(str(staging))
        if backbone is not None:
            backbone.to_json_file(staging / BACKBONE_CONFIG)
        save_file(tensors, staging / "adapter_model.safetensors", metadata={"format": "pt"})
        staging.rename(output)
