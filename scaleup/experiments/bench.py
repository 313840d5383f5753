"""Measure the speed and memory of methods side by side, for `scaleup bench`.

What counts is the median of paired ratios: each variant's time divided by the reference's time of
the same round. Beside it stand numbers that do not vary from run to run: floating point operations,
calls of torch operations and trained parameters.
"""

import contextlib
import dataclasses
import functools
import gc
import multiprocessing
import random
import tempfile
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from scaleup.backbone.loading import load_model
from scaleup.data import classification
from scaleup.errors import ConfigError, one_line
from scaleup.experiments import baseline, batches, bench_output, meter, timing, variants
from scaleup.experiments.batches import Batch
from scaleup.experiments.variants import BenchOptions, Variant
from scaleup.settings import schema
from scaleup.settings.loading import override

# variant → (what is trained, quantization, gradient checkpointing)
MEMORY = {
    "full fine-tuning": ("all", "none", False),
    "full fine-tuning, checkpointing": ("all", "none", True),
    "lower-bound": ("head", "none", False),
    "APL": ("APL", "none", False),
    "APL, checkpointing": ("APL", "none", True),
    "APL, int8": ("APL", "8bit", False),
    "APL, int8, checkpointing": ("APL", "8bit", True),
}
Rows = dict[str, dict[str, Any]]


def check(options: BenchOptions) -> None:
    """Raise ConfigError with every option that does not fit the others or the machine."""
    on_gpu, float32 = options.device == "cuda", options.dtype == "float32"
    positions = options.config.max_position_embeddings
    problems = []
    if options.baseline and (on_gpu or not float32):
        problems.append("--baseline runs on the CPU in float32; leave out --device and --dtype")
    if options.geometry == "llama-8b" and float32:
        problems.append("--geometry llama-8b takes 32 GB in float32; add --dtype bfloat16")
    if options.ragged and (options.batch < 2 or options.length < 8):
        problems.append("--ragged needs --batch 2 and --length 8 or more to spread the lengths")
    if options.compile == "reduce-overhead" and not on_gpu:
        problems.append("--compile reduce-overhead makes CUDA graphs; on a CPU use plain --compile")
    if options.graphs and not (on_gpu and options.what == "training"):
        problems.append("--graphs records training steps as CUDA graphs; add --device cuda")
    if options.length > positions:
        problems.append(f"--length: {options.geometry} has only {positions} positions")
    if on_gpu and not torch.cuda.is_available():
        problems.append("--device cuda: torch finds no GPU on this machine")
    if problems:
        raise ConfigError(problems)
    bench_output.check(options.output)


def run(options: BenchOptions) -> None:
    """Measure, print one line per variant, and write the result file."""
    check(options)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = memory_rows(options) if options.what == "memory" else timed_rows(options)
    reference = options.reference or next(iter(rows))
    machine = bench_output.machine(options.device)
    facts = [
        options.what,
        options.geometry,
        f"{options.batch} x {options.length}" + (" half padding" if options.ragged else ""),
        f"{options.rounds} rounds" if options.what != "memory" else "",
        f"compiled ({options.compile})" if options.compile else "",
        "as CUDA graphs" if options.graphs else "",
        machine["gpu"] or f"{machine['threads']} threads",
        f"{options.dtype}; relative to {reference}",
    ]
    print(", ".join(fact for fact in facts if fact))
    width = max(map(len, rows))
    for name, row in rows.items():
        print(f"{name:<{width}}  {row['ratio']:.3f}  {_describe(row)}")
    settings = dataclasses.asdict(options) | {"reference": reference}
    bench_output.write(options.output, settings, rows, options.device)


def timed_rows(options: BenchOptions) -> Rows:
    """Time the variants, or profile their operations; one row each."""
    compared, tokens = _create_variants(options)
    reference = options.reference or next(iter(compared))
    if reference not in compared:
        raise ConfigError(f"--reference: {reference} is not one of {', '.join(compared)}")
    gc.collect()
    gc.disable()  # a collection would slow whichever variant is running
    if options.profile:
        return _profiled_rows(compared, options.rounds, reference)
    interleave = options.what != "ragged" and options.device == "cpu" and not options.compile
    rows = timing.compare(time_variants(compared, options, interleave), reference)
    rate = meter.matmul_rate(options.device, options.torch_dtype)
    for name, row in rows.items():
        seconds, variant = row["milliseconds"] / 1000, compared[name]
        row |= {"trained": variant.trained, "tokens_per_second": round(tokens / seconds)}
        if variant.peak is not None:
            row["peak"] = variant.peak
        if variant.model is not None and not options.compile and not options.graphs:
            row |= meter.count_operations(variant.step)
            row["of_matmul_rate"] = round(row["gflop"] / seconds / rate, 4)
    return rows


def time_variants(
    compared: dict[str, Variant], options: BenchOptions, interleave: bool
) -> dict[str, list[list[float]]]:
    """Time all variants as `timing.time_rounds` does, in pieces of a few layers if `interleave`."""

    workers: dict[str, timing.Worker] = {}
    with contextlib.ExitStack() as stack:
        for name, variant in compared.items():
            if variant.model is None:
                workers[name] = variant.step  # type: ignore[assignment]
            elif interleave:
                step = timing.PausingStep(variant.step, variant.model)
                workers[name] = stack.enter_context(contextlib.closing(step)).resume
            else:
                workers[name] = functools.partial(timing.whole_step, variant.step, options.device)
        return timing.time_rounds(workers, options.rounds)


def _create_variants(options: BenchOptions) -> tuple[dict[str, Variant], int]:
    """Create the variants; also return the number of tokens (without padding) of a step."""
    if options.what == "ragged":
        lengths = batches.half_padding_lengths(options.examples, options.length)
        if options.texts:
            task, data, tokenizer = options.texts
            lengths = _text_lengths(task, data, tokenizer, options.examples, options.length)
        lengths = random.Random(0).sample(lengths, len(lengths))
        return variants.ragged_variants(options, lengths), sum(lengths)
    lengths = [options.length] * options.batch
    if options.ragged:
        lengths = batches.half_padding_lengths(options.batch, options.length)
    batch = batches.random_batch(lengths, options.length, options.config.vocab_size)
    training = options.what == "training"
    create = variants.training_variants if training else variants.inference_variants
    compared = create(options, batch)
    if options.baseline is not None:
        compared |= baseline.create_variants(options, batch)
    return compared, sum(lengths)


def _text_lengths(task: str, data: str, tokenizer: str, count: int, max_length: int) -> list[int]:
    """Count the tokens of `count` training texts, truncated as by data.max_length=`max_length`."""
    overrides = [override("data.path", data), override("data.name", task)]
    overrides += [f"data.max_length={max_length}", f"data.k={count}"]
    overrides += ["data.dev_size=1", "model.name=unused"]
    try:
        settings = schema.load(None, overrides).data
        texts = classification.load(settings)
    except ConfigError as error:
        raise ConfigError(f"--texts, --examples: {'; '.join(error.problems)}") from None
    try:
        # Without the second argument, transformers would ask on the screen.
        loaded_tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except Exception as error:  # the library tokenizers has no class for its errors
        raise ConfigError(
            f"--texts: {tokenizer} has no tokenizer that can be loaded ({one_line(error, 200)}); "
            "give the folder of a model, or its name if the hub can be reached"
        ) from None
    return list(classification.tokenize(texts, loaded_tokenizer, settings).train["length"])


def _profiled_rows(compared: dict[str, Variant], rounds: int, reference: str) -> Rows:
    """Sum the shortest times of all operations, and list the thirty longest."""
    profiles = {n: meter.profile_operations(v.step, rounds) for n, v in compared.items()}
    totals = {n: sum(milliseconds for *_, milliseconds in profiles[n]) for n in profiles}
    return {
        name: {
            "ratio": round(totals[name] / totals[reference], 4),
            "milliseconds": round(totals[name], 1),
            "operations": operations[:30],
        }
        for name, operations in profiles.items()
    }


def memory_rows(options: BenchOptions) -> Rows:
    """Measure the memory of each variant in a fresh process, relative to the first variant's."""
    lengths = [options.length] * options.batch
    batch = batches.random_batch(lengths, options.length, options.config.vocab_size)
    rows: Rows = {}
    for name in variants.select(MEMORY, options.only):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(measure_memory, (name, options, batch))
        first = next(iter(rows.values()), row)
        rows[name] = {"ratio": round(row["peak"] / first["peak"], 4)} | row
    return rows


def measure_memory(name: str, options: BenchOptions, batch: Batch) -> dict[str, int]:
    """Measure the memory of one of `MEMORY`. Call it in a process of its own.

    Returns:
        Bytes: `rest` between steps (weights and optimizer), `peak` during the second step; and
        `trained`, the number of trained parameters.
    """
    trained, quantization, checkpointing = MEMORY[name]
    if quantization == "none":
        model = options.backbone(torch.float32 if trained == "all" else None)
    else:  # weights are quantised while they are loaded
        with tempfile.TemporaryDirectory(prefix="bench-") as saved:
            plain = BenchOptions("memory", options.geometry).backbone()
            plain.save_pretrained(saved)
            settings = schema.ModelSettings(name=saved, quantization=quantization)
            kind = (options.auto_class, options.torch_dtype, torch.device(options.device))
            model, _ = load_model(settings, plain.config, *kind)
            del plain
    if trained == "head":
        model = variants.lower_bound(model)
    elif trained == "APL":
        model = variants.add_unipelt(model, {})
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    variant = variants.training_variant(options, model, [batch])
    variant.step()
    if options.device == "cuda":
        rest = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        variant.step()
        peak = torch.cuda.max_memory_allocated()
    else:
        rest = meter.live_bytes()
        peak = rest + meter.allocated_peak(variant.step)
    return {"rest": rest, "peak": peak, "trained": variant.trained}


def _describe(row: dict[str, Any]) -> str:
    """Format a row for the screen, without its name and ratio."""
    if "rest" in row:
        peak, rest = (f"{row[key] / 2**20:8.0f} MiB" for key in ("peak", "rest"))
        return f"peak {peak}  between steps {rest}  {row['trained']:>12,} trained"
    if "operations" in row:
        lines = [
            f"{ms:10.1f} ms {calls:5d} x {kind} {shapes[: 160 - len(kind)]}"
            for kind, shapes, calls, ms in row["operations"][:20]
        ]
        return "\n".join([f"{row['milliseconds']:9.1f} ms in all operations", *lines])
    counts = " " * 56
    if "calls" in row:
        rate = f"({row['of_matmul_rate']:.2f} of a product's rate)"
        counts = f"{row['gflop']:9.1f} GFLOP {rate}  {row['calls']:6d} calls"
    if "peak" in row:
        counts += f"  peak {row['peak'] / 2**20:8.0f} MiB"
    low, high = row["quartiles"]
    return (
        f"[{low:.3f}, {high:.3f}]  best {row['best']:.3f}  {row['milliseconds']:9.1f} ms"
        f"  {row['tokens_per_second']:8,} tokens/s  {counts}  {row['trained']:>12,} trained"
    )
