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
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from scaleup.checkpoint import BundleError, verify
from scaleup.config import Settings, to_yaml

NAME = re.compile(r"checkpoint-(\d+)")
ASIDE = re.compile(r"before-(\d+)")
# Stays where it is when a run starts anew from old weights: what the scheduler of a cluster writes itself.
LOGS_OF_OTHERS = (".out", ".err")


def checkpoints(out: pathlib.Path) -> list[pathlib.Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [path for path in out.iterdir() if NAME.fullmatch(path.name) and path.is_dir()] if out.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def clear_unfinished(out: pathlib.Path) -> None:
    """Removes what a killed run left half written. A bundle that was being replaced gets its old version back."""
    for path in list(out.glob(".*")):
        if path.name.endswith(".old"):
            final = path.with_name(path.name[1 : -len(".old")])
            if not final.exists() and path.is_dir():
                path.rename(final)
                continue
        if path.name.endswith((".old", ".draft", ".part", ".gone")) or path.name.startswith(".probe-"):
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

    `now`: what this run would write, see `scaleup.train.about`.
    """
    then, here = manifest["run"], now["run"]
    for key, words in (("processes", "{} process(es)"), ("zero_stage", "ZeRO stage {} (0: without DeepSpeed)")):
        if then[key] != here[key]:
            return f"it was written by {words.format(then[key])}, this run has {words.format(here[key])}"
    return None


def check(folder: pathlib.Path, now: dict) -> dict:
    """The manifest of a checkpoint that this run may load.

    Raises BundleError: damaged, of another format, or of another backbone.
    """
    try:
        manifest = verify(folder)
    except BundleError as error:
        raise BundleError(f"{error}. To continue from the checkpoint before it, remove {folder}") from None
    then, here = manifest["backbone"], now["backbone"]
    if then["fingerprint"] != here["fingerprint"]:
        raise BundleError(f"{folder}: trained on another backbone ({then['name']}, {then['fingerprint'][:19]}…) than {here['name']} is now")
    return manifest


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

    same = wanted(config.read_text(encoding="utf-8")) == wanted(to_yaml(settings))
    return json.loads(path.read_text(encoding="utf-8")) if same else None


def set_aside(out: pathlib.Path) -> None:
    """Moves all that a run left into out/before-N/, so that it can start anew from old weights. Nothing is lost."""
    taken = [int(found[1]) for path in out.iterdir() if (found := ASIDE.fullmatch(path.name))]
    target = out / f"before-{max(taken, default=0) + 1}"
    target.mkdir()
    for path in list(out.iterdir()):
        if not ASIDE.fullmatch(path.name) and path.suffix not in LOGS_OF_OTHERS:
            path.rename(target / path.name)


def set_aside_newest(out: pathlib.Path) -> pathlib.Path | None:
    """The newest checkpoint that was set aside."""
    aside = sorted((path for path in out.iterdir() if ASIDE.fullmatch(path.name)), key=lambda p: int(p.name.partition("-")[2]), reverse=True)
    return next((found[-1] for path in aside if (found := checkpoints(path))), None)


def load_weights(model: nn.Module, folder: pathlib.Path) -> None:
    """The trained tensors of a checkpoint into a model that is not yet shared out. Raises BundleError if they do not fit."""
    files = sorted(folder.glob("*.safetensors"))
    state: dict[str, torch.Tensor] = {}
    for path in files:
        state |= load_file(path)
    try:
        if isinstance(model, PeftModel):
            peft.set_peft_model_state_dict(model, state)
        else:
            model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise BundleError(f"{folder}: its weights do not fit this model: {' '.join(str(error).split())[:200]}") from None
