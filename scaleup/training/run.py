"""Assemble one training run: config → data and model → training → checkpoints, log, results.

    results = run(settings)

results.json holds only what the same config and seed produce again. Times and memory are in
timing.json.
"""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PretrainedConfig,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging as hf_logging

from scaleup import io, machine
from scaleup.backbone import loading as backbone
from scaleup.backbone import precision
from scaleup.backbone.kernels import kernels_line
from scaleup.backbone.lengths import fit_length
from scaleup.backbone.method import checkpointing_problems, load_run_model, load_weights
from scaleup.data import classification as data
from scaleup.data import tasks
from scaleup.errors import CheckpointError, ConfigError, Preempted, RunError, one_line
from scaleup.memory.states import estimate
from scaleup.settings.schema import Settings, to_yaml
from scaleup.training import console, distributed, finished, graphs, resume, watchdog
from scaleup.training.arguments import training_arguments
from scaleup.training.callbacks import GateStatistics, GracefulShutdown, JsonlLogger, ProgressBars
from scaleup.training.checkpoint import check_tensors
from scaleup.training.context import Run
from scaleup.training.distributed import World
from scaleup.training.hub_access import download_once
from scaleup.training.manifest import Manifest, setting_hashes
from scaleup.training.preflight import hub_structure, packing_problems
from scaleup.training.preparation import prepare
from scaleup.training.scoring import score
from scaleup.training.trainer import RunTrainer
from scaleup.training.training_state import TrainingState, check_tensors_of_state, read_state
from scaleup.unipelt.model import parameter_counts


def run(settings: Settings, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train, score the best checkpoint, and return the content of results.json.

    Raises:
        ConfigError: the user must change something.
        RunError, CheckpointError: the run cannot continue.
        Preempted: the run received one of `signals.SAVE_SIGNALS` and has saved its state.
    """
    begin, world = time.perf_counter(), _start(settings)
    out = pathlib.Path(settings.train.output_dir)
    download_once(settings.model, tasks.of(settings.data).auto, world)
    config = backbone.load_config(settings.model)
    settings = fit_length(settings, config)
    problems = [
        *resume.changes(settings),
        *precision.problems(settings, precision.device_half_dtype(settings, world.device)),
        *packing_problems(settings.data, config),
        *hub_structure(settings, config),
        *checkpointing_problems(settings.train, config, tasks.of(settings.data).auto),
        *graphs.problems(settings, world, config),
        *distributed.host_problems(settings.train, world),
    ]
    if problems:
        raise ConfigError(problems)
    shared = distributed.shares_folder(world, out)
    results = None
    with _agreed(world):
        if world.main:  # results.json is on the first host only
            results = finished.results_of(settings, out)
    results = distributed.gather(world, results)[0]
    if results is not None:
        lines = console.summary(results, out, finished.seconds(out))
        _print(world, f"{console.finished_note(settings, results)} Results of {out}:", *lines)
        return results
    prepared = _prepare(settings, world, shared, config)
    checkpoint, old_weights = _choose_checkpoint(prepared)
    state = read_state(checkpoint) if checkpoint else None
    prepared = _share_out(prepared, state)
    model = load_run_model(
        settings,
        config,
        prepared.task.auto,
        prepared.examples.labels,
        world.device,
        prior=data.prior(prepared.examples) if settings.model.head_bias == "prior" else None,
        zero3=is_deepspeed_zero3_enabled(),
        mesh=distributed.mesh(settings.train, world),
        for_training=True,
    )
    counts = parameter_counts(model)
    bars = ProgressBars(prepared.examples)
    trainer = _make_trainer(prepared, model, bars, callbacks)
    if (folder := checkpoint or old_weights) is not None:
        _check_checkpoint(trainer, folder, checkpoint is not None)
        load_weights(model, folder)
    if state is not None:
        trainer.continue_from(state)
    distributed.gather(world, None)  # all have read the old folder before anything is moved
    if prepared.writes:
        _open_folder(prepared, old_weights)
    _announce(prepared, counts, model)
    if settings.train.resume != "never":
        start = f"no checkpoint in {out}, so the run starts from the beginning"
        if old_weights:
            start = f"the weights of {old_weights}, from step 0"
        _print(world, f"resume     {checkpoint or start}")
    with contextlib.closing(bars):
        _train(prepared, trainer, checkpoint)
        results = score(trainer, counts)
    seconds = time.perf_counter() - begin
    if world.main:
        io.write_json(out / "results.json", results)
        peak = round(machine.peak_memory_mib(world.device), 1)
        io.write_json(out / "timing.json", {"seconds": round(seconds, 1), "peak_memory_mib": peak})
    _print(world, *console.summary(results, out, seconds))
    return results


def _start(settings: Settings) -> World:
    """Join the other processes and quieten the libraries, except where the user asked for logs."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not settings.train.deepspeed:
        raise ConfigError(
            "the launcher asks for DeepSpeed; choose a stage with train.deepspeed=zero2 instead"
        )
    train = settings.train
    world = distributed.start(train.deepspeed is not None, train.ddp_timeout or 1800)
    if settings.train.log_level is None:
        hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()  # only training and scoring show bars
    datasets.disable_progress_bars()
    set_seed(settings.train.seed)
    return world


def _prepare(settings: Settings, world: World, shared: bool, config: PretrainedConfig) -> Run:
    """Wait until the data is prepared, and build the arguments of Trainer."""
    half = precision.device_half_dtype(settings, world.device)
    examples, tokenizer = prepare(settings, config)
    distributed.wait_for_all(world)
    contents = distributed.gather(world, examples.content)
    if len(set(contents)) > 1:
        other = next(rank for rank, content in enumerate(contents) if content != contents[0])
        problem = f"rank {other} has read other data than rank 0"
        raise ConfigError(f"data: {problem}; give all hosts the same files")
    args = training_arguments(settings, world, examples.metric, shared, half)
    plugin = args.deepspeed_plugin
    # The others neither write nor read a manifest.
    fingerprint = backbone.fingerprint(settings.model, config) if world.local_main else ""
    manifest = Manifest(
        method=settings.dump()["method"],
        backbone=settings.model.model_dump(include={"name", "revision", "quantization"})
        | {
            "fingerprint": fingerprint,
            "dtype": str(precision.backbone_dtype(settings, half)).removeprefix("torch."),
        },
        task=examples.task,
        labels=examples.labels,
        data=data.provenance(examples),
        run={"processes": args.world_size, "zero_stage": plugin.zero_stage if plugin else 0},
        config=setting_hashes(settings),
    )
    return Run(settings, world, shared, config, half, examples, tokenizer, args, manifest)


@contextlib.contextmanager
def _agreed(world: World) -> Iterator[None]:
    """End all processes with the first error that one of them had inside the block."""
    problem = None
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        problem = error
    for first_problem in filter(None, distributed.gather(world, problem)):
        raise first_problem


def _choose_checkpoint(run: Run) -> tuple[pathlib.Path | None, pathlib.Path | None]:
    """Lock the output folder, and return what `resume.choose` returns."""
    out = run.out
    with _agreed(run.world):
        if run.writes and out.is_dir():
            io.hold(out)
        if run.writes and run.settings.train.resume != "never":
            resume.clear_unfinished(out)
    names = distributed.gather(run.world, [path.name for path in resume.checkpoints(out)])
    choice = None
    with _agreed(run.world):
        if run.world.local_main:  # the others need not read and hash the same files
            choice = resume.choose(run.settings, out, run.manifest, names)
    return distributed.gather(run.world, choice)[0]


def _share_out(run: Run, state: TrainingState | None) -> Run:
    """Give each process its share of an optimizer step that a checkpoint's run had."""
    args = run.args
    batch, passes = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if state is None or batch * passes * run.world.size == state.examples:
        return run
    shares = resume.fit_batch(run.settings.train, state.examples, run.world.size)
    assert shares is not None  # `resume.choose` has refused it
    _print(
        run.world,
        f"batch      {shares[0]} per process and {shares[1]} accumulation instead of {batch} and"
        f" {passes}, so that a step keeps its {state.examples} examples",
    )
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    train = run.settings.train.model_copy(update=dict(zip(keys, shares)))
    settings = run.settings.model_copy(update={"train": train})
    args = training_arguments(settings, run.world, run.examples.metric, run.shared, run.half)
    return dataclasses.replace(run, args=args)


def _check_checkpoint(trainer: RunTrainer, folder: pathlib.Path, with_state: bool) -> None:
    """Compare a checkpoint with the model and the optimizer that will load it."""
    with _agreed(trainer.run.world):
        if trainer.run.world.local_main:
            check_tensors(folder, Manifest.read(folder), trainer.model)
            if with_state:
                try:
                    check_tensors_of_state(folder, trainer.model, trainer.optimizer_keys)
                except CheckpointError as error:
                    raise resume.with_advice(error, folder) from None


def _make_trainer(
    run: Run, model: nn.Module, bars: ProgressBars, callbacks: Sequence[TrainerCallback]
) -> RunTrainer:
    settings, examples, prepare = run.settings, run.examples, run.task.module
    graphs_used = settings.train.cuda_graphs or run.args.torch_compile
    gate_statistics = GateStatistics(model, graphs_used)
    shutdown = GracefulShutdown(run.world.group)
    logger = JsonlLogger(run.out / "log.jsonl", gate_statistics, run.writes)
    try:
        trainer = RunTrainer(
            run,
            gate_statistics,
            shutdown,
            model=model,
            train_dataset=examples.train,
            eval_dataset=examples.dev,
            data_collator=prepare.collator(
                run.tokenizer, settings.data, graphs.BUCKET if settings.train.cuda_graphs else 1
            ),
            processing_class=run.tokenizer,
            compute_metrics=prepare.compute_metrics(examples, run.tokenizer),
            callbacks=[shutdown, logger, *callbacks],
        )
        trainer.try_out()
    except torch.OutOfMemoryError as error:  # perhaps on this rank only
        raise RunError(f"rank {run.world.rank}: {one_line(error, 300)}") from error
    except (ImportError, RuntimeError, ValueError, KeyError, TypeError) as error:
        # A tracker, an optimizer or a DeepSpeed file has refused its settings.
        if watchdog.is_lost(error) or isinstance(error, ConfigError):
            raise
        raise ConfigError(f"train: {one_line(error)}") from error
    trainer.refuse_late_evaluation()
    shutdown.install()
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not run.args.disable_tqdm:
        trainer.add_callback(bars)
    if settings.train.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(settings.train.early_stopping_patience))
    return trainer


def _open_folder(run: Run, old_weights: pathlib.Path | None) -> None:
    """Make and lock the output folder, and write config.yaml and environment.json."""
    out = run.out
    if old_weights is not None and old_weights.parent == out:
        resume.set_aside(out)
    out.mkdir(parents=True, exist_ok=True)
    if not io.hold(out):
        note = "is on a file system without locks; make sure that no other run writes there"
        print(f"note: {out} {note}", flush=True)
    (out / "results.json").unlink(missing_ok=True)  # of a run that ended earlier than this one will
    io.write_text(out / "config.yaml", to_yaml(run.settings))
    io.write_json(out / "environment.json", machine.environment(run.world.device, run.world.size))


def _print(world: World, *lines: str) -> None:
    if world.main:
        print(*lines, sep="\n", flush=True)


def _announce(run: Run, counts: dict[str, Any], model: nn.Module) -> None:
    """Print the header of the run: model, data, batch, kernels, hosts and memory."""
    settings, world = run.settings, run.world
    _print(world, *console.header(run, counts))
    if kernels := kernels_line(settings, model, world.device.type, planned=False):
        _print(world, kernels)
    places = distributed.hosts(world)
    _print(world, *console.placement(places))
    if world.size > 1:
        kind = "one on each host; each writes what it needs to resume"
        _print(world, f"folder     {'shared by all hosts' if run.shared else kind}")
    host, first_host = places[world.rank][0], places[0][0]
    if world.local_main and not world.main and host != first_host:
        rank = f"rank {world.rank} of {world.size} is the first one here"
        print(f"host       {host}: {rank}; the output of the run is on {first_host}", flush=True)
    if world.main:
        states = estimate(settings, run.config, world.size, run.half, world.per_host)
        _print(world, console.memory_line(states))


def _train(run: Run, trainer: RunTrainer, checkpoint: pathlib.Path | None) -> None:
    """Train to the end and save `best/`."""
    patience = run.settings.train.early_stopping_patience
    if checkpoint is not None and patience:
        state = resume.trainer_state(checkpoint)
        if resume.patience_used(state["stateful_callbacks"]) >= patience:
            # The run was killed when early stopping was about to end it.
            run.args.max_steps = state["global_step"]
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.shutdown.stopped_by is not None:
        raise Preempted(
            f"stopped by {trainer.shutdown.stopped_by} at step {trainer.state.global_step}, saved;"
            " continue with train.resume=auto"
        )
    if not trainer.state.best_global_step:
        metric = run.examples.metric
        raise RunError(f"the dev {metric} was never a number, so there is no best checkpoint")
    if trainer.state.global_step < trainer.state.max_steps:
        reason = f"{patience} evaluations without a better dev {run.examples.metric}"
        _print(run.world, f"stopped early: {reason}")
    trainer.save_adapter_checkpoint("best")
