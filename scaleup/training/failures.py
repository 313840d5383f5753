"""What a run says when it cannot go on: what remains, and what to do."""

import pathlib
import shutil

from scaleup.io import NO_SPACE, write_problem
from scaleup.training import resume


def last_good(out: pathlib.Path) -> str:
    """Return a sentence about the checkpoint that remains if a run fails."""
    kept = resume.checkpoints(out)
    return f"The last good checkpoint is {kept[-1]}" if kept else "There is no earlier checkpoint"


def write_failure(folder: pathlib.Path, error: Exception) -> str:
    """Return why a checkpoint could not be written, what remains, and what to do."""
    cause, cure = write_problem(error), "Solve this"
    if shutil.disk_usage(folder.parent).free < 2**20:  # torch reports "unexpected pos"
        cause = "the disk is full"
    if cause == "the disk is full" or getattr(error, "errno", None) in NO_SPACE:
        cure = "Free space"
    elif "ulimit" in cause:
        cure = "Raise the limit"
    again = f"{cure} and run the same command with train.resume=auto"
    return f"{folder} could not be written: {cause}. {last_good(folder.parent)}. {again}"
