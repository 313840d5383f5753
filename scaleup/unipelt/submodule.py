"""The definition of a submodule of UniPELT.

A submodule is one file that subclasses `Submodule`, and one entry in the list in `submodules.py`.
Attachment, counting, saving, export, pruning, gate reports, the config and the JSON schema iterate
over that list. The file of a submodule states

- where it sits: at attentions (they share one gate projection) or at blocks;
- which narrow linear maps of the site's input it reads;
- what its gate scales, and what it computes;
- what it stores (`parameters`, `stored`), what becomes of it when its gate is a constant (`fold`),
  and by how much it changes the value at its site (its layers call their `observer`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from .attachment import Attachment
from .site_types import AttentionSite, BlockSite

LARGEST = 65_536  # sizes of submodules; more would be larger than the model


def option(
    default: Any,
    description: str,
    *,
    choices: Sequence[str] = (),
    accepts: Sequence[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """Declare one setting of UniPELT as a dataclass field.

    The config of the PEFT method, the `method` section of a run, its JSON schema and the help text
    are all derived from these fields.

    Args:
        default: the value of the paper.
        description: one or two plain sentences, with the unit.
        choices: the valid texts, if there are only a few.
        accepts: texts that UniPeltConfig takes beyond the choices offered to a run.
        at_least, above, below, at_most: bounds of a number.
    """
    bounds = {"at_least": at_least, "above": above, "below": below, "at_most": at_most}
    metadata: dict[str, Any] = {"description": description}
    metadata |= {"choices": tuple(choices), "accepts": tuple(accepts)}
    metadata |= {name: bound for name, bound in bounds.items() if bound is not None}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def invalid_option(field: dataclasses.Field[Any], value: Any) -> str | None:
    """Return what is wrong with the value of an option, or None."""
    rule = field.metadata
    texts = rule["accepts"] or rule["choices"]
    if texts and value not in texts:
        return f"{field.name} must be one of {', '.join(texts)}; got {value!r}"
    if isinstance(field.default, bool) and not isinstance(value, bool):
        return f"{field.name} must be true or false; got {value!r}"
    numeric = [name for name in ("at_least", "above", "below", "at_most") if name in rule]
    if not numeric:
        return None
    whole = isinstance(field.default, int) and field.type in ("int", int)
    kind = int if whole else (int, float)
    in_range = isinstance(value, kind) and not isinstance(value, bool)
    in_range = in_range and rule.get("at_least", value) <= value
    in_range = in_range and ("above" not in rule or rule["above"] < value < float("inf"))
    in_range = in_range and ("below" not in rule or value < rule["below"])
    in_range = in_range and value <= rule.get("at_most", value)
    if in_range:
        return None
    if whole:
        limit = f" of at most {rule['at_most']:,}" if "at_most" in rule else ""
        return f"{field.name} must be a positive whole number{limit}; got {value!r}"
    bounds = " and ".join(f"{name.replace('_', ' ')} {rule[name]:g}" for name in numeric)
    return f"{field.name} must be {bounds}; got {value!r}"


@dataclasses.dataclass
class NoOptions:
    """The options of a submodule without settings."""


Gates = dict[tuple[str, str], float]
"""Constants in place of gates, by the path of a site and the name of a gate."""


@dataclasses.dataclass
class Folding:
    """The state of an export while submodules write themselves into it.

    Attributes:
        config: settings of the method, the prefix's MLP already collapsed.
        checkpoint: tensors of the adapter checkpoint by their names in the model.
        gates: constants in place of the gates; None if gates stay learned.
        dropped: (path of a site, name of a submodule) pairs that are left out.
        tensors: result; tensors that the exported folder adds or replaces.
        updates: result; additions [out, in] to the weights of these names.
        renamed: result; modules whose parameters move into another module.
        kept: result; path of a site → the submodules that remain there as modules.
    """

    config: Any
    checkpoint: dict[str, torch.Tensor]
    gates: Gates | None
    dropped: frozenset[tuple[str, str]] = frozenset()
    tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    updates: dict[str, Callable[[], torch.Tensor]] = dataclasses.field(default_factory=dict)
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)
    kept: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def factor(self, site: str, gate: str) -> float:
        """Return the constant that a weight absorbs; 1 if the gate stays learned."""
        return 1.0 if self.gates is None else self.gates[site, gate]

    def keep(self, prefix: str, factor: float = 1.0) -> None:
        """Copy the checkpoint's tensors whose names begin with `prefix`, scaled."""
        tensors = {n: t for n, t in self.checkpoint.items() if n.startswith(prefix)}
        assert tensors, prefix
        self.tensors |= {n: t * factor if factor != 1.0 else t for n, t in tensors.items()}

    def keep_gate(self, site: str, prefix: str, submodule: str) -> None:
        """Note that a submodule remains at a site, with its learned gate if gates stay learned."""
        self.kept.setdefault(site, []).append(submodule)
        if self.gates is None:
            self.keep(prefix)


class Submodule:
    """One parameter-efficient method inside UniPELT."""

    name: ClassVar[str]
    """The name in `submodules`, in reports and of its gate."""

    learning_rate: ClassVar[float] = 5e-4
    """The default learning rate of a run that trains this submodule alone."""

    options: ClassVar[type] = NoOptions
    """A dataclass of `option` fields; they become fields of UniPeltConfig."""

    parameters: ClassVar[tuple[str, ...]]
    """Parts of parameter names, such as ".unipelt_adapter.", that mark its parameters."""

    in_paper: ClassVar[bool] = False
    """Whether UniPELT as published contains it, which makes it part of the default."""

    prunable: ClassVar[bool] = True
    """Whether a site can be left out of an export; LoRA folds into the weights instead."""

    unmergeable: ClassVar[str] = ""
    """Why it cannot be merged into weights exactly without a learned gate, empty if it can."""

    def paths(
        self, config: Any, attentions: list[AttentionSite], blocks: list[BlockSite]
    ) -> list[str]:
        """Return the paths of the sites where it sits, by which its gates are reported."""
        raise NotImplementedError

    def constant_gate(self, config: Any) -> float:
        """Return the factor that stands in for the gate where gates are not learned."""
        return 1.0

    def gate_scale(self, config: Any) -> float:
        """Return the constant by which its learned gate is multiplied."""
        return 1.0

    def check(self, attentions: list[AttentionSite]) -> None:
        """Raise ValueError if it cannot be attached to a model with these attentions."""

    def prepare(
        self, model: nn.Module, attentions: list[AttentionSite], blocks: list[BlockSite]
    ) -> None:
        """Change the model before anything is attached, or raise ValueError if it cannot be."""

    def lora_targets(
        self, config: Any, attentions: list[AttentionSite], blocks: list[BlockSite]
    ) -> list[str]:
        """Return the paths of the linear layers that PEFT shall turn into its LoRA layers."""
        return []

    def attach(self, attachment: Attachment) -> None:
        """Add its modules and hooks to the model, for one adapter.

        What belongs to a single site can be left to the next two methods, which are called after
        this method of every submodule.
        """

    def attach_to_attention(self, attachment: Attachment, site: AttentionSite) -> None:
        """Add its modules and hooks to one attention, where it has a gate."""

    def attach_to_block(self, attachment: Attachment, site: BlockSite) -> None:
        """Add its modules and hooks to one block."""

    def stored(self, model: nn.Module) -> int | None:
        """Return the number of values that remain after training, None for all parameters."""
        return None

    def collapse(
        self, config: Any, tensors: dict[str, torch.Tensor]
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """Replace what only training needs by what it evaluates to."""
        return config, tensors

    def fold(
        self, folding: Folding, attentions: list[AttentionSite], blocks: list[BlockSite]
    ) -> None:
        """Write its tensors into an export."""
        raise NotImplementedError
