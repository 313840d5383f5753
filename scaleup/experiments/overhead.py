"""Count the calls of a training step and time the host, for `scaleup bench calls` and `host`.

Both predict without a GPU what one costs whose work is small: it waits for the host, which issues
one call after the other. All models have almost no width (`call_counts`), bfloat16 weights and
autocast. Kernels are chosen as on CUDA. `APL` takes the fast path; on a CPU, each of its four
kernels is one registered operation.
"""

import contextlib
import dataclasses
import functools
import gc
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from scaleup.experiments import baseline, batches, bench_output, call_counts, timing, variants
from scaleup.unipelt.kernels import ops, planned_for
from scaleup.unipelt.kernels.target import VARIABLE

BATCH, LENGTH = 4, 16  # tokens of the counted batches
HOST_BATCH, HOST_LAYERS = 2, 4
HOST_FAMILIES = ("BERT", "BART pair", "Llama")
BOUND = "lower-bound"


@dataclasses.dataclass(frozen=True)
class CallOptions:
    """The options of `scaleup bench calls`.

    Attributes:
        baseline: the interpreter of an environment with the baseline library, `adapters`.
    """

    baseline: str | None = None
    output: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class HostOptions:
    """The options of `scaleup bench host`.

    Attributes:
        rounds: timed steps of each variant.
        launch_us: microseconds that the launch of a kernel takes the host.
    """

    rounds: int = 60
    launch_us: int = 10
    output: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Compared:
    """A variant of both measurements: what is added to a backbone, and its SCALEUP_KERNELS."""

    add: Callable[[PreTrainedModel], nn.Module]
    kernels: str = "auto"


_apl = functools.partial(variants.add_unipelt, fields=variants.FLAT)
COMPARED = {
    BOUND: Compared(variants.lower_bound),
    "PEFT LoRA": Compared(variants.peft_lora),
    "APL": Compared(_apl, "reference"),
    "APL, kernels off": Compared(_apl, "off"),
}


@contextlib.contextmanager
def kernels_as_on_cuda(mode: str) -> Iterator[None]:
    """Set SCALEUP_KERNELS, and take the path of CUDA on a CPU.

    `reference` does so itself. The plain formulas have to be told, or they use what is faster on a
    CPU.
    """
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = mode
    try:
        with planned_for("cuda") if mode == "off" else contextlib.nullcontext():
            yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


@contextlib.contextmanager
def launches_only(microseconds: int) -> Iterator[None]:
    """Replace each kernel by allocating its outputs and keeping the host busy for a launch."""

    def launch(allocate: Callable, *args: Any) -> Any:
        end = time.thread_time() + microseconds * 1e-6
        outputs = allocate(*args)
        while time.thread_time() < end:
            pass
        return outputs

    names = ("merge_forward", "merge_backward", "narrow_forward", "narrow_backward")
    kernels = {name: getattr(ops, name) for name in names}
    for name in names:
        setattr(ops, name, functools.partial(launch, getattr(ops, f"fake_{name}")))
    try:
        yield
    finally:
        for name, kernel in kernels.items():
            setattr(ops, name, kernel)


def _batch(family: str, batch: int, padded: bool) -> batches.Batch:
    lengths = batches.half_padding_lengths(batch, LENGTH) if padded else [LENGTH] * batch
    random_batch = batches.random_batch(lengths, LENGTH, call_counts.VOCABULARY)
    return batches.with_labels(random_batch, call_counts.narrow_model(family, 1))


def count_layer(family: str, variant: str, padded: bool) -> dict[str, float]:
    """Count the calls of one layer in the forward and backward pass, by name."""
    compared, batch = COMPARED[variant], _batch(family, BATCH, padded)

    def of_model(layers: int) -> dict[str, int]:
        model = compared.add(call_counts.narrow_model(family, layers))
        return call_counts.training_calls(model, batch)

    with kernels_as_on_cuda(compared.kernels):
        return call_counts.layer_calls(of_model)


def beyond_bound(calls: dict[str, float], bound: dict[str, float]) -> dict[str, Any]:
    """Make a row: the calls of a layer, those beyond the lower bound, and these by name."""
    beyond = {
        name: calls.get(name, 0) - bound.get(name, 0)
        for name in sorted({*calls, *bound})
        if calls.get(name, 0) != bound.get(name, 0)
    }
    by_name = dict(sorted(beyond.items(), key=lambda item: -item[1]))
    return {"layer": sum(calls.values()), "beyond": sum(beyond.values()), "beyond_by_name": by_name}


def call_rows(python: str | None = None) -> dict[str, dict[str, Any]]:
    """Count the calls of every variant.

    Args:
        python: the interpreter of an environment with the baseline library, whose calls are
            compared with its own lower bound. None: without it.

    Returns:
        "family, full or padded batch" → variant → row of `beyond_bound`.
    """
    names = {
        f"{family}, {'padded' if padded else 'full'}": (family, padded)
        for family in call_counts.FAMILIES
        for padded in (False, True)
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, (family, padded) in names.items():
        bound = count_layer(family, BOUND, padded)
        calls = {v: count_layer(family, v, padded) for v in COMPARED if v != BOUND}
        rows[name] = {v: beyond_bound(c, bound) for v, c in ({BOUND: bound} | calls).items()}
    if python is not None:
        inputs = {
            name: (family, _batch(family, BATCH, padded))
            for name, (family, padded) in names.items()
        }
        process, counted = baseline.start(python, ["calls"], inputs)
        process.wait()
        for name, calls in counted.items():
            bound = calls.pop(BOUND)
            rows[name] |= {v: beyond_bound(c, bound) for v, c in calls.items()}
    return rows


def run_calls(options: CallOptions) -> None:
    """Count, print a table, and write the result file."""
    _prepare(options.output)
    rows = call_rows(options.baseline)
    print(
        f"calls of torch operations per layer beyond the {BOUND}, forward and backward, "
        f"{BATCH} x {LENGTH}, bfloat16"
    )
    for name, of_name in rows.items():
        columns = (f"{v} {row['beyond']:5.1f}" for v, row in of_name.items() if v != BOUND)
        print(f"{name:<18} {BOUND} {of_name[BOUND]['layer']:5.1f}  +  {'   '.join(columns)}")
    settings = {"what": "calls", "batch": BATCH, "length": LENGTH, "dtype": "bfloat16"}
    bench_output.write(options.output, settings | dataclasses.asdict(options), rows)


def host_rows(
    family: str, rounds: int, launch_us: int, names: Iterable[str] = tuple(COMPARED)
) -> dict[str, dict]:
    """Time the host in training steps of the named variants, and compare with the lower bound."""

    def worker(compared: Compared) -> timing.Worker:
        with kernels_as_on_cuda(compared.kernels):
            model = compared.add(call_counts.narrow_model(family, HOST_LAYERS)).train()

        def step() -> tuple[bool, float]:
            with kernels_as_on_cuda(compared.kernels), launches_only(launch_us):
                begin = time.thread_time()
                call_counts.loss_of(model, batch).backward()
                end = time.thread_time()
            model.zero_grad()
            return True, end - begin

        return step

    batch = _batch(family, HOST_BATCH, padded=False)
    workers = {name: worker(COMPARED[name]) for name in names}
    gc.collect()
    gc.disable()  # a collection would slow whichever variant is running
    try:
        return timing.compare(timing.time_rounds(workers, rounds), BOUND)
    finally:
        gc.enable()


def run_host(options: HostOptions) -> None:
    """Time the host with one thread, print a table, and write the result file."""
    _prepare(options.output)
    torch.set_num_threads(1)
    rows = {
        family: host_rows(family, options.rounds, options.launch_us) for family in HOST_FAMILIES
    }
    print(
        f"processor time of a training step of {HOST_LAYERS} layers, {HOST_BATCH} x {LENGTH}, "
        f"bfloat16, {options.launch_us} us per kernel, {options.rounds} rounds; relative to {BOUND}"
    )
    for family, of_family in rows.items():
        for variant, row in of_family.items():
            low, high = row["quartiles"]
            print(
                f"{family:<10} {variant:<16} {row['ratio']:.3f} [{low:.3f}, {high:.3f}]  "
                f"best {row['best']:.3f}  {row['milliseconds']:7.2f} ms"
            )
    settings = {"what": "host", "batch": HOST_BATCH, "length": LENGTH, "layers": HOST_LAYERS}
    settings |= {"dtype": "bfloat16"} | dataclasses.asdict(options)
    bench_output.write(options.output, settings, rows)


def _prepare(output: pathlib.Path | None) -> None:
    bench_output.check(output)
    logging.set_verbosity_error()
