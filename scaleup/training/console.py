"""What a run says and writes: the gates' means, the header and the summary on the screen, JSON files."""

import contextlib
import json
import math
import pathlib
import statistics
from collections.abc import Iterator

import torch
import torch.distributed
from torch import nn

from scaleup.data.classification import Examples
from scaleup.io import write_text
from scaleup.memory.states import States
from scaleup.settings.schema import Settings
from scaleup.training.distributed import World
from scaleup.unipelt.gate import GateMoments, LearnedGate


class GateStatistics:
    """Means of every gate of a model, by site and submodule, as collected since the last look, over all processes."""

    def __init__(self, model: nn.Module, compiled: bool = False):
        """compiled: the model runs through torch.compile, perhaps as CUDA graphs, which write to what they read only at addresses that stay."""
        self.gates: dict[str, LearnedGate] = {}
        self.last: dict[str, dict[str, dict[str, float]]] = {}
        for name, module in model.named_modules():
            if isinstance(module, LearnedGate):
                module.statistics = GateMoments(len(module.names), module.bias.device)
                if compiled:
                    torch._dynamo.mark_static_address(module.statistics.sums_3N)
                site = name.removeprefix("base_model.model.").split(".unipelt_", 1)[0]
                self.gates[site] = module

    def drain(self) -> dict[str, dict[str, dict[str, float]]]:
        """site → submodule → mean and std over the examples that the processes have seen. The only synchronisation with the device.
        Every process must call it."""
        sums = [gate.statistics.take() for gate in self.gates.values()]
        if sums and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            joined_3N = torch.cat(sums, 1)
            torch.distributed.all_reduce(joined_3N)
            sums = joined_3N.split([part.shape[1] for part in sums], 1)
        self.last = {
            site: {
                part: {"mean": round(mean, 6), "std": round(std, 6)}
                for part, (mean, std) in zip(gate.names, GateMoments.moments(found_3N))
            }
            for (site, gate), found_3N in zip(self.gates.items(), sums)
        }
        return self.last

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it nothing is collected: while text is written, each step would count as an example."""
        kept = {gate: gate.statistics for gate in self.gates.values()}
        for gate in kept:
            gate.statistics = None
        try:
            yield
        finally:
            for gate, statistics in kept.items():
                gate.statistics = statistics

    def scalars(self) -> dict[str, float]:
        """The means of the last look under flat names, for trackers."""
        return {
            f"gates/{site}/{part}": value["mean"]
            for site, parts in self.last.items()
            for part, value in parts.items()
        }


def rewind(path: pathlib.Path, step: int) -> None:
    """Cuts a log back to what was known at `step`: lines after the checkpoint that a run resumes from come again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _step(line) <= step]
    write_text(path, "".join(kept))


def _step(line: str) -> float:
    """Of a line of the log; infinity for what a killed run or a full disk left of one."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def header(
    settings: Settings, examples: Examples, counts: dict, world: World, launched_as: str, bf16: bool
) -> list[str]:
    """What is about to run, for the screen: backbone, method, counts, data, batch arithmetic, devices."""
    test = (
        "none"
        if examples.test is None
        else "the dev set"
        if examples.test_is_dev
        else len(examples.test)
    )
    parts = ", ".join(f"{name} {count:,}" for name, count in counts["submodules"].items() if count)
    train = settings.train
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps * world.size
    return [
        f"backbone   {settings.model.name} ({counts['backbone']:,} parameters{'' if settings.model.quantization == 'none' else ', ' + settings.model.quantization})",
        f"method     {settings.method.name}{' (' + parts + ')' if parts else ''}",
        f"trained    {counts['trained']:,} parameters ({counts['trained_percent']:.2f}%), stored {counts['stored']:,}"
        f" ({counts['stored_percent']:.2f}%), head {counts['head']:,}",
        f"data       train {len(examples.train)}{' packed rows' if settings.data.packing else ''}, dev {len(examples.dev)}, test {test}"
        f"{' (a source with several targets counts once)' if examples.references else ''}; metric {examples.metric}",
        *[
            f"note: {examples.known} of dev's texts are in train too, with other targets; give data.validation_file to keep them apart"
        ]
        * bool(examples.known),
        *_label_lines(settings, examples),
        f"batch      {batch} = {train.per_device_train_batch_size} per process x {world.size} processes x"
        f" {train.gradient_accumulation_steps} accumulation; learning rate {settings.learning_rate:g}",
        f"device     {world.device.type}, {launched_as}; bf16 {'on' if bf16 else 'off'}",
        f"output     {train.output_dir}",
    ]


def _label_lines(settings: Settings, examples: Examples) -> list[str]:
    """Of a regression, what its labels are like and where the head starts: far from them, a small run learns little but their mean."""
    if examples.task != "regression":
        return []
    labels = examples.train["labels"]
    starts = (
        "where the head starts"
        if settings.model.head_bias == "prior"
        else "a fresh head starts at 0; model.head_bias=prior starts it there"
    )
    return [
        f"labels     {statistics.fmean(labels):.4g} ± {statistics.pstdev(labels):.4g}: {starts}"
    ]


def placement(hosts: list[tuple[str, str]]) -> list[str]:
    """Where every process runs, for the screen: one line per host, each rank with its device. `hosts`: as runtime.hosts gives."""
    by_host: dict[str, list[str]] = {}
    for rank, (host, device) in enumerate(hosts):
        by_host.setdefault(host, []).append(f"rank {rank} {device}")
    lines = [
        f"world      {len(hosts)} process{'es' * (len(hosts) > 1)} on {len(by_host)} host{'s' * (len(by_host) > 1)}"
    ]
    return [*lines, *(f"host       {host}: {', '.join(ranks)}" for host, ranks in by_host.items())]


def memory_line(states: States) -> str:
    """What weights, gradients and optimizer will take on each process; activations come on top."""
    mib = 2**20
    total = states.resident + states.gathered + states.gradients
    return (
        f"memory     {total / mib:,.0f} MiB per process before activations: backbone {states.backbone / mib:,.0f}, trained {states.trained / mib:,.0f},"
        f" gradients {states.gradients / mib:,.0f}, optimizer {states.optimizer / mib:,.0f}"
        + (f", gathered weights {states.gathered / mib:,.0f}" if states.gathered else "")
        + (f"; {states.host / mib:,.0f} in CPU memory" if states.host else "")
        + " (scaleup plan counts all)"
    )


def summary(results: dict, out: pathlib.Path, seconds: float) -> list[str]:
    """The end of the screen: the score, the counts, where everything is."""
    metric, counts = results["metric"], results["parameters"]
    dev = f"dev {metric}  {results['dev'][metric]:.4f}"
    at = f"step {results['best_step']} of {results['steps']}, epoch {results['epochs']:g}"
    test = results["test"]
    first = (
        f"{dev} (best, at {at})"
        if test is None
        else f"test {metric}  {test[metric]:.4f}  ({dev.replace('  ', ' ')} at {at})"
    )
    return [
        "",
        first,
        f"parameters  trained {counts['trained']:,}, stored {counts['stored']:,} ({counts['stored_percent']:.2f}% of the model)",
        f"results     {out / 'results.json'}; best checkpoint {out / 'best'}; log {out / 'log.jsonl'}; {seconds:.0f} s",
    ]
