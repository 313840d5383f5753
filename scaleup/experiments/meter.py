"""Measure what a step costs besides time: arithmetic, calls of operations, and memory."""

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from scaleup.experiments.call_counts import CallCounter
from scaleup.experiments.timing import step_seconds
from scaleup.training.graphs import WARM_UPS

aten = torch.ops.aten
MEASURED_STEPS = WARM_UPS + 1  # of a GPU's peak memory


def _attention_flops(
    query_BHTE: torch.Size, key: torch.Size, value: torch.Size, *args, **kwargs
) -> int:
    """Count the two products of each query head (B examples, T queries, H heads, E head size).

    torch's own formula (up to 2.11) does not support keys that several heads share.
    """
    batch, heads, queries, size = query_BHTE
    return 2 * batch * heads * queries * key[2] * (size + value[3])


def _attention_backward_flops(grad: torch.Size, *args, **kwargs) -> int:
    """Count five products: the scores again, and four gradients."""
    return _attention_flops(*args, **kwargs) * 5 // 2


KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
FUSED_ATTENTION = {
    getattr(aten, f"_scaled_dot_product_{kernel}{suffix}"): flops
    for kernel in KERNELS
    for suffix, flops in (("", _attention_flops), ("_backward", _attention_backward_flops))
}


def count_operations(step: Callable[[], object]) -> dict[str, float]:
    """Count the GFLOP and the calls of torch operations (without views) of one step."""
    with FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION) as flops:
        step()
    with CallCounter() as counter:
        step()
    return {"gflop": round(flops.get_total_flops() / 1e9, 2), "calls": counter.calls.total()}


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Measure the GFLOP/s of a large square matrix product (the best of ten)."""
    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = [step_seconds(lambda: a @ b, device) for _ in range(13)]
    return 2 * size**3 / min(seconds[3:]) / 1e9


def profile_operations(
    step: Callable[[], object], rounds: int
) -> list[tuple[str, str, int, float]]:
    """Measure every operation of a step, taking the shortest time of `rounds` steps.

    Returns:
        (operation, input shapes, calls, milliseconds), the longest first.
    """
    best: dict[tuple[str, str, int], float] = {}
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
            step()
        for event in record.key_averages(group_by_input_shape=True):
            key = (event.key, str(event.input_shapes), event.count)
            best[key] = min(best.get(key, float("inf")), event.self_cpu_time_total / 1000)
        # The profiler's events lie in memory between the tensors. If they stayed, large tensors
        # would need new pages in the next round, which takes three times as long.
        del record
        gc.collect()
    return sorted(((*key, round(ms, 3)) for key, ms in best.items()), key=lambda row: -row[3])


def cuda_peak(step: Callable[[], object]) -> int:
    """Measure the most bytes that all tensors on the GPU take during steps after the first.

    They include the step that is recorded as a CUDA graph, because a replay allocates nothing.
    """
    step()  # creates the state of the optimizer
    torch.cuda.reset_peak_memory_stats()
    for _ in range(MEASURED_STEPS):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def live_bytes() -> int:
    """Count the bytes of all tensors on the CPU, each storage once.

    Fake tensors that a compilation left behind claim to be on the CPU. Their storages do not. A
    sharded tensor has no storage besides that of its local tensor.
    """
    gc.collect()
    storages = (
        thing.untyped_storage()
        for thing in gc.get_objects()
        if issubclass(type(thing), torch.Tensor)
        and thing.device.type == "cpu"
        and not hasattr(thing, "to_local")
    )
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.device.type == "cpu"}.values())


def allocated_peak(run: Callable[[], object]) -> int:
    """Measure the most bytes that the CPU allocator handed out during `run`, beyond the start."""
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
