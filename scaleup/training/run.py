"""One training run, for every method and backbone: HF Trainer on Accelerate and DeepSpeed.

    results = run(settings)             config → data, backbone → attach → train → bundles, log, results

With scaleup.training.trainer, the only file that knows Trainer. What it leaves in `output_dir` is listed in DESIGN.md section 4; `results.json`
holds only what the same config and seed give again, times and memory are in `timing.json`.
"""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Sequence

import datasets
import torch
from transformers import (
    EarlyStoppingCallback,
    PretrainedConfig,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging as hf_logging

from scaleup import io
from scaleup.backbone import loading as backbone
from scaleup.backbone import precision
from scaleup.backbone.method import device_half_dtype, load_run_model
from scaleup.data import classification as data
from scaleup.data import tasks
from scaleup.data.files import Examples
from scaleup.data.generation import decode
from scaleup.errors import CheckpointError, ConfigError, Preempted, RunError
from scaleup.io import write_json, write_text
from scaleup.memory.states import estimate
from scaleup.settings.schema import Settings, to_yaml
from scaleup.training import distributed as runtime
from scaleup.training import resume, watchdog
from scaleup.training.arguments import deepspeed_file, training_arguments
from scaleup.training.console import GateStatistics, header, memory_line, placement, summary
from scaleup.training.preflight import hub_structure, keeps_apart
from scaleup.training.trainer import GracefulShutdown, JsonlLogger, RunTrainer
from scaleup.unipelt.model import parameter_counts


@contextlib.contextmanager
def _agreed(world: runtime.World):
    """What goes wrong on one process ends all of them, with the first one's words."""
    problem = None
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        problem = error
    problems = [found for found in runtime.gather(world, problem) if found is not None]
    if problems:
        raise problems[0]


def _say(world: runtime.World, *lines: str) -> None:
    if world.main:
        print(*lines, sep="\n", flush=True)


def _say_where(world: runtime.World, shared: bool) -> None:
    """World, hosts, devices, and whose output folder it is. The other hosts say where the rest is told."""
    where = runtime.hosts(world)
    _say(world, *placement(where))
    if world.size > 1:
        _say(
            world,
            f"folder     {'shared by all hosts' if shared else 'one on each host; each writes what it needs to resume'}",
        )
    if world.local_main and not world.main and where[world.rank][0] != where[0][0]:
        print(
            f"host       {where[world.rank][0]}: rank {world.rank} of {world.size} and its neighbours; the run speaks on {where[0][0]}",
            flush=True,
        )


def about(
    settings: Settings, examples: Examples, config: PretrainedConfig, args: TrainingArguments
) -> dict:
    """What a bundle's manifest says of its run."""
    model, stage = (
        settings.model,
        args.deepspeed_plugin.zero_stage if args.deepspeed_plugin is not None else 0,
    )
    return {
        "method": settings.dump()["method"],
        "backbone": {
            "name": model.name,
            "revision": model.revision,
            "quantization": model.quantization,
            "fingerprint": backbone.fingerprint(model, config),
        },
        "task": examples.task,
        "labels": examples.labels,
        "data": data.provenance(examples),
        "run": {"processes": args.world_size, "zero_stage": stage},
    }


def _start(settings: Settings) -> runtime.World:
    """Joins the other processes; libraries speak only if they were asked to."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and settings.train.deepspeed is None:
        raise ConfigError(
            "the launcher asks for DeepSpeed; say which with train.deepspeed=zero2 instead"
        )
    world = runtime.start(settings.train.deepspeed is not None, settings.train.ddp_timeout or 1800)
    if settings.train.log_level is None:
        hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()  # one bar: the training's
    datasets.disable_progress_bars()
    set_seed(settings.train.seed)
    return world


def _announce(
    settings: Settings,
    config: PretrainedConfig,
    examples: Examples,
    counts: dict,
    world: runtime.World,
    args: TrainingArguments,
    shared: bool,
    half: torch.dtype | None,
) -> None:
    """Everything about the run, before its first step."""
    kind = (
        args.distributed_state.distributed_type.value.lower()
        if world.size > 1 or world.deepspeed
        else "one process"
    )
    kind += f", {settings.train.deepspeed}" if settings.train.deepspeed else ""
    _say(world, *header(settings, examples, counts, world, kind, args.bf16))
    _say_where(world, shared)
    if world.main:
        file, frozen = (
            deepspeed_file(settings.train.deepspeed),
            precision.backbone_dtype(settings, half),
        )
        _say(
            world,
            memory_line(
                estimate(
                    settings, config, frozen, file, world.size, half if world.deepspeed else None
                )
            ),
        )


def run(settings: Settings, callbacks: Sequence[TrainerCallback] = ()) -> dict:
    """Trains, restores the best checkpoint, scores the test set once. Returns what results.json holds.

    `callbacks`: transformers callbacks to run besides our own. Raises ConfigError for what a user must change, RunError for a
    run that cannot go on, Preempted after SIGTERM once everything is saved.
    """
    begin = time.perf_counter()
    world = _start(settings)
    out = pathlib.Path(settings.train.output_dir)
    config = backbone.load_config(settings.model)
    settings = backbone.fit_length(settings, config)
    half = device_half_dtype(settings, world.device)
    problems = (
        resume.changes(settings)
        + precision.problems(settings, half)
        + keeps_apart(settings.data, config)
        + hub_structure(settings, config)
    )
    if problems:
        raise ConfigError(problems)
    shared = runtime.shares_folder(world, out)
    writes = world.writes(shared)
    done = runtime.gather(world, resume.finished(settings, out))[
        0
    ]  # results.json is on the first host
    if done is not None:
        _say(
            world,
            f"this run is finished; to train on, change what it stopped for. Results of {out}:",
            *summary(done, out, 0.0),
        )
        return done
    task = tasks.of(settings.data)
    examples = task.module.load(settings.data)
    tokenizer = backbone.load_tokenizer(settings.model, config)
    examples = task.module.tokenize(examples, tokenizer, settings.data)
    args = training_arguments(settings, world, examples.metric, task.token_mean, shared, half)
    facts = about(settings, examples, config, args)
    with _agreed(world):
        if writes and out.is_dir():
            io.hold(out)
        if writes and settings.train.resume != "never":
            resume.clear_unfinished(out)
    on_hosts = runtime.gather(world, [path.name for path in resume.checkpoints(out)])
    with _agreed(world):
        checkpoint, old_weights = resume.choose(settings, out, facts, on_hosts)
    model = load_run_model(
        settings,
        config,
        task.auto,
        examples.labels,
        world.device,
        prior=data.prior(examples) if settings.model.head_bias == "prior" else None,
        zero3=is_deepspeed_zero3_enabled(),
        for_training=True,
    )
    counts = parameter_counts(model)
    if old_weights is not None:
        resume.load_weights(model, old_weights)
    trainer = _make_trainer(
        settings, args, model, tokenizer, examples, facts, callbacks, world, shared
    )
    runtime.gather(world, None)  # nobody moves the folder before everyone has read it
    if writes:
        if old_weights is not None and old_weights.parent == out:
            resume.set_aside(out)
        out.mkdir(parents=True, exist_ok=True)
        if not io.hold(out):
            print(
                f"note: {out} is on a file system without locks; see that no other run writes there",
                flush=True,
            )
        write_text(out / "config.yaml", to_yaml(settings))
        write_json(out / "environment.json", runtime.environment(world))
    _announce(settings, config, examples, counts, world, args, shared, half)
    if checkpoint or old_weights:
        _say(world, f"resume     {checkpoint or f'the weights of {old_weights}, from step 0'}")
    if checkpoint is not None and settings.train.early_stopping_patience:
        state = resume.trainer_state(checkpoint)
        if (
            resume.patience_used(state["stateful_callbacks"])
            >= settings.train.early_stopping_patience
        ):
            args.max_steps = state["global_step"]  # it was killed when it was about to stop
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.stopping is not None:
        raise Preempted(
            f"stopped by {trainer.stopping} at step {trainer.state.global_step}, saved; continue with train.resume=auto"
        )
    if trainer.state.global_step < trainer.state.max_steps:
        _say(
            world,
            f"stopped early: {settings.train.early_stopping_patience} evaluations without a better dev {examples.metric}",
        )
    trainer.save_bundle("best")
    results = _score(settings, trainer, examples, counts)
    seconds = time.perf_counter() - begin
    if world.main:
        write_json(out / "results.json", results)
        write_json(
            out / "timing.json",
            {
                "seconds": round(seconds, 1),
                "peak_memory_mib": round(runtime.peak_memory_mib(world), 1),
            },
        )
    _say(world, *summary(results, out, seconds))
    return results


def _make_trainer(
    settings,
    args,
    model,
    tokenizer,
    examples: Examples,
    facts: dict,
    callbacks: Sequence[TrainerCallback],
    world: runtime.World,
    shared: bool,
) -> RunTrainer:
    gate_log, out = (
        GateStatistics(model, args.torch_compile),
        pathlib.Path(settings.train.output_dir),
    )
    stop, task = GracefulShutdown(), tasks.of(settings.data)
    try:
        trainer = RunTrainer(
            model=model,
            args=args,
            train_dataset=examples.train,
            eval_dataset=examples.dev,
            data_collator=task.module.collator(tokenizer, settings.data),
            processing_class=tokenizer,
            compute_metrics=task.module.compute_metrics(examples, tokenizer),
            token_mean=task.token_mean,
            generation=tasks.generation(settings.data, examples.metric),
            callbacks=[
                stop,
                JsonlLogger(out / "log.jsonl", examples.metric, gate_log, world.writes(shared)),
                *callbacks,
            ],
            gate_log=gate_log,
            out=out,
            about=facts,
            keep=settings.train.keep_checkpoints,
            world=world,
            shared=shared,
        )
        trainer.try_out()
    except torch.OutOfMemoryError as error:  # perhaps on this rank only
        raise RunError(f"rank {world.rank}: {' '.join(str(error).split())[:300]}") from error
    except (
        ImportError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:  # of a tracker, an optimizer, a DeepSpeed file
        if watchdog.is_lost(error):
            raise
        raise ConfigError(f"train: {' '.join(str(error).split())}") from error
    stop.trainer = trainer
    stop.install()
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if settings.train.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(settings.train.early_stopping_patience))
    return trainer


def _score(settings: Settings, trainer: RunTrainer, examples: Examples, counts: dict) -> dict:
    """The best checkpoint on dev, with its gates, and once on test."""
    trainer.gate_log.drain()

    def scores(dataset, keep: pathlib.Path | None = None) -> tuple[dict, dict]:
        output = trainer.predict(dataset)
        if keep is not None and trainer.generation is not None and trainer.world.main:
            # Evaluated by length; written in the order of the test set.
            rows = sorted(
                zip(
                    decode(trainer.processing_class, output.predictions), output.label_ids.tolist()
                ),
                key=lambda row: row[1],
            )
            lines = [
                {"text": examples.prompts[i], "written": text, "references": examples.references[i]}
                for text, i in rows
            ]
            write_text(keep, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        metrics = output.metrics
        kept = {
            k.removeprefix("test_"): round(v, 6)
            for k, v in metrics.items()
            if not k.endswith(("runtime", "per_second"))
        }
        return {
            k: v for k, v in kept.items() if "model_preparation" not in k
        }, trainer.gate_log.drain()

    dev, gates = scores(examples.dev)
    test = (
        dev
        if examples.test_is_dev
        else scores(examples.test, trainer.out / "predictions.jsonl")[0]
        if examples.test is not None
        else None
    )
    state = trainer.state
    return {
        "task": settings.data.name or examples.task,
        "metric": examples.metric,
        "test": test,
        "test_is_dev": examples.test_is_dev,
        "dev": dev,
        "best_step": int(state.best_global_step or 0),
        "steps": state.global_step,
        "epochs": round(state.epoch or 0.0, 4),
        "examples": {
            "train": len(examples.train),
            "dev": len(examples.dev),
            "test": len(examples.test) if examples.test is not None else 0,
        },
        "seeds": {"data": settings.data.seed, "train": settings.train.seed},
        "parameters": counts,
        "gates": gates,
        "method": settings.dump()["method"],
        "learning_rate": settings.learning_rate,
        "sources": examples.sources,
    }
