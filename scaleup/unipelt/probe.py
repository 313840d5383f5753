"""Run an empty copy of a model once, and record what its structure does.

The copy has no weights and takes no memory (meta device). With experts it computes in bfloat16, the
only type in which their products run there. Its padding mask is a fake tensor: where transformers
would look at the values of a mask, it takes a fake one for a model that is being traced.
"""

import copy
import dataclasses
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import MODEL_MAPPING, PreTrainedModel

from .attention import PROBE, Call, models_with_own_config, probing
from .linears import is_linear
from .site_types import ENCODER_ARGUMENTS

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TOKENS = 4


@dataclasses.dataclass
class Run:
    """One run of an empty copy. Modules are given by their paths.

    Attributes:
        modules: all modules of the copy.
        outputs: first output of each module that ran, in the order in which they finished.
        inputs: what each linear layer read when it ran first.
        cross: the modules that got the output of an encoder.
        calls: what each attention asked of its attention function.
    """

    modules: dict[str, nn.Module]
    outputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    cross: set[str] = dataclasses.field(default_factory=set)
    calls: dict[str, Call] = dataclasses.field(default_factory=dict)

    def watch(self, name: str, module: nn.Module) -> None:
        """Record a module when it runs."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(kwargs.get(argument) is not None for argument in ENCODER_ARGUMENTS):
                self.cross.add(name)
            if is_linear(module):
                self.inputs.setdefault(name, args[0] if args else kwargs["input"])

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.outputs[name] = output[0] if isinstance(output, (tuple, list)) else output

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)


def probe(model: PreTrainedModel) -> Run:
    """Run an empty copy of a model on TOKENS tokens, without its head.

    Raises:
        ValueError: for a model that does not run so, or that reads something else than text.
    """
    if not reads_text(model.config):
        raise ValueError(f"{unsupported(model)}: {not_for_texts(model.config)}")
    empty = _empty_copy(model)
    run = Run(dict(empty.named_modules()))
    for name, module in run.modules.items():
        run.watch(name, module)
    tokens = torch.ones(1, TOKENS, dtype=torch.long, device="meta")
    # Without a mask, decoders look at the values of positions to find packed sequences.
    mask = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(tokens)
    inputs: dict[str, torch.Tensor] = {"input_ids": tokens, "attention_mask": mask}
    if empty.config.is_encoder_decoder:
        inputs |= {f"decoder_{name}": tensor for name, tensor in inputs.items()}
    with probing() as calls:
        try:
            with torch.no_grad():
                empty.base_model(**inputs)
        except (RuntimeError, TypeError, AttributeError, ValueError, NotImplementedError) as error:
            raise ValueError(_why_not(empty, error)) from error
    paths = {id(module): name for name, module in run.modules.items()}
    run.calls = {paths[id(call.module)]: call for call in calls}
    return run


def unsupported(model: PreTrainedModel) -> str:
    """Return the beginning of the messages about models that are refused."""
    return f"UniPELT does not support the model type {model.config.model_type}"


def reads_text(config: Any) -> bool:
    """Tell whether the main input of a model type is text."""
    return _model_class(config).main_input_name == "input_ids"


def not_for_texts(config: Any) -> str | None:
    """Return why a model type that does not run on text alone is none for UniPELT.

    None if text is all that it reads.
    """
    modalities = _model_class(config).input_modalities
    others = ({modalities} if isinstance(modalities, str) else set(modalities)) - {"text"}
    reads = " and ".join(sorted(others))
    return f"it takes {reads} input, and UniPELT is a method for text models" if others else None


def _model_class(config: Any) -> type[PreTrainedModel]:
    """Return transformers' class for the body of a model type."""
    found: Any = MODEL_MAPPING.get(type(config), PreTrainedModel)
    return found[0] if isinstance(found, tuple) else found


def _why_not(empty: PreTrainedModel, error: Exception) -> str:
    reason = " ".join(str(error).split())[:100]
    why = not_for_texts(empty.config) or "it does not run without weights"
    return f"{unsupported(empty)}: {why} ({reason})"


def _empty_copy(model: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    config._attn_implementation = PROBE if model._can_set_attn_implementation() else "eager"
    if "quantization_config" in config.__dict__:  # the copy has no weights to quantise
        del config.quantization_config
    with torch.device("meta"):
        empty = type(model)(config).eval()
    if has_experts(empty):
        empty.to(torch.bfloat16)
    # The mask of eager attention looks at values, which the copy does not have.
    for part in models_with_own_config(empty):
        part.config._attn_implementation = PROBE
    return empty


def has_experts(module: nn.Module) -> bool:
    """Tell whether a module holds the weights of experts, [experts, in, out] or [experts, out, in].

    Convolutions have weights of three dimensions, too.
    """
    return any(
        parameter.dim() == 3
        for part in module.modules()
        if not isinstance(part, CONVOLUTIONS)
        for parameter in part.parameters(recurse=False)
    )
