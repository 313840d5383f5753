"""Runs a grid of method × task × K × data seed, several runs at once; goes on where an earlier start of it stopped.

    python launch/sweep.py configs/sweeps/minilm.yaml --jobs 2 --only 'cola-*' train.num_train_epochs=5

The file is described in scaleup/grid.py. Every run's config is checked before the first one starts. Exit codes: 0 all done, or stopped
by SIGTERM and saved (SCALEUP_EXIT_STOPPED: that code instead); 1 some runs are missing: failed twice, or another sweep's; 2 something must change (one message with
everything); 130 interrupted.
"""

import argparse
import os
import pathlib
import shutil
import signal
import sys
import warnings


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from scaleup import errors  # noqa: E402
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings(
    "ignore", category=FutureWarning, module="torch.distributed"
)  # between torch and DeepSpeed


class Screen:
    """Lines that stay, and below them one that changes. Without a terminal only the former."""

    def __init__(self) -> None:
        self.shown, self.terminal = "", sys.stdout.isatty()

    def say(self, line: str) -> None:
        print(("\r\033[K" if self.shown else "") + line, flush=True)
        self.shown = ""

    def show(self, line: str) -> None:
        line = line[: shutil.get_terminal_size().columns - 1]
        if self.terminal and line != self.shown:
            print(f"\r\033[K{line}", end="", flush=True)
            self.shown = line


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", help="the sweep, a YAML file")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="most runs at once (default: what cores and memory allow)",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only trials with such a name, like 'cola-100-*' (repeatable)",
    )
    parser.add_argument(
        "--shard",
        metavar="i/n",
        help="the i-th of n parts of the grid, i from 1 on: for arrays of jobs",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check every config, say what is done and what is missing, and stop",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings of every run, over everything in the file",
    )
    options = parser.parse_intermixed_args()
    try:
        return _run(options)
    except OSError as error:
        print(
            f"error: {error.strerror or error}{': ' + str(error.filename) if error.filename else ''}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace) -> int:
    from transformers.utils import logging

    from scaleup.experiments import grid, machine, sweep

    logging.set_verbosity_error()
    screen = Screen()
    try:
        if options.jobs is not None and options.jobs < 1:
            raise errors.ConfigError(f"--jobs: {options.jobs} runs at once; it takes at least 1")
        checked = grid.load(options.file, options.overrides)
        trials = grid.select(checked.trials, options.only, options.shard)
        missing = [trial for trial in trials if not trial.finished]
        places = machine.Places(options.jobs, checked.threads)
        screen.say(
            f"sweep      {options.file}: {len(checked.trials)} runs, {len(trials)} of them here, {len(trials) - len(missing)} done"
        )
        screen.say(
            f"machine    {places.count} at once, {checked.threads} core{'s' * (checked.threads > 1)} each, while memory holds"
        )
        screen.say(f"output     {checked.output}")
        if options.dry_run:
            for trial in missing:
                print(f"missing    {trial.name}")
            return 0
        sweeper = sweep.Sweeper(checked, trials, options.jobs, screen.say, screen.show)
        whole = sweeper.run()
    except errors.ConfigError as error:
        count = len(error.problems)
        print(
            f"error: {count} problem{'s' * (count > 1)}:"
            + "".join(f"\n  - {p}" for p in error.problems),
            file=sys.stderr,
        )
        return 2
    if sweeper.stopping is None:
        screen.say(sweeper.progress())
    if sweeper.elsewhere:
        screen.say(
            f"elsewhere  {', '.join(trial.name for trial in sweeper.elsewhere)}: another sweep has them ({checked.output / '.claims'})"
        )
    for name, why in sweeper.failed.items():
        print(f"failed     {name}: {why}", file=sys.stderr)
    if sweeper.stopping is not None:
        return (
            130
            if sweeper.stopping == signal.SIGINT
            else int(os.environ.get("SCALEUP_EXIT_STOPPED", "0"))
        )
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
