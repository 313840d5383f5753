"""How much memory a training step needs beside weights and states, without weights: it runs on tensors that hold no data.

    passed = trace(model, Precision(...), batch=16, length=128)      model: on the meta device

The adapted model itself runs forward and backward under FakeTensorMode, where every operation says which tensors it would
make. Two numbers come out: what autograd keeps between the passes, and the most that is alive at once.

On a machine without a GPU nothing can run "on cuda", not even without data. What differs there is put in by hand
(`_Rules`): fused attention and dropout, the operations that CUDA's autocast computes in float32, linear layers of quantised
weights (bitsandbytes, scaleup.backbone.int8), and DeepSpeed's own linear layer under ZeRO-3, which keeps its input.
"""

import contextlib
import copy
import dataclasses
import functools
import gc
import warnings
import weakref
from typing import Any, Callable, Literal

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from scaleup.unipelt.kernels import planned_for

functional = nn.functional
PLAIN_LINEAR, PLAIN_RAND = functional.linear, torch.rand
LAYERS = (
    "num_hidden_layers",
    "encoder_layers",
    "decoder_layers",
    "num_layers",
    "num_decoder_layers",
    "n_layer",
)  # where a config says how deep the model is
# CUDA's autocast computes these in float32 (CPU's does not), and their results stay float32.
FLOAT32 = ("layer_norm", "softmax")


@dataclasses.dataclass(frozen=True)
class Step:
    """Bytes of one step on one process. kept: what autograd keeps for the backward pass. peak: the most alive at once in
    the step beyond what lived before it, `kept` included, gradients of parameters left out."""

    kept: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What decides which tensors a step makes. linear: frozen weights are plain; plain under ZeRO-3; bitsandbytes 8 bit;
    scaleup's int8 (ZeRO-3); NF4. autocast: its type, None without. device: whose kernels."""

    device: Literal["cuda", "cpu"]
    autocast: torch.dtype | None
    linear: Literal["plain", "zero3", "8bit", "int8", "nf4"]
    checkpointing: bool


class _FrozenLinear(torch.autograd.Function):
    """x Wᵀ + b with a W that is quantised, or that ZeRO-3 gathers: which of its tensors live how long."""

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: str, cuda: bool
    ) -> torch.Tensor:
        if kind in (
            "zero3",
            "8bit",
        ):  # DeepSpeed saves its input though W is frozen, bitsandbytes likewise
            ctx.save_for_backward(x)
        ctx.weight, ctx.kind = weight, kind
        if kind in ("8bit", "int8") and cuda:
            rows = x.reshape(-1, x.shape[-1])
            rows = (rows.half(), torch.empty_like(rows, dtype=torch.int8))
        matrix = (
            torch.empty_like(weight, dtype=x.dtype)
            if kind == "int8" and not cuda
            else weight.to(x.dtype)
        )
        return PLAIN_LINEAR(x, matrix, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018 (reading them is what a backward pass does)
        matrix = (
            ctx.weight if ctx.kind == "zero3" else torch.empty_like(ctx.weight, dtype=grad.dtype)
        )
        return grad @ matrix.to(grad.dtype), None, None, None, None


class _Rules:
    """The functions of a model as the wanted kernels would do them, put in place of torch's while the rules are entered.

    Replaced in their modules, as DeepSpeed does it, because a mode would not reach what a checkpoint recomputes."""

    def __init__(self, kernels: Kernels):
        self.kernels = kernels

    def replacements(self) -> list[tuple[Any, str, Callable]]:
        """(module, name, function) of everything that is not to run as it is."""
        found = [(torch, "rand", self._rand)]
        if self.kernels.linear != "plain":
            found.append((functional, "linear", self._linear))
        if self.kernels.device == "cuda":
            found += [
                (functional, "scaled_dot_product_attention", self._attention),
                (functional, "dropout", self._dropout),
            ]
            if self.kernels.autocast is not None:
                found += [
                    (functional, name, self._in_float32(getattr(functional, name)))
                    for name in FLOAT32
                ]
        return found

    def __enter__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(planned_for(self.kernels.device))
        for module, name, function in self.replacements():
            self._stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, function)

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _rand(self, *size: Any, **kwargs: Any) -> torch.Tensor | float:
        """BART draws one number per layer to decide whether to skip it; a number without a value decides nothing."""
        return 1.0 if size in ((), ([],)) else PLAIN_RAND(*size, **kwargs)

    @staticmethod
    def _in_float32(function: Callable) -> Callable:
        def in_float32(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            args = tuple(a.float() if isinstance(a, torch.Tensor) else a for a in args)
            return function(
                x.float(),
                *args,
                **{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()},
            )

        return in_float32

    def _linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        kind, autocast = self.kernels.linear, self.kernels.autocast
        if weight.requires_grad or not x.is_floating_point():
            return PLAIN_LINEAR(x, weight, bias)
        given = x.dtype
        if kind in ("zero3", "int8") and autocast is not None:
            x = x.to(autocast)
        elif kind == "nf4":
            x = x.to(weight.dtype)
        with torch.autocast(
            "cpu", enabled=False
        ):  # custom functions compute in the type they are given
            out = _FrozenLinear.apply(x, weight, bias, kind, self.kernels.device == "cuda")
        return out.to(given) if kind == "nf4" else out

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
        """The memory-efficient kernel, which takes any mask; flash attention, without one, keeps the same tensors."""
        if self.kernels.autocast is not None:
            query, key, value = (t.to(self.kernels.autocast) for t in (query, key, value))
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
                    attn_mask.logical_not(), float("-inf")
                )
            attn_mask = functional.pad(attn_mask.to(query.dtype), (0, -attn_mask.shape[-1] % 16))[
                ..., : attn_mask.shape[-1]
            ]
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]

    @staticmethod
    def _dropout(
        x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        return torch.ops.aten.native_dropout(x, p, True)[0] if training and p > 0 else x


class _Ledger(TorchDispatchMode):
    """The bytes of all storages made while it is on, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(out):
            if (
                isinstance(tensor, torch.Tensor)
                and (storage := tensor.untyped_storage())._cdata not in inputs
            ):
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen[key] = weakref.ref(storage, functools.partial(self._drop, key, size))
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def _drop(self, key: int, size: int, _: weakref.ref) -> None:
        if self._seen.pop(key, None) is not None:
            self.alive -= size


def _run(model: nn.Module, batch: int, length: int, target: int) -> torch.Tensor:
    """A loss of `batch` full examples, padding mask given. target: tokens that an encoder-decoder writes. BART's pooling looks its token up in the data, so it is done here."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    ids = torch.ones(batch, length, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.get_output_embeddings() is not None:
        labels = (
            ids
            if not base.config.is_encoder_decoder
            else torch.ones(batch, target, dtype=torch.long)
        )
        return model(**inputs, labels=labels, use_cache=False).loss
    if not base.config.is_encoder_decoder:
        logits = model(**inputs).logits
    else:
        hidden = base.base_model(**inputs, decoder_input_ids=ids).last_hidden_state
        logits = base.classification_head(hidden[:, -1, :])
    return logits.float().sum()


def step(model: nn.Module, kernels: Kernels, batch: int, length: int, target: int = 128) -> Step:
    """Runs the model once forward and backward and counts. length, target: tokens read, and written by an encoder-decoder. The model must be where it can run: real, or fake tensors."""
    model.train()
    if kernels.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    for parameter in model.parameters():
        if (
            parameter.requires_grad
        ):  # gradients are counted by their own rules (scaleup.memory.plan)
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    cast = (
        torch.autocast("cpu", kernels.autocast)
        if kernels.autocast is not None
        else contextlib.nullcontext()
    )
    ledger = _Ledger()
    with ledger, _Rules(kernels), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with cast, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = _run(model, batch, length, target)
        between = ledger.alive
        loss.backward()
    return Step(max(sum(kept.values()), between if kernels.checkpointing else 0), ledger.peak)


def _fake_step(
    model: nn.Module, kernels: Kernels, batch: int, length: int, target: int = 128
) -> Step:
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            return step(model.to_empty(device="cpu"), kernels, batch, length, target)
        finally:
            gc.collect()  # modules and their hooks refer to each other


def trace(
    make: Callable[[PretrainedConfig], nn.Module],
    config: PretrainedConfig,
    kernels: Kernels,
    batch: int,
    length: int,
    target: int = 128,
) -> Step:
    """What one step of the model that `make(config)` gives on the meta device would need.

    All layers of a stack are alike, so a deep model is extrapolated from copies that are two and three layers deep; the test
    compares. Random skipping of layers (BART's layerdrop) is off: the worst case. Raises whatever the model raises.
    """
    config = copy.deepcopy(config)
    depths = {
        name: getattr(config, name)
        for name in LAYERS
        if name in config.to_dict() and name not in config.attribute_map
    }
    if len(depths) > 1:  # BART's num_hidden_layers repeats its encoder_layers
        depths.pop("num_hidden_layers", None)

    def at(**changes: int) -> Step:
        shallow = copy.deepcopy(config)
        for name, depth in changes.items():
            setattr(shallow, name, depth)
        return _fake_step(make(shallow), kernels, batch, length, target)

    low = {name: min(depth, 2) for name, depth in depths.items()}
    base = at(**low)
    kept, peak = base.kept, base.peak
    for name, depth in depths.items():
        if depth > low[name]:
            more = at(**(low | {name: low[name] + 1}))
            kept += (depth - low[name]) * (more.kept - base.kept)
            peak += (depth - low[name]) * (more.peak - base.peak)
    return Step(kept, peak)
