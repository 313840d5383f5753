"""Attaching UniPELT to the sites of a model.

Every parent model (one that gets a padding mask) gets a `Passes` child, every attention and block
gets the layers of the submodules that sit there. The same code attaches a PEFT adapter for training
and the modules of an exported folder.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from .attention import ATTENTION_CHILD
from .attention_gates import AttentionGates, AttentionMember
from .gate import ConstantGate, LearnedGate, resolve_pooling
from .layers import SiteLayer
from .passes import Passes
from .site_types import AttentionSite, BlockSite, mask_arguments

PASSES_CHILD = "unipelt_passes"

# Path of a site → submodule → constant in place of its gate, None for a learned gate.
SiteGates = dict[str, dict[str, float | None]]


def move_up(inner: nn.Module, outer: nn.Module) -> None:
    """Move UniPELT's children and hooks from a module to the one that PEFT has put around it.

    There they see what the whole layer reads and returns, also with the LoRA of another adapter.
    """
    for name in [name for name in inner._modules if name.startswith("unipelt_")]:
        outer.add_module(name, inner._modules.pop(name))
    for key, hook in list(inner._forward_pre_hooks.items()):
        layer = _owner(hook)
        if layer is not None:
            del inner._forward_pre_hooks[key], inner._forward_pre_hooks_with_kwargs[key]
            layer.handles.append(outer.register_forward_pre_hook(hook, with_kwargs=True))
    for key, hook in list(inner._forward_hooks.items()):
        layer = _owner(hook)
        if layer is not None:
            del inner._forward_hooks[key]
            layer.handles.append(outer.register_forward_hook(hook))


def _owner(hook: Any) -> SiteLayer | None:
    """Return the layer to which a hook belongs, or to a member of which."""
    owner = getattr(hook, "__self__", None)
    owner = owner.layer if isinstance(owner, AttentionMember) else owner
    return owner if isinstance(owner, SiteLayer) else None


class Attachment:
    """One adapter on its way into a model.

    Attributes:
        model: the backbone.
        config: settings of the method, with the fields of UniPeltConfig.
        attentions, blocks: the sites of the model.
        adapter_name: the name of the PEFT adapter, None in an exported folder.
        passes: the `Passes` of each parent model, by path.
        gate_scales: constants that multiply the learned gates, by submodule. `attach` sets them.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        attentions: list[AttentionSite],
        blocks: list[BlockSite],
        gates: SiteGates,
        adapter_name: str | None = None,
    ):
        self.model, self.config, self.adapter_name = model, config, adapter_name
        self.attentions, self.blocks, self.gates = attentions, blocks, gates
        learned = any(value is None for site in gates.values() for value in site.values())
        parents = dict.fromkeys(
            [site.parent for site in attentions] + [site.parent for site in blocks]
        )
        masked = learned or adapter_name is not None
        self.passes = {parent: self._passes(parent, masked) for parent in parents}
        self.gate_scales: dict[str, float] = {}
        self._attentions: dict[str, AttentionGates] = {}

    def child(
        self, parent: nn.Module, name: str, make: Callable[[], nn.Module], hooks: dict[str, str]
    ) -> Any:
        """Return `parent.name`, made and hooked the first time.

        Args:
            parent: the module that gets the child.
            name: name of the child.
            make: makes the child.
            hooks: kind of hook on the parent (see `hook`) → name of a method of the child.
        """
        if name not in parent._modules:
            child = make()
            parent.add_module(name, child)
            for kind, method in hooks.items():
                self.hook(child, parent, kind, getattr(child, method))
        return parent._modules[name]

    def hook(self, layer: Any, module: nn.Module, kind: str, method: Callable[..., Any]) -> None:
        """Call a bound method at each forward pass of a module until the layer is removed.

        Hooks are bound methods, because closures would break copies of the model.

        Args:
            layer: the layer that owns the hook.
            module: the module to watch.
            kind: "before" the pass, "after" it, "first" of those after it, or "always" after it,
                which includes passes that raised an exception.
            method: the hook.
        """
        if kind == "before":
            handle = module.register_forward_pre_hook(method, with_kwargs=True)
        else:
            handle = module.register_forward_hook(
                method, always_call=kind == "always", prepend=kind == "first"
            )
        layer.handles.append(handle)

    def has(self, path: str, submodule: str) -> bool:
        """Return whether a submodule sits at a site."""
        return submodule in self.gates.get(path, {})

    def gate(
        self,
        layer: SiteLayer,
        path: str,
        names: tuple[str, ...],
        hidden_size: int,
        causal: bool,
        whole: bool = False,
    ) -> nn.Module:
        """Return the gate of submodules that share a layer.

        Args:
            layer: the layer that will hold the gate.
            path: path of the site.
            names: the submodules.
            hidden_size: width of the input that the gate reads.
            causal: whether the gate must not depend on later tokens.
            whole: whether its input is an encoder's, of which every token may always be seen.
        """
        constants = {name: self.gates[path][name] for name in names}
        known = {name: value for name, value in constants.items() if value is not None}
        if len(known) == len(names):
            return ConstantGate(known)
        pooling = resolve_pooling(self.config.gate_pooling, causal)
        pooling = "masked" if whole and pooling == "causal" else pooling
        scales = tuple(self.gate_scales[name] for name in names)
        bias = 0.0 if self.adapter_name is None else self.config.gate_bias  # a folder has its own
        gate = LearnedGate(hidden_size, names, pooling, scales, bias)
        passes, slots = layer.passes, layer.running.slots
        if pooling == "causal" and passes.kv_layers and len(names) not in slots:
            slots[len(names)] = passes.new_slot(len(names))  # its totals travel in the KV cache
        return gate

    def attention(self, site: AttentionSite) -> AttentionGates:
        """Return the layer of an attention, with this adapter's gates for all submodules there."""
        if site.name not in self._attentions:
            query = self.model.get_submodule(site.query)
            layer = self.child(
                self.model.get_submodule(site.name),
                ATTENTION_CHILD,
                lambda: AttentionGates(query, site, self.passes[site.parent]),
                {"before": "before_attention", "always": "after_attention"},
            )
            names = tuple(self.gates[site.name])
            gate = self.gate(layer, site.name, names, site.hidden_size, site.causal_block)
            layer.add(self.adapter_name, unipelt_gate=gate)
            self._attentions[site.name] = layer
        return self._attentions[site.name]

    def _passes(self, parent: str, masked: bool) -> Passes:
        module = self.model.get_submodule(parent)
        new = PASSES_CHILD not in module._modules
        child: Passes = self.child(
            module,
            PASSES_CHILD,
            lambda: Passes(mask_arguments(module) if masked else None),
            {"before": "begin", "always": "end"},
        )
        causal = [site for site in self.attentions if site.parent == parent and site.causal]
        if new and masked and causal:
            child.kv_layers = len(causal)
            first = next(site for site in self.blocks if site.parent == parent and site.causal)
            self.hook(child, self.model.get_submodule(first.name), "before", child.note_cache)
        return child
