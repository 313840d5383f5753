"""Time the host while a language model generates, for `scaleup bench decode`.

All variants generate the same number of tokens for the same prompts, greedily and with a KV cache,
through transformers' `generate`. What counts is the processor time of one thread per token after
the first, and the calls of torch operations per token and layer.
"""

import cProfile
import dataclasses
import functools
import gc
import pathlib
import pstats
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation import BaseStreamer
from transformers.utils import logging

from scaleup.backbone.loading import load_config, load_model
from scaleup.errors import ConfigError
from scaleup.experiments import batches, bench_output, call_counts, overhead, timing, variants
from scaleup.experiments.variants import BenchOptions
from scaleup.settings.schema import ModelSettings

GEOMETRY = "smollm2-135m"
REFERENCE = "bare"
FRAMES = 40  # functions of a profile that are kept
PACKAGES = ("scaleup", "peft", "transformers", "torch")
COMPARED: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    REFERENCE: lambda base: base,
    "PEFT LoRA": variants.peft_lora,
    **{
        name: functools.partial(variants.add_unipelt, fields=variants.UNIPELT[name])
        for name in ("APL", "APL, prefix MLP", "NoGate")
    },
}


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """The options of `scaleup bench decode`.

    Attributes:
        model: the folder of a causal language model; None: SmolLM2-135M with random weights.
        batch: prompts.
        length: tokens of a prompt.
        ragged: whether half of all prompt tokens are padding.
        tokens: how many are generated for each prompt.
        profile: whether to list the functions that take longest.
    """

    model: str | None = None
    batch: int = 4
    length: int = 16
    ragged: bool = False
    tokens: int = 16
    rounds: int = 8
    profile: bool = False
    output: pathlib.Path | None = None


class _Clock(BaseStreamer):
    """Reads the processor time whenever `generate` hands over tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.thread_time())

    def end(self) -> None:
        """Nothing is left to hand over."""


def _backbone(options: DecodeOptions) -> PreTrainedModel:
    if options.model is None:
        return BenchOptions("inference", GEOMETRY).backbone()
    settings = ModelSettings(name=options.model)
    kind = (AutoModelForCausalLM, torch.float32, torch.device("cpu"))
    return load_model(settings, load_config(settings), *kind)[0]


def _narrow_backbone(layers: int) -> PreTrainedModel:
    return call_counts.narrow_model("Llama", layers, torch.float32)


def prompts(options: DecodeOptions, vocabulary: int) -> dict[str, torch.Tensor]:
    """Draw prompts [B, T], padded on the left."""
    lengths = [options.length] * options.batch
    if options.ragged:
        lengths = batches.half_padding_lengths(options.batch, options.length)
    batch = batches.random_batch(lengths, options.length, vocabulary)
    return {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}


def _generate(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> list[float]:
    """Generate, and return the processor time of each token after the first."""
    clock = _Clock()
    model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=1,
        streamer=clock,
    )
    first = 1  # the clock is first read for the prompt, and then for the token that follows it
    return [after - before for before, after in zip(clock.times[first:], clock.times[first + 1 :])]


def time_tokens(
    create: Callable[[], PreTrainedModel], options: DecodeOptions
) -> dict[str, dict[str, Any]]:
    """Time every variant, round by round in rotating order; one row each."""
    models: dict[str, Any] = {name: add(create()).eval() for name, add in COMPARED.items()}
    inputs = prompts(options, models[REFERENCE].config.vocab_size)
    steps: dict[str, list[list[float]]] = {name: [] for name in models}
    for number in range(options.rounds + 1):  # the first warms up
        names = list(models)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            gc.collect()
            seconds = _generate(models[name], inputs, options.tokens)
            if number:
                steps[name].append(seconds)
    rows = timing.compare(steps, REFERENCE)
    for name, row in rows.items():
        row["milliseconds"] = round(row["milliseconds"] / (options.tokens - 1), 3)
        if options.profile:
            row["functions"] = longest_functions(models[name], inputs, options.tokens)
    return rows


def longest_functions(
    model: nn.Module, inputs: dict[str, torch.Tensor], tokens: int
) -> list[tuple[str, float, float]]:
    """Profile the functions that run while a model generates.

    Returns:
        (function, calls per token, microseconds per token without the functions that it calls), the
        longest first. The profiler itself makes short functions look longer than they are.
    """
    with cProfile.Profile(time.thread_time) as profile:
        _generate(model, inputs, tokens)
    stats: dict[tuple[str, int, str], tuple] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    rows = [
        (_function_name(*key), round(calls / tokens, 1), round(own * 1e6 / tokens, 1))
        for key, (_, calls, own, *_) in stats.items()
    ]
    return sorted(rows, key=lambda row: -row[2])[:FRAMES]


def _function_name(file: str, line: int, function: str) -> str:
    """Return a function's file from its package on, and its line and name."""
    parts = pathlib.PurePath(file).parts
    package = next((i for i, part in enumerate(parts) if part in PACKAGES), len(parts) - 1)
    return f"{'/'.join(parts[package:])}:{line} {function}" if line else function


def count_layer(name: str, options: DecodeOptions) -> dict[str, float]:
    """Count the calls of one layer for one token, by name: what four more tokens add."""
    few, many = 4, 8

    def of_model(layers: int) -> dict[str, int]:
        model = COMPARED[name](_narrow_backbone(layers)).eval()
        inputs = prompts(options, call_counts.VOCABULARY)
        with call_counts.CallCounter() as shorter:
            _generate(model, inputs, few)
        with call_counts.CallCounter() as longer:
            _generate(model, inputs, many)
        longer.calls.subtract(shorter.calls)
        return longer.calls

    calls = call_counts.layer_calls(of_model)
    return {name: number / (many - few) for name, number in calls.items()}


def run(options: DecodeOptions) -> None:
    """Measure with one thread, print a table, and write the result file."""
    if options.tokens < 2:
        raise ConfigError("--tokens: tokens after the first are timed; it takes at least 2")
    bench_output.check(options.output)
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    layers = variants.GEOMETRIES[GEOMETRY]().num_hidden_layers
    rows = {
        options.model or GEOMETRY: time_tokens(lambda: _backbone(options), options),
        f"{layers} layers with almost no width": time_tokens(
            lambda: _narrow_backbone(layers), options
        ),
    }
    calls = {name: count_layer(name, options) for name in COMPARED}
    counted = {n: overhead.beyond_bound(c, calls[REFERENCE]) for n, c in calls.items()}
    print(
        f"processor time of one generated token, {options.batch} x {options.length}"
        f"{' half padding' if options.ragged else ''} + "
        f"{options.tokens}, {options.rounds} rounds; relative to {REFERENCE}"
    )
    for model, of_model in rows.items():
        print(model)
        for name, row in of_model.items():
            low, high = row["quartiles"]
            print(
                f"  {name:<16} {row['ratio']:.3f} [{low:.3f}, {high:.3f}]  best {row['best']:.3f}  "
                f"{row['milliseconds']:8.2f} ms  {counted[name]['layer']:5.1f} calls per layer"
            )
            for function, number, microseconds in row.get("functions", ()):
                print(f"    {microseconds:9.1f} us {number:7.1f} x {function}")
    settings = {"what": "decode"} | dataclasses.asdict(options)
    bench_output.write(options.output, settings, {"time": rows, "calls": counted})
