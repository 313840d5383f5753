"""UniPELT as a PEFT method: its config, how it is attached to a backbone, and what it counts.

    model = get_peft_model(model, UniPeltConfig())                     attach and freeze
    PeftModel.from_pretrained(model, folder)                           after `import scaleup`

Everything that is trained lives inside the backbone as PEFT tuner layers, so PEFT saves, loads, switches and disables it.
This is the only file that extends PEFT's registries and overrides its private methods.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, LoraModel, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, register_peft_method
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from scaleup import quantised
from scaleup.attach import BANK_CHILD, BLOCK_CHILD, TOKENS_CHILD, attach, use_prefix_attention, with_own_config
from scaleup.backbone import head_names
from scaleup.config import SUBMODULES, MethodSettings
from scaleup.prefix import ATTENTION, CHILD, PrefixBank
from scaleup.sites import find_sites
from scaleup.tuner import SideLayer

# What LoraConfig offers and UniPELT cannot honour, with the only value it takes.
FIXED = {
    "target_modules": None, "exclude_modules": None, "bias": "none", "use_rslora": False, "layers_to_transform": None,
    "layers_pattern": None, "megatron_config": None, "trainable_token_indices": None, "eva_config": None, "corda_config": None,
    "lora_ga_config": None, "use_dora": False, "velora_config": None, "alora_invocation_tokens": None, "use_qalora": False,
    "monteclora_config": None, "layer_replication": None, "lora_bias": False, "target_parameters": None, "use_bdlora": None,
    "arrow_config": None, "kasa_config": None, "fan_in_fan_out": False, "ensure_weight_tying": False,
}  # fmt: skip


@dataclasses.dataclass
class UniPeltConfig(LoraConfig):
    """Settings of the PEFT method UNIPELT; the defaults are the paper's. `r`, `lora_alpha` and `lora_dropout` are LoraConfig's.

    submodules: any of "adapter", "prefix", "lora".
    gates: "learned" or "none" (NoGate); left out: learned for two or three submodules, none for one, as in the paper.
    gate_pooling: "auto", "paper", "masked" or "causal", see `scaleup.gate.resolve_pooling`.
    adapter_size, adapter_activation: units of the bottleneck and its nonlinearity (a transformers name, "relu").
    prefix_length, prefix_hidden_size: positions per attention; units of the MLP behind them.
    prefix_reparameterization: "mlp", or "none" to train keys and values directly.

    Raises ValueError for values outside these and for LoraConfig's fields that have no meaning here.
    """

    r: int = 8
    lora_alpha: float = 16
    submodules: list[str] | str = dataclasses.field(default_factory=lambda: list(SUBMODULES))
    gates: Literal["learned", "none"] | None = None
    gate_pooling: Literal["auto", "paper", "masked", "causal"] = "auto"
    adapter_size: int = 48
    adapter_activation: str = "relu"
    prefix_length: int = 10
    prefix_hidden_size: int = 512
    prefix_reparameterization: Literal["mlp", "none"] = "mlp"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.UNIPELT
        named = [self.submodules] if isinstance(self.submodules, str) else self.submodules
        if not isinstance(named, list | tuple | set) or not named or any(named_part not in SUBMODULES for named_part in named) or len(set(named)) != len(named):
            raise ValueError(f"submodules must name adapter, prefix or lora, each at most once and at least one; got {named}")
        self.submodules = [name for name in SUBMODULES if name in named]
        if self.gates is None:
            self.gates = "learned" if len(self.submodules) > 1 else "none"
        choices = {
            "gates": ("learned", "none"),
            "gate_pooling": ("auto", "paper", "masked", "causal"),
            "prefix_reparameterization": ("mlp", "none"),
        }
        if "adapter" in self.submodules:
            choices["adapter_activation"] = tuple(ACT2FN)
        for field, values in choices.items():
            if getattr(self, field) not in values:
                raise ValueError(f"{field} must be one of {', '.join(values)}; got {getattr(self, field)!r}")
        sizes = {"r": "lora", "adapter_size": "adapter", "prefix_length": "prefix", "prefix_hidden_size": "prefix"}
        for field in (field for field, part in sizes.items() if part in self.submodules):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} must be a positive whole number; got {value!r}")
        ranges = {"lora_alpha": (0, math.inf), "lora_dropout": (-1e-9, 1)}
        for field, (low, high) in ranges.items() if "lora" in self.submodules else ():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
                raise ValueError(f"{field} must be {'above 0' if low == 0 else 'at least 0 and below 1'}; got {value!r}")
        changed = [field for field, value in FIXED.items() if getattr(self, field) != value]
        changed += [field for field in ("rank_pattern", "alpha_pattern") if getattr(self, field)]
        if changed or not isinstance(self.init_lora_weights, bool):
            raise ValueError(f"UniPELT puts plain LoRA on every query and value; leave out {', '.join(changed or ['init_lora_weights'])}")


class UniPeltModel(LoraModel):
    """Attaches UniPELT to a model, see scaleup.attach. Use it through `get_peft_model`."""

    # `inject_adapter_in_model` and `model.add_adapter` would skip the shared prefixes; PEFT refuses them for this flag.
    uses_shared_state = True
    tuner_layer_cls = (LoraLayer, SideLayer)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True, low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        """LoRA the way PEFT does it, then gates, prefixes and adapters, then the head."""
        config = self.peft_config[adapter_name]
        quantised.keep_layout(model)  # a backbone that the user has loaded
        attentions, blocks = find_sites(model)
        if "prefix" in config.submodules and any(site.softmax_scale is None for site in attentions):
            use_prefix_attention(model)
        heads = head_names(model)
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads])) or None
        with_lora = "lora" in config.submodules
        config.target_modules = [n for s in attentions for n in (s.query, s.value)] if with_lora else DUMMY_TARGET_MODULES
        # GPT-2 keeps its weights [in, out]. PEFT wants to be told and would leave it in the config.
        first = model.get_submodule(attentions[0].query)
        config.fan_in_fan_out = isinstance(first.get_base_layer() if isinstance(first, LoraLayer) else first, Conv1D)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        # Both are found again by structure when the config is loaded.
        config.target_modules, config.fan_in_fan_out = None, False
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            attach(model, adapter_name, config, attentions, blocks)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter the active one. Raises ValueError for several: their gates would each expect to be alone."""
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"UniPELT runs one adapter at a time; got {', '.join(adapter_name)}")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs) -> nn.Module:
        if merge:
            raise ValueError(
                "UniPELT cannot be merged exactly: gates depend on the input, the prefix changes the softmax, the adapter is "
                "nonlinear. Save the adapter with save_pretrained, or call unload() for the bare backbone"
            )
        unloaded = super()._unload_and_optionally_merge(merge=False, **kwargs)
        for module in list(unloaded.modules()):
            for name in (TOKENS_CHILD, *BANK_CHILD.values(), CHILD, BLOCK_CHILD):
                child = module._modules.pop(name, None)
                for handle in child.handles if child is not None else ():
                    handle.remove()
        plain = {ours: theirs for theirs, ours in ATTENTION.items()}
        for part in with_own_config(unloaded):
            if part.config._attn_implementation in plain:
                part.set_attn_implementation(plain[part.config._attn_implementation])
        return unloaded

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT expects the adapter's name right before the parameter's; in ours whole modules follow it."""
        ours = re.sub(rf"\.(unipelt_\w+)\.{re.escape(adapter_name)}\.", r".\1.", key)
        return ours if ours != key else super()._remove_adapter_name_from_key(key, adapter_name)


def task_type(model: PreTrainedModel) -> str:
    """PEFT's name for what the model's head does."""
    if model.get_output_embeddings() is None:
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def apply_method(model: PreTrainedModel, method: MethodSettings, fresh: Sequence[str] = ()) -> nn.Module:
    """The model with exactly the parameters of `method` trainable; what is added is float32. The head trains in every method, and so
    do `fresh`, modules of the backbone without pretrained weights."""
    if method.name == "unipelt":
        values = method.model_dump(exclude={"name", "gates"})
        config = UniPeltConfig(task_type=task_type(model), gates=method.resolved_gates, modules_to_save=list(fresh) or None, **values)
        return get_peft_model(model, config)
    heads = tuple(f"{name}." for name in (*head_names(model), *fresh))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(method.name == "full" or name.endswith(".bias") or name.startswith(heads))
    return model


def _numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter: ZeRO-3 keeps its count apart, 4-bit weights hold two in a byte."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def parameter_counts(model: nn.Module) -> dict[str, int | float | dict[str, int]]:
    """Parameters of a model that UniPELT, BitFit or full fine-tuning trains.

    backbone: the pretrained model without its head. head: the task head (trained in every method, in no other count).
    trained: what gets gradients, prefix MLP included. stored: what remains after training, the MLP collapsed to the prefix.
    submodules: stored, by part. trained_percent, stored_percent: of the backbone plus what was added to it, as in the
    paper's Table 4.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    heads = tuple(f"{name}." for name in head_names(base))
    wrapped = [f"{name}.original_module." for name, m in base.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    backbone = head = trained = added = 0
    parts = dict.fromkeys(("adapter", "prefix", "lora", "gates"), 0)
    for name, parameter in base.named_parameters():
        count = _numel(parameter)
        part = next((p for mark, p in PARTS if mark in f".{name}"), None)
        if name.startswith(tuple(wrapped)):
            continue
        if name.startswith(heads) or ".modules_to_save." in name:  # a pooler that the backbone's files lack
            head += count
            continue
        trained += count if parameter.requires_grad else 0
        if part is None:
            backbone += count
        else:
            added += count
            parts[part] += count if part != "prefix" else 0
    for module in base.modules():
        if isinstance(module, PrefixBank):
            parts["prefix"] += module.stored()
    adapted = isinstance(model, PeftModel)
    stored = sum(parts.values()) if adapted else trained
    return {
        "backbone": backbone, "head": head, "trained": trained, "stored": stored,
        "trained_percent": 100 * trained / (backbone + added), "stored_percent": 100 * stored / (backbone + (stored if adapted else 0)),
        "submodules": parts,
    }  # fmt: skip


PARTS = (
    (".unipelt_adapter.", "adapter"), (".unipelt_prefix.", "prefix"), (".unipelt_gate.", "gates"), (".lora_A.", "lora"), (".lora_B.", "lora")
)  # fmt: skip


def _register() -> None:
    """UNIPELT among PEFT's types. An enum member, not a string: Trainer and PEFT read `.value`."""
    if "UNIPELT" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "UNIPELT")
    member._name_, member._value_ = "UNIPELT", "UNIPELT"
    PeftType.UNIPELT = member
    PeftType._member_names_.append("UNIPELT")
    PeftType._member_map_["UNIPELT"] = member
    PeftType._value2member_map_["UNIPELT"] = member
    register_peft_method(name="unipelt", config_cls=UniPeltConfig, model_cls=UniPeltModel, prefix=UniPeltModel.prefix)


_register()
