"""Continue a run: find its newest checkpoint, check that it fits, and clear unfinished files.

A run's folder has `checkpoint-N/` for the newest steps and for the best one. Names that begin with
a dot are unfinished or being removed, and are ignored.
"""

import pathlib
import re
import shutil
from typing import Any

from scaleup.errors import CheckpointError, ConfigError
from scaleup.io import LOCK
from scaleup.settings.schema import Settings, TrainSettings, stored
from scaleup.training.checkpoint import verify
from scaleup.training.manifest import ANY, FIXED_IN_TRAINING, Manifest
from scaleup.training.output_folder import LEFTOVERS, SCHEDULER_LOGS, SET_ASIDE
from scaleup.training.resume_state import trainer_state
from scaleup.training.training_state import NUMBERS, read_state

NAME = re.compile(r"checkpoint-(\d+)")


def _number(path: pathlib.Path) -> int:
    """Return N of `checkpoint-N` or `before-N`."""
    return int(path.name.partition("-")[2])


def checkpoints(out: pathlib.Path) -> list[pathlib.Path]:
    """Return the committed checkpoints of a run, oldest first."""
    return _numbered(out, NAME)


def clear_unfinished(out: pathlib.Path) -> None:
    """Remove what a killed run left half written.

    If a checkpoint was just being replaced, its old version gets its name back.
    """
    for path in [path for path in out.glob(".*") if LEFTOVERS.fullmatch(path.name)]:
        if path.name.endswith(".old"):
            final = path.with_name(path.name[1 : -len(".old")])
            if not final.exists() and path.is_dir():
                path.rename(final)
                continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def keep_newest(out: pathlib.Path, count: int, step: int, best_step: int | None) -> None:
    """Remove all checkpoints up to `step` but the newest `count` and the best one.

    A host may have a later one that others lack, so that the run continued from one before it.
    """
    for path in [path for path in checkpoints(out) if _number(path) <= step][:-count]:
        if path.name != f"checkpoint-{best_step}":
            gone = path.with_name(f".{path.name}.gone")
            path.rename(gone)  # so that a half-removed folder is never taken for a checkpoint
            shutil.rmtree(gone)


def fit_batch(train: TrainSettings, examples: int, processes: int) -> tuple[int, int] | None:
    """Share the examples of an optimizer step out to a number of processes.

    Returns:
        Examples per process and forward pass, as close to the settings as possible, and forward
        passes per optimizer step; None if the examples cannot be shared out evenly.
    """
    share, rest = divmod(examples, processes)
    if rest:
        return None
    batch = next(b for b in range(train.per_device_train_batch_size, 0, -1) if share % b == 0)
    return batch, share // batch


def _misfit(folder: pathlib.Path, then: Manifest, settings: Settings, processes: int) -> str | None:
    """Return why this run cannot load the state of training in a checkpoint, or None."""
    if NUMBERS not in then.files:
        return "an earlier version wrote it, and its optimizer's state has no names"
    examples = read_state(folder).examples
    train = settings.train
    batch, passes = train.per_device_train_batch_size, train.gradient_accumulation_steps
    several = f"{processes} process{'es' * (processes > 1)}"
    product = f"{batch} per process x {several} x {passes} accumulation"
    now = f"{product} = {batch * processes * passes}"
    if batch * processes * passes == examples:
        return None
    if _batch_of_config(settings) != (batch, passes):
        return f"it had {examples} examples in an optimizer step, and this run has {now}"
    if fit_batch(train, examples, processes) is None:
        return f"{several} cannot share its {examples} examples of an optimizer step evenly"
    return None


def _batch_of_config(settings: Settings) -> tuple[int, int]:
    """Return batch size and accumulation in the config.yaml that a run has left."""
    path = pathlib.Path(settings.train.output_dir, "config.yaml")
    then = stored(str(path))["train"] if path.is_file() else settings.dump()["train"]
    return then["per_device_train_batch_size"], then["gradient_accumulation_steps"]


def with_advice(error: CheckpointError, folder: pathlib.Path) -> CheckpointError:
    """Return the error about a checkpoint that cannot be used, with what to do."""
    advice = f"To continue from the checkpoint before it, remove {folder}"
    return CheckpointError(f"{error}. {advice}")


def _check(folder: pathlib.Path, now: Manifest) -> Manifest:
    """Return the manifest of a checkpoint that a run with the manifest `now` may load.

    A damaged checkpoint, or one of another format, backbone or data, is a CheckpointError.
    """
    try:
        then = verify(folder)
    except CheckpointError as error:
        raise with_advice(error, folder) from None
    if then.backbone["fingerprint"] != now.backbone["fingerprint"]:
        raise CheckpointError(
            f"{folder}: trained on another backbone ({then.backbone['name']},"
            f" {str(then.backbone['fingerprint'])[:19]}…) than {now.backbone['name']} is now"
        )
    if then.data != now.data:
        raise CheckpointError(
            f"{folder}: trained on other data; a file has changed since. Use a new train.output_dir"
        )
    return then


def _different(settings: Settings) -> list[str]:
    """Return the settings that the run in output_dir depends on and that differ from it."""
    path = pathlib.Path(settings.train.output_dir, "config.yaml")
    if not path.is_file():
        return []
    try:
        then = stored(str(path))
    except ConfigError:
        advice = "put the run's config back, or choose another output_dir"
        raise ConfigError(f"train.resume: {path} is damaged; {advice}") from None
    return [
        f"{section}.{key}"
        for section, values in settings.dump().items()
        for key in (values | then[section])
        if (section != "train" or key in (*FIXED_IN_TRAINING.split(), "dataloader_drop_last"))
        and f"{section}.{key}" not in ANY
        and values.get(key) != then[section].get(key)
    ]


def changes(settings: Settings) -> list[str]:
    """Return the problems with continuing the run in output_dir under these settings.

    With `weights_only` the section `train` may differ.
    """
    if settings.train.resume == "never":
        return []
    try:
        keys = _different(settings)
    except ConfigError as error:
        return error.problems
    if settings.train.resume == "weights_only":
        keys = [key for key in keys if not key.startswith("train.")]
    if not keys:
        return []
    path = pathlib.Path(settings.train.output_dir, "config.yaml")
    advice = "resume with that config, or choose another output_dir"
    if all(key.startswith("train.") for key in keys):
        advice += ", or use train.resume=weights_only, which starts a new optimizer"
    return [f"train.resume: {path} has a different {', '.join(keys)}; {advice}"]


def how_to_continue(out: pathlib.Path) -> str:
    """Return from where a run that ends now could continue, for its last message."""
    if committed := checkpoints(out):
        return f"continue with train.resume=auto from {committed[-1]}"
    old = _newest_set_aside(out)
    start = f"from the weights of {old}" if old else "from the beginning"
    return f"no checkpoint was saved yet, so that train.resume=auto would start {start}"


def choose(
    settings: Settings, out: pathlib.Path, now: Manifest, names_by_rank: list[list[str]]
) -> tuple[pathlib.Path | None, pathlib.Path | None]:
    """Choose what a run continues from.

    Args:
        now: the manifest that this run would write.
        names_by_rank: the checkpoints that each process sees. Hosts with separate folders resume
            from the newest one that all of them have.

    Returns:
        The checkpoint to resume, and the one to take only the weights from; one or both are None.
    """
    if settings.train.resume == "never" or not out.is_dir():
        return None, None
    common = [path for path in checkpoints(out) if all(path.name in n for n in names_by_rank)]
    if not common and any(names_by_rank):
        ranks: dict[str, int] = {}  # one rank for each distinct list
        for rank, names in enumerate(names_by_rank):
            ranks.setdefault(", ".join(names) or "none", rank)
        lists = "; ".join(f"rank {rank}: {names}" for names, rank in ranks.items())
        raise ConfigError(f"train.resume: no checkpoint in {out} is on every host ({lists})")
    if not common:
        # A run that began from old weights may have ended before its first checkpoint.
        old = _newest_set_aside(out)
        if old is not None:
            _check(old, now)
        return None, old
    newest = common[-1]
    then = _check(newest, now)
    try:
        misfit = _misfit(newest, then, settings, len(names_by_rank))
        if settings.train.resume == "weights_only" and (misfit or _different(settings)):
            return None, newest
        if misfit:
            raise ConfigError(
                f"train.resume: {newest} cannot be continued here: {misfit}. Change that, or use"
                " train.resume=weights_only, which takes its trained weights and starts a new"
                " optimizer and schedule (the old run moves to before-N/)"
            )
        if read_state(newest).loss_scale is not None and not settings.train.fp16:
            raise CheckpointError(f"{newest} is of a run with train.fp16; set it to true")
        trainer_state(newest)
    except CheckpointError as error:
        raise with_advice(error, newest) from None
    best = trainer_state(newest)["best_global_step"]
    if best and best != _number(newest):
        try:
            _check(out / f"checkpoint-{best}", now)
        except CheckpointError as error:
            problem = str(error).partition(". To continue")[0]
            raise CheckpointError(
                f"{problem}. It was the best so far, and the run has to end with it: put it back,"
                " or start anew in another output_dir"
            ) from None
    return newest, None


def _stored(callbacks: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what Trainer has stored about a callback, from a state's `stateful_callbacks`."""
    entry = callbacks.get(name, {})
    return (entry or [{}])[-1] if isinstance(entry, list) else entry


def patience_used(callbacks: dict[str, Any]) -> int:
    """Return the evaluations without a better score, from a state's `stateful_callbacks`."""
    attributes = _stored(callbacks, "EarlyStoppingCallback").get("attributes", {})
    return attributes.get("early_stopping_patience_counter", 0)


def must_evaluate(callbacks: dict[str, Any]) -> bool:
    """Return whether a signal ended the evaluation of a checkpoint, from `stateful_callbacks`."""
    return bool(_stored(callbacks, "TrainerControl").get("args", {}).get("should_evaluate"))


def loss_sum(log: list[dict[str, Any]]) -> float:
    """Return the sum of the training loss over all steps, from a state's `log_history`."""
    total, last_step = 0.0, 0
    for line in log:
        if "loss" in line:
            total += line["loss"] * (line["step"] - last_step)
            last_step = line["step"]
    return total


def _numbered(out: pathlib.Path, name: re.Pattern[str]) -> list[pathlib.Path]:
    """Return the folders in `out` whose names match, by number."""
    if not out.is_dir():
        return []
    paths = [path for path in out.iterdir() if name.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=_number)


def set_aside(out: pathlib.Path) -> None:
    """Move everything that a run left into out/before-N/, so that a new run can start there."""
    folders = _numbered(out, SET_ASIDE)
    target = out / f"before-{_number(folders[-1]) + 1 if folders else 1}"
    target.mkdir()
    for path in list(out.iterdir()):
        stays = SET_ASIDE.fullmatch(path.name) or path.suffix in SCHEDULER_LOGS or path.name == LOCK
        if not stays:
            path.rename(target / path.name)


def _newest_set_aside(out: pathlib.Path) -> pathlib.Path | None:
    """Return the newest checkpoint that was set aside."""
    for folder in reversed(_numbered(out, SET_ASIDE)):
        if paths := checkpoints(folder):
            return paths[-1]
    return None
