"""One training run, for every method and backbone: HF Trainer on Accelerate and DeepSpeed.

    results = run(settings)             config → data, backbone → attach → train → bundles, log, results

This is the only file that knows Trainer. What it leaves in `output_dir` is listed in DESIGN.md section 4; `results.json`
holds only what the same config and seed give again, times and memory are in `timing.json`.
"""

import json
import math
import os
import pathlib
import time

import datasets
import torch
from torch import nn
from tqdm import tqdm
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers import PretrainedConfig, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as hf_logging

from scaleup import backbone, data, runtime
from scaleup.checkpoint import draft, expected_tensors, seal
from scaleup.config import ZERO_PRESETS, ConfigError, Settings, to_yaml
from scaleup.journal import GateLog, header, summary, write_json
from scaleup.unipelt import apply_method, parameter_counts

PRESETS = pathlib.Path(__file__).parents[1] / "configs" / "deepspeed"


class RunError(RuntimeError):
    """A run that cannot go on, in one plain line. What it had saved stays."""


class RunTrainer(Trainer):
    """Trainer that counts tokens, logs gates and keeps the last weights beside the best."""

    def __init__(self, *args, gate_log: GateLog, out: pathlib.Path, about: dict, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate_log, self.out, self.about = gate_log, out, about
        self.tokens = torch.zeros((), device=self.args.device)
        self.since = time.perf_counter()

    def training_step(self, model: nn.Module, inputs: dict, *args, **kwargs) -> torch.Tensor:
        self.tokens += inputs["attention_mask"].sum().to(self.tokens.device)
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Adds speed and gates to a training log. Runs on every rank: the token count is summed over them."""
        if not math.isfinite(logs.get("loss", 0.0)):
            raise RunError(
                f"the loss is {logs['loss']} at step {self.state.global_step}; try a lower train.learning_rate"
                f" (best checkpoint so far: {self.state.best_model_checkpoint or 'none'})"
            )
        if "loss" in logs:
            tokens, self.tokens = self.accelerator.reduce(self.tokens, reduction="sum"), torch.zeros_like(self.tokens)
            logs["tokens_per_second"] = round(tokens.item() / (time.perf_counter() - self.since), 1)
        if "loss" in logs or any(key.startswith("eval_") for key in logs):
            self.since = time.perf_counter()  # evaluation does not count as training time
            self.gate_log.drain()
            logs.update(self.gate_log.scalars())
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        self.gate_log.drain()  # the gates logged with dev scores are those of dev examples
        return super().evaluate(*args, **kwargs)

    def save_bundle(self, name: str) -> None:
        """`out/name`: the model as it is now. Every rank takes part; the main one writes."""
        folder = self.out / name
        written = draft(folder) if self.args.process_index == 0 else folder.with_name(f".{name}.draft")
        self.accelerator.wait_for_everyone()
        self.save_model(str(written))
        if self.args.process_index == 0:
            seal(written, folder, expected_tensors(self.accelerator.unwrap_model(self.model)), self.about)
        self.accelerator.wait_for_everyone()

    def _load_best_model(self) -> None:
        self.save_bundle("final")
        super()._load_best_model()


class Journal(TrainerCallback):
    """log.jsonl and the one progress bar, on the main rank."""

    def __init__(self, path: pathlib.Path, metric: str, gate_log: GateLog):
        self.path, self.metric, self.gate_log = path, metric, gate_log
        self.bar: tqdm | None = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True, disable=args.disable_tqdm)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """One line of log.jsonl, and the newest numbers behind the bar."""
        if not state.is_world_process_zero:
            return
        line = {"step": state.global_step, **{k: v for k, v in logs.items() if not k.startswith("gates/")}}
        if "loss" in logs or "eval_loss" in logs:
            line["gates"] = self.gate_log.last
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if "loss" in logs:
            self.shown["loss"] = f"{logs['loss']:.3f}"
        if f"eval_{self.metric}" in logs:
            self.shown[f"dev {self.metric}"] = f"{logs[f'eval_{self.metric}']:.3f}"
        if self.bar is not None:
            self.bar.set_postfix(self.shown)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _training_arguments(settings: Settings, world: runtime.World, metric: str) -> TrainingArguments:
    """TrainingArguments of a run. Raises ConfigError with Trainer's own words for values it refuses."""
    train = settings.train
    passed = train.training_arguments
    strategy = passed.pop("eval_strategy", None) or "epoch"
    if strategy == "no":
        raise ConfigError("train.eval_strategy: no development scores, no best checkpoint; use epoch or steps")
    if passed.get("eval_steps"):
        passed.setdefault("save_steps", passed["eval_steps"])
    passed.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False} if train.gradient_checkpointing else None)
    passed.setdefault("save_strategy", strategy)
    passed.setdefault("save_total_limit", 2)
    passed.setdefault("ddp_find_unused_parameters", False)
    passed.setdefault("average_tokens_across_devices", False)  # True multiplies the logged loss by the number of processes
    passed.setdefault("disable_tqdm", False)
    passed.setdefault("logging_nan_inf_filter", False)  # a loss that is not a number ends the run instead of being smoothed over
    passed.setdefault("dataloader_pin_memory", world.device.type == "cuda")
    if world.device.type == "cpu" and not world.deepspeed:
        passed.setdefault("use_cpu", True)  # what Trainer wants to hear before it allows bfloat16 on CPU
    group = train.group_by_length and not settings.data.pad_to_max_length
    try:
        args = TrainingArguments(
            **passed,
            eval_strategy=strategy,
            learning_rate=settings.learning_rate,
            bf16=use_bf16(settings),
            deepspeed=_deepspeed_file(train.deepspeed),
            train_sampling_strategy="group_by_length" if group else "random",
            length_column_name="length",
            load_best_model_at_end=True,
            metric_for_best_model=metric,
            greater_is_better=True,
            remove_unused_columns=False,
            label_names=["labels"],
            accelerator_config={"use_configured_state": True},
        )
        args._n_gpu = min(args.n_gpu, 1)  # one process drives one GPU; nn.DataParallel would copy modules without their hooks
        return args
    except (ValueError, ImportError, TypeError) as error:
        raise ConfigError(f"train: {' '.join(str(error).split())}") from error


def _deepspeed_file(name: str | None) -> str | None:
    return str(PRESETS / f"{name}.json") if name in ZERO_PRESETS else name


def use_bf16(settings: Settings) -> bool:
    """`train.bf16`, with auto decided by the device: on where a GPU computes in it."""
    if settings.train.bf16 == "auto":
        return not settings.train.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return settings.train.bf16


def frozen_dtype(settings: Settings) -> torch.dtype:
    """Storage type of the backbone. auto: bfloat16 with bf16 training of a frozen backbone, else float32."""
    if settings.model.dtype != "auto":
        return getattr(torch, settings.model.dtype)
    return torch.bfloat16 if use_bf16(settings) and settings.method.name == "unipelt" else torch.float32


def check_resume(settings: Settings) -> list[str]:
    """Problems with continuing the run in output_dir: another backbone, method or data than it was started with."""
    path = pathlib.Path(settings.train.output_dir, "config.yaml")
    if settings.train.resume == "never" or not path.is_file():
        return []
    now = to_yaml(settings).partition("\ntrain:")[0]
    then = path.read_text(encoding="utf-8").partition("\ntrain:")[0]
    if now == then:
        return []
    return [f"train.resume: {path} has other model, method or data settings; resume with that config, or choose another output_dir"]


def _fit_length(settings: Settings, config: PretrainedConfig) -> Settings:
    """A length the user did not choose shrinks to what the model takes; a chosen one that is too long is refused."""
    limit = backbone.position_limit(config)
    if "max_length" not in settings.data.model_fields_set and limit is not None and limit < settings.data.max_length:
        return settings.model_copy(update={"data": settings.data.model_copy(update={"max_length": limit})})
    problems = backbone.length_problems(settings.data, settings.model, config)
    if problems:
        raise ConfigError(problems)
    return settings


def _say(world: runtime.World, *lines: str) -> None:
    if world.main:
        print(*lines, sep="\n", flush=True)


def _about(settings: Settings, examples: data.Examples) -> dict:
    return {
        "method": settings.dump()["method"],
        "backbone": {"name": settings.model.name, "revision": settings.model.revision, "quantization": settings.model.quantization},
        "task": examples.task,
        "labels": examples.labels,
    }


def run(settings: Settings) -> dict:
    """Trains, restores the best checkpoint, scores the test set once. Returns what results.json holds.

    Raises ConfigError for what a user must change.
    """
    begin = time.perf_counter()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and settings.train.deepspeed is None:
        raise ConfigError("the launcher asks for DeepSpeed; say which with train.deepspeed=zero2 instead")
    world = runtime.start(settings.train.deepspeed is not None, settings.train.ddp_timeout or 1800)
    if settings.train.log_level is None:
        hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()  # one bar: the training's
    datasets.disable_progress_bars()
    set_seed(settings.train.seed)
    out = pathlib.Path(settings.train.output_dir)
    config = backbone.load_config(settings.model)
    settings = _fit_length(settings, config)
    problems = check_resume(settings)
    if problems:
        raise ConfigError(problems)
    examples = data.load(settings.data)
    tokenizer = backbone.load_tokenizer(settings.model)
    examples = data.tokenize(examples, tokenizer, settings.data)
    args = _training_arguments(settings, world, examples.metric)
    model = backbone.load_model(settings.model, config, examples.labels, frozen_dtype(settings), world.device)
    # DeepSpeed in bf16 keeps its own float32 masters and wants one type among what it trains.
    model = apply_method(model, settings.method, autocast_adapter_dtype=not (args.bf16 and world.deepspeed))
    counts = parameter_counts(model)
    if world.main:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(to_yaml(settings), encoding="utf-8")
        write_json(out / "environment.json", runtime.environment(world))
    kind = args.distributed_state.distributed_type.value.lower() if world.size > 1 or world.deepspeed else "one process"
    kind += f", {settings.train.deepspeed}" if settings.train.deepspeed else ""
    _say(world, *header(settings, examples, counts, world, kind, args.bf16))
    trainer = _make_trainer(settings, args, model, tokenizer, examples, out)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if settings.train.resume == "auto" and out.is_dir() else None)
    trainer.save_bundle("best")
    results = _score(settings, trainer, examples, counts)
    seconds = time.perf_counter() - begin
    if world.main:
        write_json(out / "results.json", results)
        write_json(out / "timing.json", {"seconds": round(seconds, 1), "peak_memory_mib": round(runtime.peak_memory_mib(world), 1)})
    _say(world, *summary(results, out, seconds))
    return results


def _make_trainer(settings, args, model, tokenizer, examples: data.Examples, out: pathlib.Path) -> RunTrainer:
    gate_log = GateLog(model)
    try:
        trainer = RunTrainer(
            model=model,
            args=args,
            train_dataset=examples.train,
            eval_dataset=examples.dev,
            data_collator=data.collator(tokenizer, settings.data),
            processing_class=tokenizer,
            compute_metrics=data.compute_metrics(examples),
            callbacks=[Journal(out / "log.jsonl", examples.metric, gate_log)],
            gate_log=gate_log,
            out=out,
            about=_about(settings, examples),
        )
    except (ImportError, RuntimeError, ValueError) as error:  # a tracker that is unknown or whose package is not installed
        raise ConfigError(f"train: {' '.join(str(error).split())}") from error
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if settings.train.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(settings.train.early_stopping_patience))
    return trainer


def _score(settings: Settings, trainer: RunTrainer, examples: data.Examples, counts: dict) -> dict:
    """The best checkpoint on dev, with its gates, and once on test."""
    trainer.gate_log.drain()

    def scores(dataset) -> tuple[dict, dict]:
        metrics = trainer.predict(dataset).metrics
        kept = {k.removeprefix("test_"): round(v, 6) for k, v in metrics.items() if not k.endswith(("runtime", "per_second"))}
        return {k: v for k, v in kept.items() if "model_preparation" not in k}, trainer.gate_log.drain()

    dev, gates = scores(examples.dev)
    test = dev if examples.test_is_dev else scores(examples.test)[0] if examples.test is not None else None
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
        "examples": {"train": len(examples.train), "dev": len(examples.dev), "test": len(examples.test) if examples.test is not None else 0},
        "seeds": {"data": settings.data.seed, "train": settings.train.seed},
        "parameters": counts,
        "gates": gates,
        "method": settings.dump()["method"],
        "learning_rate": settings.learning_rate,
        "sources": examples.sources,
    }
