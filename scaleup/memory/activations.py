"""Predict the memory of a training step beside weights and states.

The adapted model runs forward and backward under FakeTensorMode: no tensor holds data, but every
operation reports which tensors it would make. Three numbers come out: what autograd keeps between
the passes, the most that is allocated at once, and the floating-point operations.

On a machine without a GPU nothing can run "on cuda", not even without data. `_Replacements`
imitates what differs there: fused attention and dropout, the operations that CUDA's autocast
computes in float32, linear layers with quantised weights (bitsandbytes, scaleup.backbone.int8), and
DeepSpeed's linear layer under ZeRO-3, which keeps its input.
"""

import contextlib
import dataclasses
import functools
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from scaleup.unipelt.kernels import planned_for

functional = nn.functional
PLAIN_LINEAR, PLAIN_RAND = functional.linear, torch.rand
# CUDA's autocast computes these in float32, and their results stay float32. CPU's does not.
FLOAT32 = ("layer_norm", "softmax")


@dataclasses.dataclass(frozen=True)
class Step:
    """Bytes and operations of the passes over one batch on one process."""

    kept: int  # bytes that autograd keeps for the backward pass
    peak: int  # the most allocated at once, `kept` included, gradients of parameters excluded
    # Floating-point operations of both passes, as torch counts those of matrix products and of
    # attention on GPUs.
    operations: int


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What decides which tensors a step makes."""

    device: Literal["cuda", "cpu"]
    autocast: torch.dtype | None
    # Frozen weights: plain; plain under ZeRO-3; bitsandbytes int8; `Int8Linear`; NF4.
    linear: Literal["plain", "zero3", "8bit", "int8", "nf4"]
    checkpointing: bool


class _FrozenLinear(torch.autograd.Function):
    """x Wᵀ + b with a W that is quantised or that ZeRO-3 gathers: how long each tensor lives."""

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: str, cuda: bool
    ) -> torch.Tensor:
        if kind in ("zero3", "8bit"):  # DeepSpeed and bitsandbytes save the input needlessly
            ctx.save_for_backward(x)
        ctx.weight, ctx.kind = weight, kind
        if kind in ("8bit", "int8") and cuda:
            rows: Any = x.reshape(-1, x.shape[-1])
            rows = (rows.half(), torch.empty_like(rows, dtype=torch.int8))
        if kind == "int8" and not cuda:
            matrix = torch.empty_like(weight, dtype=x.dtype)
        else:
            matrix = weight.to(x.dtype)
        return PLAIN_LINEAR(x, matrix, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018 (a backward pass reads them)
        matrix = ctx.weight
        if ctx.kind != "zero3":
            matrix = torch.empty_like(matrix, dtype=grad.dtype)
        return grad @ matrix.to(grad.dtype), None, None, None, None


class _FrozenExperts(torch.autograd.Function):
    """The products of tokens with their experts; without data, torch's take bfloat16 only."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.inputs = weight.shape[1]
        return x.new_empty(len(x), weight.shape[2], dtype=weight.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.new_empty(len(grad), ctx.inputs), None


class _Replacements:
    """Functions that make the tensors of the given kernels, in place of torch's while entered.

    They are replaced in torch's modules, as DeepSpeed does it, because a dispatch mode would not
    reach what a gradient checkpoint recomputes.
    """

    def __init__(self, kernels: Kernels):
        self.kernels = kernels

    def functions(self) -> list[tuple[Any, str, Callable]]:
        """Return (module, name, function) of every replacement."""
        replaced = [(torch, "rand", self._rand), (functional, "grouped_mm", _grouped_mm)]
        if self.kernels.linear != "plain":
            replaced.append((functional, "linear", self._linear))
        if self.kernels.device == "cuda":
            replaced += [
                (functional, "scaled_dot_product_attention", self._attention),
                (functional, "dropout", self._dropout),
            ]
            if self.kernels.autocast is not None:
                for name in FLOAT32:
                    replaced.append((functional, name, _in_float32(getattr(functional, name))))
        return replaced

    def __enter__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(planned_for(self.kernels.device))
        for module, name, function in self.functions():
            self._stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, function)

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _rand(self, *size: Any, **kwargs: Any) -> torch.Tensor | float:
        """Return 1.0 for a scalar: BART compares it to decide whether to skip a layer."""
        return 1.0 if size in ((), ([],)) else PLAIN_RAND(*size, **kwargs)

    def _linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        kind, autocast = self.kernels.linear, self.kernels.autocast
        if weight.requires_grad or not x.is_floating_point():
            return PLAIN_LINEAR(x, weight, bias)
        dtype = x.dtype
        if kind in ("zero3", "int8") and autocast is not None:
            x = x.to(autocast)
        elif kind == "nf4":
            x = x.to(weight.dtype)
        # Custom autograd functions compute in the type that they receive.
        with torch.autocast("cpu", enabled=False):
            out = _FrozenLinear.apply(x, weight, bias, kind, self.kernels.device == "cuda")
        return out.to(dtype) if kind == "nf4" else out

    def _attention(
        self,
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ) -> torch.Tensor:
        """Run the memory-efficient kernel. Flash attention keeps the same tensors."""
        if self.kernels.autocast is not None:
            query, key, value = (t.to(self.kernels.autocast) for t in (query, key, value))
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
                attn_mask = zeros.masked_fill(attn_mask.logical_not(), float("-inf"))
            length = attn_mask.shape[-1]
            attn_mask = functional.pad(attn_mask.to(query.dtype), (0, -length % 16))[..., :length]
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]

    @staticmethod
    def _dropout(
        x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        return torch.ops.aten.native_dropout(x, p, True)[0] if training and p > 0 else x


def _grouped_mm(x: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    return _FrozenExperts.apply(x, weight)


def _in_float32(function: Callable) -> Callable:
    def cast(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) else value

    def in_float32(*args: Any, **kwargs: Any) -> torch.Tensor:
        return function(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})

    return in_float32


class _Counter(TorchDispatchMode):
    """Counts the bytes of all storages made while it is active, and the most alive at once.

    It also counts operations. torch's own FlopCounterMode would keep activations alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.operations = 0
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.operations += count(*args, **kwargs, out_val=out)
        inputs = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in inputs:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._references:
            remove = functools.partial(self._remove, key, size)
            self._references[key] = weakref.ref(storage, remove)
            self.alive += size
            self.peak = max(self.peak, self.alive)

    def _remove(self, key: int, size: int, _: weakref.ref) -> None:
        if self._references.pop(key, None) is not None:
            self.alive -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _loss(model: nn.Module, batch: int, length: int, target: int) -> torch.Tensor:
    """Return a loss of `batch` examples of full length, with a padding mask."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    encoder_decoder = base.config.is_encoder_decoder
    ids = torch.ones(batch, length, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.get_output_embeddings() is not None:
        labels = torch.ones(batch, target, dtype=torch.long) if encoder_decoder else ids
        return model(**inputs, labels=labels, use_cache=False).loss
    if encoder_decoder and hasattr(base, "classification_head"):
        # BART's own pooling would search the data for a token.
        hidden = base.base_model(**inputs, decoder_input_ids=ids).last_hidden_state
        return base.classification_head(hidden[:, -1, :]).float().sum()
    out = model(**inputs)
    logits = [out[name] for name in ("logits", "start_logits", "end_logits") if name in out]
    return torch.stack([tensor.float().sum() for tensor in logits]).sum()


def step(
    model: PreTrainedModel, kernels: Kernels, batch: int, length: int, target: int = 128
) -> Step:
    """Run a model with real or fake tensors forward and backward once, and count.

    Args:
        length: tokens of each example.
        target: tokens that an encoder-decoder generates.
    """
    model.train()
    if kernels.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    permanent = {s._cdata for s in _storages([*model.parameters(), *model.buffers()])}
    for parameter in model.parameters():
        if parameter.requires_grad:  # scaleup.memory.states counts the gradients
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in permanent:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    cast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if kernels.autocast is not None:
        cast = torch.autocast("cpu", kernels.autocast)
    counter = _Counter()
    with counter, _Replacements(kernels), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with cast, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = _loss(model, batch, length, target)
        between = counter.alive
        loss.backward()
    most_kept = max(sum(kept.values()), between if kernels.checkpointing else 0)
    return Step(most_kept, counter.peak, counter.operations)


def fake_step(model: nn.Module, *args: Any) -> Step:
    """Run `step` with a model on the meta device and fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            return step(model.to_empty(device="cpu"), *args)
        finally:
            gc.collect()  # modules and their hooks refer to each other
