"""Continuing a run: which checkpoint is the newest, whether it is whole and fits, what to clear away first.

A run's folder has `checkpoint-N/` for the newest steps and the best one. Names that begin with a dot are unfinished or
on their way out, and mean nothing.
"""

import json
import pathlib
import re
import shutil

import peft
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from scaleup.backbone.sharded import set_values
from scaleup.errors import CheckpointError, ConfigError
from scaleup.io import LOCK
from scaleup.settings.rules import ASIDE, LOGS_OF_OTHERS, OURS
from scaleup.settings.schema import Settings, to_yaml
from scaleup.training.checkpoint import verify

NAME = re.compile(r"checkpoint-(\d+)")
# Settings that optimizer, schedule and order of examples were made with; the others may change when a run goes on.
FIXED_IN_TRAINING = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "group_by_length",
)


def checkpoints(out: pathlib.Path) -> list[pathlib.Path]:
    """The finished checkpoints of a run, oldest first."""
    found = (
        [path for path in out.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
        if out.is_dir()
        else []
    )
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def clear_unfinished(out: pathlib.Path) -> None:
    """Removes what a killed run left half written. A bundle that was being replaced gets its old version back."""
    for path in [path for path in out.glob(".*") if OURS.fullmatch(path.name)]:
        if path.name.endswith(".old"):
            final = path.with_name(path.name[1 : -len(".old")])
            if not final.exists() and path.is_dir():
                path.rename(final)
                continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def keep_newest(out: pathlib.Path, count: int, best_step: int | None) -> None:
    """Removes all but the newest `count` checkpoints and the best one. Each loses its name before its files."""
    for path in checkpoints(out)[:-count]:
        if path.name != f"checkpoint-{best_step}":
            gone = path.with_name(f".{path.name}.gone")
            path.rename(gone)
            shutil.rmtree(gone)


def misfit(manifest: dict, now: dict) -> str | None:
    """Why the state of the optimizer cannot be taken on by this run's processes; None if it can.

    `now`: what this run would write, see `scaleup.training.run.about`.
    """
    then, here = manifest["run"], now["run"]
    for key, words in (
        ("processes", "{} process(es)"),
        ("zero_stage", "ZeRO stage {} (0: without DeepSpeed)"),
    ):
        if then[key] != here[key]:
            return f"it was written by {words.format(then[key])}, this run has {words.format(here[key])}"
    return None


def check(folder: pathlib.Path, now: dict) -> dict:
    """The manifest of a checkpoint that this run may load.

    Raises CheckpointError: damaged, of another format, of another backbone or other data.
    """
    try:
        manifest = verify(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. To continue from the checkpoint before it, remove {folder}"
        ) from None
    then, here = manifest["backbone"], now["backbone"]
    if then["fingerprint"] != here["fingerprint"]:
        raise CheckpointError(
            f"{folder}: trained on another backbone ({then['name']}, {then['fingerprint'][:19]}…) than {here['name']} is now"
        )
    if manifest["data"] != now["data"]:
        raise CheckpointError(
            f"{folder}: trained on other data; a file has changed since. Use a new train.output_dir"
        )
    return manifest


def _different(settings: Settings) -> list[str]:
    """Settings with which it would not be the run in output_dir any more. Raises ConfigError if that run's config is damaged."""
    path = pathlib.Path(settings.train.output_dir, "config.yaml")
    if not path.is_file():
        return []
    try:
        then = yaml.safe_load(path.read_text(encoding="utf-8"))
        return [
            f"{name}.{key}"
            for name, values in settings.dump().items()
            for key in (values | then[name])
            if (name != "train" or key in FIXED_IN_TRAINING)
            and values.get(key) != then[name].get(key)
        ]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):
        raise ConfigError(
            f"train.resume: {path} is damaged; put the run's config back, or choose another output_dir"
        ) from None


def changes(settings: Settings) -> list[str]:
    """Problems with continuing the run in output_dir. Only its weights may go into another training."""
    if settings.train.resume == "never":
        return []
    try:
        found = _different(settings)
    except ConfigError as error:
        return error.problems
    if settings.train.resume == "weights_only":
        found = [key for key in found if not key.startswith("train.")]
    if not found:
        return []
    path = pathlib.Path(settings.train.output_dir, "config.yaml")
    return [
        f"train.resume: {path} has another {', '.join(found)}; resume with that config, or choose another output_dir"
    ]


def choose(
    settings: Settings, out: pathlib.Path, now: dict, on_hosts: list[list[str]]
) -> tuple[pathlib.Path | None, pathlib.Path | None]:
    """(checkpoint to resume, checkpoint to take only weights from).

    `now`: what this run would write of itself. `on_hosts`: the checkpoints that each process sees; hosts with a folder of their
    own resume from the newest that all have. Raises CheckpointError or ConfigError where a run cannot go on.
    """
    if settings.train.resume == "never" or not out.is_dir():
        return None, None
    found = [path for path in checkpoints(out) if all(path.name in names for names in on_hosts)]
    if not found and any(on_hosts):
        first = {
            tuple(names): rank for rank, names in reversed(list(enumerate(on_hosts)))
        }  # one rank for each of the answers
        lists = "; ".join(
            f"rank {rank}: {', '.join(names) or 'none'}" for names, rank in first.items()
        )
        raise ConfigError(f"train.resume: no checkpoint in {out} is on every host ({lists})")
    weights_only = settings.train.resume == "weights_only"
    if not found:
        old = set_aside_newest(
            out
        )  # also with auto: a run that began from old weights and ended before its first checkpoint
        if old is not None:
            check(old, now)
        return None, old
    why = misfit(check(found[-1], now), now)
    if weights_only and (why is not None or _different(settings)):
        return None, found[-1]
    if why is not None:
        raise ConfigError(
            f"train.resume: {found[-1]} cannot be continued here: {why}. Use as many processes and that ZeRO stage, or"
            " train.resume=weights_only: its trained weights, a new optimizer and schedule (the old run moves to before-N/)"
        )
    best = trainer_state(found[-1])["best_global_step"]
    if best and best != int(found[-1].name.partition("-")[2]):
        try:
            check(out / f"checkpoint-{best}", now)
        except CheckpointError as error:
            words = str(error).partition(". To continue")[0]
            raise CheckpointError(
                f"{words}. It was the best so far, and the run has to end with it: put it back, or start anew in another output_dir"
            ) from None
    return found[-1], None


def trainer_state(folder: pathlib.Path) -> dict:
    """What Trainer remembers beside the weights: step, best step, early stopping."""
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))


def patience_used(callbacks: dict) -> int:
    """Evaluations without a better score so far, from the `stateful_callbacks` of a trainer state."""
    stored = callbacks.get("EarlyStoppingCallback", {"attributes": {}})
    entry = stored[-1] if isinstance(stored, list) else stored
    return entry["attributes"].get("early_stopping_patience_counter", 0)


def finished(settings: Settings, out: pathlib.Path) -> dict | None:
    """The results of this very run, if it came to its end before: a job that a scheduler starts again has nothing to do."""
    path, config = out / "results.json", out / "config.yaml"
    if settings.train.resume == "never" or not path.is_file() or not config.is_file():
        return None

    def wanted(text: str) -> str:
        return "\n".join(line for line in text.splitlines() if not line.startswith("  resume:"))

    if wanted(config.read_text(encoding="utf-8")) != wanted(to_yaml(settings)):
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(
            f"{path} is damaged; remove it to score the run's checkpoints again"
        ) from None


def set_aside(out: pathlib.Path) -> None:
    """Moves all that a run left into out/before-N/, so that it can start anew from old weights. Nothing is lost."""
    taken = [int(found[1]) for path in out.iterdir() if (found := ASIDE.fullmatch(path.name))]
    target = out / f"before-{max(taken, default=0) + 1}"
    target.mkdir()
    for path in list(out.iterdir()):
        if (
            not ASIDE.fullmatch(path.name)
            and path.suffix not in LOGS_OF_OTHERS
            and path.name != LOCK
        ):
            path.rename(target / path.name)


def set_aside_newest(out: pathlib.Path) -> pathlib.Path | None:
    """The newest checkpoint that was set aside."""
    aside = sorted(
        (path for path in out.iterdir() if ASIDE.fullmatch(path.name)),
        key=lambda p: int(p.name.partition("-")[2]),
        reverse=True,
    )
    return next((found[-1] for path in aside if (found := checkpoints(path))), None)


def _fill(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Sets parameters and buffers by name, shared out or not. Raises RuntimeError for another shape, AttributeError for an unknown name."""
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        parameter = parameters.get(name)
        if parameter is None:
            model.get_buffer(name).copy_(value)
        elif tuple(value.shape) != tuple(getattr(parameter, "ds_shape", parameter.shape)):
            raise RuntimeError(f"{name} is {tuple(value.shape)} there")
        else:
            set_values(parameter, value)


def load_weights(model: nn.Module, folder: pathlib.Path) -> None:
    """The trained tensors of a checkpoint into a model whose added tensors are not yet shared out. Raises CheckpointError if they do not fit."""
    files = sorted(folder.glob("*.safetensors"))
    state: dict[str, torch.Tensor] = {}
    for path in files:
        state |= load_file(path)
    try:
        if isinstance(model, PeftModel):
            peft.set_peft_model_state_dict(model, state)
        else:
            _fill(model, state)
    except (RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: its weights do not fit this model: {' '.join(str(error).split())[:200]}"
        ) from None
