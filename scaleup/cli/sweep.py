"""Run a grid of method × task × training set size × data seed.

    scaleup sweep configs/sweeps/minilm.yaml --jobs 2 --only 'cola-*' train.num_train_epochs=5

The file is described in scaleup/experiments/grid.py. Every run's config is checked before the first
run starts. A sweep that was stopped goes on where it stopped when it is started again. Several
sweeps on one folder share its trials. On a cluster, use --shard in a job array. Each sweep finally
writes OUTPUT/results.csv with one row per finished trial, which `scaleup report` reads. With
--done TABLE.csv a sweep also goes on where another machine stopped.

Exit codes: 0 all runs are done, or the sweep was stopped by SIGTERM, SIGUSR1 or SIGHUP and saved
(SCALEUP_EXIT_STOPPED can name another code); 1 some runs are missing, because they failed twice or
another sweep has them, or the table could not be made; 2 something must change (one message lists
everything); 130 interrupted.
"""

import argparse
import contextlib
import shutil
import signal
import sys

from scaleup.cli.exit_codes import DONE, FAILED, INTERRUPTED, print_line, stopped_code
from scaleup.errors import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add = parser.add_argument
    add("file", help="YAML file of the sweep")
    jobs = "number of trials to run at a time (default: 1); with GPUs each has its own"
    add("--jobs", type=int, default=1, metavar="N", help=jobs)
    only = "only trials with such a name, like 'cola-100-*' (repeatable)"
    add("--only", action="append", default=[], metavar="PATTERN", help=only)
    add("--shard", metavar="i/n", help="the i-th of n parts of the grid, from 1, for job arrays")
    done = "table of an earlier sweep; its trials are not run again (repeatable)"
    add("--done", action="append", default=[], metavar="TABLE.csv", help=done)
    dry_run = "check every config, say what is done and what is missing, and exit"
    add("--dry-run", action="store_true", help=dry_run)
    overrides = "settings of every run, which override everything in the file"
    add("overrides", nargs="*", metavar="section.key=value", help=overrides)


class Screen:
    """Lines that stay and, on a terminal, a last line that changes.

    A sweep goes on without its screen, which may be closed: trials write their own logs.
    """

    def __init__(self) -> None:
        self.shown = ""
        self.terminal = sys.stdout is not None and sys.stdout.isatty()  # None: closed by >&-

    def say(self, line: str) -> None:
        """Print a line that stays."""
        with contextlib.suppress(OSError):
            print(("\r\033[K" if self.shown else "") + line, flush=True)
        self.shown = ""

    def show(self, line: str) -> None:
        """Replace the last line."""
        line = line[: shutil.get_terminal_size().columns - 1]
        if self.terminal and line != self.shown:
            with contextlib.suppress(OSError):
                print(f"\r\033[K{line}", end="", flush=True)
            self.shown = line


def run(options: argparse.Namespace) -> int:
    """Run the trials that are missing. Returns the exit code."""
    from scaleup.experiments import grid, sweep

    screen = Screen()
    if options.jobs < 1:
        raise ConfigError(f"--jobs: {options.jobs} runs at once; the minimum is 1")
    checked = grid.load(options.file, options.overrides)
    trials = grid.select(checked.trials, options.only, options.shard)
    earlier = sweep.recorded(checked, options.done)
    missing = [trial for trial in trials if not trial.finished and trial.name not in earlier]
    screen.say(
        f"sweep      {options.file}: {len(checked.trials)} runs, {len(trials)} of them here, "
        f"{len(trials) - len(missing)} done"
    )
    threads = f"{checked.threads} thread{'s' * (checked.threads > 1)}"
    screen.say(f"machine    {options.jobs} at a time, {threads} each")
    screen.say(f"output     {checked.output}")
    if options.dry_run:
        for trial in missing:
            print(f"missing    {trial.name}")
        return DONE
    trials = [trial for trial in trials if trial.name not in earlier]
    sweeper = sweep.Sweeper(checked, trials, options.jobs, screen.say, screen.show)
    complete = sweeper.run()
    if sweeper.stopping is None:
        screen.say(sweeper.progress())
    if sweeper.elsewhere:
        names = ", ".join(trial.name for trial in sweeper.elsewhere)
        screen.say(f"elsewhere  {names}: another sweep runs them")
    for name, why in sweeper.failed.items():
        print_line(f"failed     {name}: {why}")
    try:
        screen.say(f"table      {sweep.save_table(checked, earlier)}")
    except ConfigError as error:
        screen.say(f"table      not written: {error.problems[0]}")
        complete = False
    if sweeper.stopping is not None:
        return INTERRUPTED if sweeper.stopping == signal.SIGINT else stopped_code()
    return DONE if complete else FAILED
