"""UniPELT as a PEFT method: its config, how it is attached to a backbone, and what it counts.

    model = get_peft_model(model, UniPeltConfig())                     attach and freeze
    PeftModel.from_pretrained(model, folder)                           after `import scaleup`

Everything that is trained lives inside the backbone as PEFT tuner layers, so PEFT saves, loads, switches and disables it.
This is the only file that extends PEFT's registries and overrides its private methods.
"""

import dataclasses
import re
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

from scaleup import lora
from scaleup.adapter import Bottleneck, PostNormAdapter, PreNormAdapter
from scaleup.attention import AttentionGates
from scaleup.backbone import AttentionSite, BlockSite, find_sites, head_names, mask_arguments
from scaleup.config import SUBMODULES, MethodSettings
from scaleup.gate import GateFactory, TokenMask, gate_factory
from scaleup.prefix import ATTENTION, CHILD, PrefixBank
from scaleup.tuner import SideLayer

MASK_CHILD, BLOCK_CHILD = "unipelt_mask", "unipelt_block"
BANK_CHILD = {False: "unipelt_bank_self", True: "unipelt_bank_cross"}

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
        named = [self.submodules] if isinstance(self.submodules, str) else list(self.submodules)
        unknown = sorted(set(named) - set(SUBMODULES))
        if unknown or not named or len(set(named)) != len(named):
            raise ValueError(f"submodules must name adapter, prefix or lora, each at most once and at least one; got {named}")
        self.submodules = [name for name in SUBMODULES if name in named]
        self.gates = self.gates or ("learned" if len(self.submodules) > 1 else "none")
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
        changed = [field for field, value in FIXED.items() if getattr(self, field) != value]
        changed += [field for field in ("rank_pattern", "alpha_pattern") if getattr(self, field)]
        if changed or not isinstance(self.init_lora_weights, bool):
            raise ValueError(f"UniPELT puts plain LoRA on every query and value; leave out {', '.join(changed or ['init_lora_weights'])}")


class UniPeltModel(LoraModel):
    """Attaches UniPELT to a model. Use it through `get_peft_model`.

    What is attached where: on every model that gets a padding mask, a `TokenMask` and its prefixes; on every attention,
    `AttentionGates`; on query and value, PEFT's LoRA with a gate; at the end of every block, the adapter.
    """

    # `inject_adapter_in_model` and `model.add_adapter` would skip the shared prefixes; PEFT refuses them for this flag.
    uses_shared_state = True
    tuner_layer_cls = (LoraLayer, SideLayer)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True, low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        """LoRA the way PEFT does it, then gates, prefixes and adapters, then the head."""
        config = self.peft_config[adapter_name]
        attentions, blocks = find_sites(model)
        if "prefix" in config.submodules:
            _use_prefix_attention(model)
        heads = head_names(model)
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads])) or None
        with_lora = "lora" in config.submodules
        config.target_modules = [n for s in attentions for n in (s.query, s.value)] if with_lora else DUMMY_TARGET_MODULES
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        config.target_modules = None  # found again by structure when the config is loaded
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            _attach(model, adapter_name, config, attentions, blocks)
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
            for name in (MASK_CHILD, *BANK_CHILD.values(), CHILD, BLOCK_CHILD):
                child = module._modules.pop(name, None)
                for handle in child.handles if child is not None else ():
                    handle.remove()
        plain = {ours: theirs for theirs, ours in ATTENTION.items()}
        if unloaded.config._attn_implementation in plain:
            unloaded.set_attn_implementation(plain[unloaded.config._attn_implementation])
        return unloaded

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT expects the adapter's name right before the parameter's; in ours whole modules follow it."""
        ours = re.sub(rf"\.(unipelt_\w+)\.{re.escape(adapter_name)}\.", r".\1.", key)
        return ours if ours != key else super()._remove_adapter_name_from_key(key, adapter_name)


def _use_prefix_attention(model: PreTrainedModel) -> None:
    """Switches the model to the attention functions that know prefixes. Raises ValueError if it cannot."""
    current = model.config._attn_implementation
    if current in ATTENTION.values():
        return
    if not model._can_set_attn_implementation():
        raise ValueError(f"{type(model).__name__} has no exchangeable attention, so a prefix cannot reach it; use adapter and lora")
    if current not in ATTENTION:
        raise ValueError(f"the prefix works with sdpa or eager attention, not with {current}; load the model with attn_implementation='sdpa'")
    model.set_attn_implementation(ATTENTION[current])
    assert model.config._attn_implementation == ATTENTION[current]


def _child(parent: nn.Module, name: str, make, hooks: dict[str, str]) -> nn.Module:
    """`parent.name`, made and hooked up the first time. Hooks are bound methods, so copies of the model keep working."""
    if name not in parent._modules:
        child = make()
        parent.add_module(name, child)
        child.handles = []
        for kind, method in hooks.items():
            if kind == "before":
                handle = parent.register_forward_pre_hook(getattr(child, method), with_kwargs=True)
            else:
                handle = parent.register_forward_hook(getattr(child, method), always_call=kind == "always")
            child.handles.append(handle)
    return parent._modules[name]


def _attach(
    model: nn.Module, name: str, config: UniPeltConfig, attentions: list[AttentionSite], blocks: list[BlockSite]
) -> None:
    lora_scaling = config.lora_alpha / config.r if "lora" in config.submodules else 1.0
    gates = gate_factory(config.gates == "learned", config.gate_pooling, lora_scaling)
    masks = {}
    for host in dict.fromkeys(site.host for site in attentions):
        module = model.get_submodule(host)
        masks[host] = _child(module, MASK_CHILD, lambda: TokenMask(mask_arguments(module)), {"before": "capture"})
    banks = _attach_prefixes(model, name, config, attentions) if "prefix" in config.submodules else {}
    names = tuple(part for part in ("prefix", "lora") if part in config.submodules)
    for site in attentions if names else ():
        _attach_attention(model, name, site, names, masks[site.host], banks.get((site.host, site.cross)), gates)
    for site in blocks if "adapter" in config.submodules else ():
        _attach_adapter(model, name, config, site, masks[site.host], gates)


def _attach_prefixes(model, name, config, attentions) -> dict[tuple[str, bool], PrefixBank]:
    """One bank per model and kind of attention: BART gets encoder self, decoder self and cross."""
    banks = {}
    for key in dict.fromkeys((site.host, site.cross) for site in attentions):
        sites = [site for site in attentions if (site.host, site.cross) == key]
        first = sites[0]
        bank = _child(
            model.get_submodule(first.host), BANK_CHILD[first.cross],
            lambda: PrefixBank(model.get_submodule(first.value), len(sites), first.kv_heads, first.head_size),
            {"before": "before_forward"},
        )  # fmt: skip
        bank.add(name, unipelt_prefix=bank.encoder(config.prefix_length, config.prefix_hidden_size, config.prefix_reparameterization))
        banks[key] = bank
    return banks


def _attach_attention(
    model: nn.Module, name: str, site: AttentionSite, names: tuple[str, ...], mask: TokenMask, bank: PrefixBank | None, gates: GateFactory
) -> None:
    child = _child(
        model.get_submodule(site.name), CHILD,
        lambda: AttentionGates(model.get_submodule(site.query), mask, bank, site.layer, site.cross, site.causal),
        {"before": "before_attention", "always": "after_attention"},
    )  # fmt: skip
    child.use_bank(bank)
    child.add(name, unipelt_gate=gates(site.hidden_size, names, site.causal_block))
    if "lora" in names:
        lora.attach(model.get_submodule(site.query), name, child, "query")
        lora.attach(model.get_submodule(site.value), name, child, "value")


def _attach_adapter(
    model: nn.Module, name: str, config: UniPeltConfig, site: BlockSite, mask: TokenMask, gates: GateFactory
) -> None:
    block = model.get_submodule(site.name)
    if site.norm is None:
        linear = next(module for module in block.modules() if isinstance(module, nn.Linear))
        layer = _child(block, BLOCK_CHILD, lambda: PreNormAdapter(linear, mask), {"after": "after_block"})
    else:
        layer = model.get_submodule(site.norm)
        if not isinstance(layer, PostNormAdapter):
            layer = PostNormAdapter(layer, mask)
            parent, _, child = site.norm.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
    layer.add(
        name,
        unipelt_adapter=Bottleneck(site.hidden_size, config.adapter_size, config.adapter_activation),
        unipelt_gate=gates(site.hidden_size, ("adapter",), site.causal),
    )


def apply_method(model: PreTrainedModel, method: MethodSettings) -> nn.Module:
    """The model with exactly the parameters of `method` trainable; what is added is float32. The head trains in every method."""
    if method.name == "unipelt":
        values = method.model_dump(exclude={"name", "gates"})
        config = UniPeltConfig(task_type="SEQ_CLS", gates=method.resolved_gates, **values)
        return get_peft_model(model, config)
    heads = tuple(f"{name}." for name in head_names(model))
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
        if name.startswith(heads):
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
