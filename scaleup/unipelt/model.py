"""UniPELT as a PEFT method: how it is attached to a backbone, and what it counts.

    model = get_peft_model(model, UniPeltConfig())                     attach and freeze
    PeftModel.from_pretrained(model, folder)                           after `import scaleup`

Everything that is trained lives inside the backbone as PEFT tuner layers, so PEFT saves, loads,
switches and disables it. This is the only file that extends PEFT's registries and overrides its
private methods.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraModel, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, register_peft_method
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers.pytorch_utils import Conv1D

from .attachment import PASSES_CHILD, Attachment, move_up
from .attention import restore_attention
from .config import UniPeltConfig
from .direct_forward import DirectForward
from .entry_points import extend
from .layers import AuxiliaryLayer, one_at_a_time
from .passes import unwrap_checkpointing
from .quantized import keep_layout, unpacked_numel
from .rows import BASE, adapters_of_rows, count_rows, require_count
from .sites import find_sites, head_names
from .submodules import SUBMODULES, attach, chosen, site_gates

PEFT_PREFIX = "base_model.model."  # what PEFT puts in front of every name
GATES = ".unipelt_gate."  # marks the parameters of gates


class UniPeltModel(LoraModel):
    """A model with UniPELT. Create it through `get_peft_model`."""

    tuner_layer_cls = (LoraLayer, AuxiliaryLayer)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Let PEFT add its LoRA layers, attach gates and submodules, and save the head."""
        config = self.peft_config[adapter_name]
        config.require_supported()
        keep_layout(model)
        attentions, blocks = find_sites(model)
        targets: list[str] = []
        for submodule in chosen(config):
            submodule.prepare(model, attentions, blocks)
            targets += submodule.lora_targets(config, attentions, blocks)
        to_save = [*(config.modules_to_save or []), *head_names(model)]
        config.modules_to_save = list(dict.fromkeys(to_save)) or None
        _wrap_heads(model, config, adapter_name)
        config.target_modules = targets or DUMMY_TARGET_MODULES
        # GPT-2 keeps its weights [in, out], and PEFT needs to know.
        first = model.get_submodule(attentions[0].query)
        base_layer = first.get_base_layer() if isinstance(first, LoraLayer) else first
        config.fan_in_fan_out = isinstance(base_layer, Conv1D)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        for layer in [m for m in model.modules() if isinstance(m, LoraLayer)]:
            move_up(layer.get_base_layer(), layer)
        # Loading finds both again by structure.
        config.target_modules, config.fan_in_fan_out = None, False
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            gates = site_gates(config, attentions, blocks)
            attach(Attachment(model, config, attentions, blocks, gates, adapter_name))
        if PASSES_CHILD in model._modules:
            DirectForward.attach(model, model.get_submodule(PASSES_CHILD))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one.

        Raises:
            ValueError: for several adapters, whose gates would each expect to be alone.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(one_at_a_time(adapter_name))
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Give the rows of a batch their adapters if the caller has named them."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        unknown = sorted(set(names) - {BASE, *self.peft_config})
        if unknown:
            raise ValueError(
                f"adapter_names contains {', '.join(unknown)}; the model has "
                f"{', '.join(self.peft_config)}, and {BASE} stands for the backbone alone"
            )
        # `generate` shows the batch here, of which beam search repeats the rows; a forward may not.
        rows = count_rows(args, kwargs)
        if rows is not None:
            require_count(names, rows)
        repeated = rows is not None
        with adapters_of_rows(self.model, names, lambda m: PASSES_CHILD in m._modules, repeated):
            yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError: adapters are not combined."""
        raise ValueError(
            "UniPELT adapters are not combined by their weights; train one adapter on all the data,"
            " or pass adapter_names, one for each row of a batch"
        )

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Add ungated LoRA to the weights of the backbone.

        Raises:
            ValueError: for adapters with anything else.
        """
        self._require_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _require_mergeable(self, adapter_names: list[str] | None) -> None:
        for name in self.active_adapters if adapter_names is None else adapter_names:
            config = self.peft_config[name]
            reasons = [s.unmergeable for s in chosen(config) if s.unmergeable]
            if config.gates == "learned":
                reasons.append("gates depend on the input")
            if reasons:
                raise ValueError(
                    f"the adapter {name} cannot be merged exactly: {', '.join(reasons)}. Keep it "
                    "beside the backbone, call unload() for the bare backbone, or see `scaleup "
                    "export --kind merged`"
                )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._require_mergeable(adapter_names)
        for module in self.model.modules():  # with those inside of PEFT's layers
            for name in [name for name in module._modules if name.startswith("unipelt_")]:
                for handle in getattr(module._modules[name], "handles", ()):
                    handle.remove()
        unloaded = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        for module in list(unloaded.modules()):
            for name in [name for name in module._modules if name.startswith("unipelt_")]:
                del module._modules[name]
        DirectForward.detach(unloaded)
        restore_attention(unloaded)
        unwrap_checkpointing(unloaded)
        return unloaded

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Remove the adapter's name, which PEFT expects right before the parameter's name."""
        shorter = re.sub(rf"\.(unipelt_\w+)\.{re.escape(adapter_name)}\.", r".\1.", key)
        return (
            shorter if shorter != key else super()._remove_adapter_name_from_key(key, adapter_name)
        )


class SavedHead(ModulesToSaveWrapper):
    """Saves a task head with every adapter. Adapters named in `frozen` do not train it.

    PEFT turns gradients on whenever it creates, activates or enables the copy of an adapter.
    """

    frozen: frozenset[str] = frozenset()

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        super().update(adapter_name, **kwargs)
        self._freeze()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self._freeze()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._freeze()

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze()

    def _freeze(self) -> None:
        for name in self.frozen & set(self.modules_to_save):
            self.modules_to_save[name].requires_grad_(False)


def _wrap_heads(model: nn.Module, config: UniPeltConfig, adapter_name: str) -> None:
    """Wrap the modules that are saved with the adapter, before PEFT does, in `SavedHead`."""
    modules = dict(model.named_modules())
    # PEFT adds the usual names of heads to the list, whether the model has such a module or not.
    for path in filter(modules.__contains__, config.modules_to_save or []):
        head = modules[path]
        if not isinstance(head, SavedHead):
            head = SavedHead(head, adapter_name)
            parent, _, name = path.rpartition(".")
            setattr(modules[parent], name, head)
        frozen = {adapter_name} if config.head == "frozen" else set()
        head.frozen = head.frozen - {adapter_name} | frozen


def site_of(name: str) -> str:
    """Return the path of the site of one of UniPELT's modules, given the path of the module."""
    return name.removeprefix(PEFT_PREFIX).split(".unipelt_", 1)[0]


def submodule_of(name: str) -> str | None:
    """Return the submodule of a parameter, "gates" for a gate, None for the backbone."""
    if GATES in f".{name}":
        return "gates"
    for submodule in SUBMODULES.values():
        if any(mark in f".{name}" for mark in submodule.parameters):
            return submodule.name
    return None


def parameter_counts(model: nn.Module) -> dict[str, Any]:
    """Count the parameters of a model that UniPELT, BitFit or full fine-tuning trains.

    Returns:
        backbone: the pretrained model without its head.
        head: the task head, trained or frozen, which is part of no other count.
        trained: what gets gradients, including the prefix's MLP.
        stored: what remains after training, where the MLP is collapsed to the prefix.
        submodules: the stored parameters of each submodule and of the gates.
        trained_percent, stored_percent: share of the backbone plus what was added to it, as in the
            paper's Table 4.
    """
    adapted = isinstance(model, PeftModel)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    heads = tuple(f"{name}." for name in head_names(base))
    modules = base.named_modules()
    wrapped = [f"{n}.original_module." for n, m in modules if isinstance(m, ModulesToSaveWrapper)]
    backbone = head = trained = added = 0
    parts = dict.fromkeys((*SUBMODULES, "gates"), 0)
    for name, parameter in base.named_parameters():
        count = _numel(parameter)
        if name.startswith(tuple(wrapped)):
            continue
        # A pooler that the backbone's files lack is trained and saved with the head.
        if name.startswith(heads) or ".modules_to_save." in name:
            head += count
            continue
        trained += count if parameter.requires_grad else 0
        part = submodule_of(name)
        if part is None:
            backbone += count
        else:
            added += count
            parts[part] += count
    for name, submodule in SUBMODULES.items():
        if parts[name]:
            stored_of_part = submodule.stored(base)
            parts[name] = parts[name] if stored_of_part is None else stored_of_part
        elif not submodule.in_paper:  # named only where it is used
            del parts[name]
    stored = sum(parts.values()) if adapted else trained
    return {
        "backbone": backbone,
        "head": head,
        "trained": trained,
        "stored": stored,
        "trained_percent": 100 * trained / (backbone + added),
        "stored_percent": 100 * stored / (backbone + (stored if adapted else 0)),
        "submodules": parts,
    }


def _numel(parameter: nn.Parameter) -> int:
    """Return the size of the whole parameter, of which a ZeRO-3 process holds a share."""
    if hasattr(parameter, "ds_numel"):
        return int(parameter.ds_numel)
    return unpacked_numel(parameter)


def _register() -> None:
    """Add UNIPELT to PEFT's types, as an enum member because Trainer and PEFT read `.value`."""
    if "UNIPELT" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "UNIPELT")
    member._name_, member._value_ = "UNIPELT", "UNIPELT"
    PeftType.UNIPELT = member
    PeftType._member_names_.append("UNIPELT")
    PeftType._member_map_["UNIPELT"] = member
    PeftType._value2member_map_["UNIPELT"] = member
    register_peft_method(
        name="unipelt", config_cls=UniPeltConfig, model_cls=UniPeltModel, prefix=UniPeltModel.prefix
    )
    extend(member, UniPeltModel.prefix, SavedHead)


_register()
