"""What is measured beside a step's time: operations and arithmetic, memory, and what the machine's arithmetic can reach.

Shapes: B examples, T queries, S keys, H heads, E head size.
"""

import gc
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def _attention(
    query_BHTE: torch.Size, key: torch.Size, value: torch.Size, *args, out_shape=None, **kwargs
) -> int:
    """Of two products per query head. torch's own formula, up to 2.11, has none for keys that heads share."""
    batch, heads, queries, size = query_BHTE
    return 2 * batch * heads * queries * key[2] * (size + value[3])


def _attention_backward(
    grad: torch.Size,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    *args,
    out_shape=None,
    **kwargs,
) -> int:
    """Of five: the scores again, and four gradients."""
    return _attention(query, key, value) * 5 // 2


FUSED = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}


class _Calls(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += not function.is_view
        return function(*args, **(kwargs or {}))


def counted(step: Callable[[], object]) -> dict[str, int]:
    """Floating point operations and calls of torch operations (views left out) of one step."""
    with FlopCounterMode(display=False, custom_mapping=FUSED) as flops:
        step()
    with _Calls() as calls:
        step()
    return {"gflop": round(flops.get_total_flops() / 1e9, 2), "calls": calls.calls}


def seconds(step: Callable[[], object], device: str) -> float:
    """Of one step, to the end of what it gave a GPU to do."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """GFLOP/s of a large square product of matrices, the best of ten: what arithmetic can reach here."""
    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    found = [seconds(lambda: a @ b, device) for _ in range(13)]
    return 2 * size**3 / min(found[3:]) / 1e9


def operations(step: Callable[[], object], rounds: int) -> list[tuple[str, str, int, float]]:
    """(operation, shapes, calls, milliseconds) of a step, the shortest of `rounds` for each, longest first. Sums of these swing less than steps do."""
    best: dict[tuple[str, str, int], float] = {}
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
            step()
        for event in record.key_averages(group_by_input_shape=True):
            key = (event.key, str(event.input_shapes), event.count)
            best[key] = min(best.get(key, float("inf")), event.self_cpu_time_total / 1000)
        del record
        gc.collect()  # events lie between the tensors, whose places would not be used again: each large one would be of new pages, at thrice the time
    return sorted(((*key, round(ms, 3)) for key, ms in best.items()), key=lambda row: -row[3])


def live_bytes() -> int:
    """Of all tensors on the CPU. Fake ones, which may be left of a compilation, say that they are there, but their storage does not."""
    gc.collect()
    tensors = (
        thing.untyped_storage()
        for thing in gc.get_objects()
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu"
    )
    return sum(
        {
            storage.data_ptr(): storage.nbytes()
            for storage in tensors
            if storage.device.type == "cpu"
        }.values()
    )


def allocated_peak(run: Callable[[], object]) -> int:
    """Most bytes that the CPU allocator handed out while `run` ran, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = sorted(
        (e.start_ns(), e.nbytes())
        for e in record.profiler.kineto_results.events()
        if e.name() == "[memory]"
    )
    level = peak = 0
    for _, size in events:
        level += size
        peak = max(peak, level)
    return peak
