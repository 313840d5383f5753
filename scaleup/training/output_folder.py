"""The output folder of a run: what may lie there before the run starts."""

import errno
import os
import pathlib
import re

from scaleup.io import LOCK
from scaleup.settings.schema import TrainSettings

# Files that the scheduler of a cluster writes into the folder of a run.
SCHEDULER_LOGS = (".out", ".err")
# Unfinished or outdated parts of a run, and probes for a folder that hosts share. A run may remove
# these; other hidden files belong to the user.
LEFTOVERS = re.compile(
    r"\.(checkpoint-\d+|best|final)\.(old|draft|gone)|\.\w+\.(yaml|jsonl?)\.part|\.probe-[0-9a-f]+"
)
SET_ASIDE = re.compile(r"before-(\d+)")  # results of a run that continued with other settings


def has_long_name(path: pathlib.Path) -> bool:
    """Return whether file systems refuse a part of a path, which shows late if no parent exists."""
    return any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in path.parts)


def output_folder_problems(train: TrainSettings) -> list[str]:
    """Check that a run can write into its folder and overwrites nothing there."""
    if "\0" in train.output_dir:
        return ["train.output_dir: a path cannot hold a null character"]
    folder = pathlib.Path(train.output_dir)
    if has_long_name(folder):
        return [f"train.output_dir: cannot be used: {os.strerror(errno.ENAMETOOLONG)}"]
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not nearest.is_dir():
            return [f"train.output_dir: {nearest} is a file"]
        if not os.access(nearest, os.W_OK | os.X_OK):
            return [f"train.output_dir: {nearest} cannot be written to"]
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        # A run that died before its first checkpoint leaves files too, which count.
        names = [name for name in names if name != LOCK and not LEFTOVERS.fullmatch(name)]
        if names and train.resume == "never":
            advice = "choose another, or set train.resume=auto to continue that run"
            return [f"train.output_dir: {folder} is not empty; {advice}"]
        others = [name for name in names if pathlib.Path(name).suffix not in SCHEDULER_LOGS]
        if others and not (folder / "config.yaml").is_file():
            problem = f"holds {others[0]} but no run (no config.yaml); choose another"
            return [f"train.output_dir: {folder} {problem}"]
    except OSError as error:
        return [f"train.output_dir: cannot be used: {error.strerror}"]
    return []
