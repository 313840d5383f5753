"""Run the trials of a sweep that have no results yet, several at a time.

`Sweeper(sweep, trials, jobs=2).run()` starts each trial as a process of the training command.
A trial is finished when its results.json exists; nothing else is remembered. A sweep that was
killed therefore continues where it was, and each trial continues from its newest checkpoint. A
trial that ends without results is tried once more.

Sweeps on the same folder share its trials. While a sweep runs a trial, it holds a file lock in
OUTPUT/.locks, and the training process holds the lock of its own folder. If only the latter is
held, the sweep that started the trial was killed, and this one waits for the trial to end.
"""

import collections
import dataclasses
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from filelock import FileLock, Timeout

from scaleup.errors import ConfigError
from scaleup.experiments import results
from scaleup.experiments.grid import Sweep, Trial, check_same_run, different
from scaleup.experiments.runs import Run
from scaleup.io import LOCK, read_json
from scaleup.settings.loading import flat, override
from scaleup.settings.schema import stored
from scaleup.training.resume import checkpoints
from scaleup.training.signals import SAVE_SIGNALS, handle_save_signals

# -P: files of the current folder do not shadow modules.
TRAIN = (sys.executable, "-P", "-m", "scaleup", "train")
ROOT = pathlib.Path(__file__).parents[2]  # the folder from which scaleup was imported
TRIES = 2
STOP_S = 120  # time for a trial to finish its step and save
POLL_S = 0.2
LOG = "train.out"  # training ignores files with this suffix in its output folder


@dataclasses.dataclass
class Running:
    """A trial that runs now. `resumed`: it continues from a checkpoint of an earlier start."""

    trial: Trial
    process: subprocess.Popen[bytes]
    lock: FileLock
    start: float
    resumed: bool

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def kill(self) -> None:
        """Kill the process and all processes that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)


class Sweeper:
    """Run some trials of a sweep on this machine.

    Args:
        sweep: the checked sweep.
        trials: those of its trials to run here.
        jobs: the number of trials to run at a time. With GPUs, the trial in slot j sees the j-th
            visible GPU only.
        say: prints lines that should stay on the screen.
        show: prints the progress line, several times a second.
        command: the training command, to which a trial's arguments are added.
    """

    def __init__(
        self,
        sweep: Sweep,
        trials: Sequence[Trial],
        jobs: int = 1,
        say: Callable[[str], None] = print,
        show: Callable[[str], None] = lambda line: None,
        command: Sequence[str] = TRAIN,
    ):
        self.sweep, self.trials, self.jobs = sweep, list(trials), jobs
        self.say, self.show, self.command = say, show, command
        self.gpus = visible_gpus()
        self.waiting = collections.deque(sorted(trials, key=lambda trial: not trial.finished))
        self.running: dict[int, Running] = {}  # slot → what runs there
        self.done: set[str] = set()
        self.elsewhere: list[Trial] = []  # trials that another sweep runs
        self.failed: dict[str, str] = {}  # name → reason
        self.tries: collections.Counter[str] = collections.Counter()
        self.seconds: list[float] = []  # of finished trials
        self.stopping: signal.Signals | None = None
        for trial in sweep.trials:
            if trial.finished:
                self.seconds += _noted_seconds(trial.folder)
        self.locks = sweep.output / ".locks"
        self.locks.mkdir(parents=True, exist_ok=True)

    def run(self) -> bool:
        """Run until each trial is finished, has failed twice, or belongs to another sweep.

        Return whether all trials have results, from this sweep or from another one.
        """
        handlers = {n: signal.getsignal(n) for n in (*SAVE_SIGNALS, signal.SIGINT)}
        handle_save_signals(self._stop)
        signal.signal(signal.SIGINT, self._stop)
        try:
            while not self.stopping:
                self._collect_finished()
                self._fill_slots()
                self.show(self.progress())
                if not self.running and len(self.waiting) == len(self.elsewhere):
                    break
                time.sleep(POLL_S)
            if self.stopping:
                self._stop_trials()
        finally:
            self._kill_trials()  # trials still run here only after an exception
            for number, handler in handlers.items():
                signal.signal(number, handler)
        finished = all(trial.finished for trial in self.trials)
        return finished and not self.failed and not self.stopping

    def progress(self) -> str:
        """Describe in one line what is done, what runs, and how much time is left."""
        left = self.seconds_left()
        time_left = "time left not known yet" if left is None else f"about {duration(left)} left"
        names = [f"{run.trial.name} {duration(run.seconds)}" for run in self.running.values()]
        parts = [
            f"{len(self.done)}/{len(self.trials)} done",
            time_left,
            f"{len(self.failed)} failed" if self.failed else "",
            f"{len(self.elsewhere)} elsewhere" if self.elsewhere else "",
            f"{len(names)} running" + (f" ({', '.join(names)})" if names else ""),
        ]
        return "; ".join(filter(None, parts))

    def seconds_left(self) -> float | None:
        """Estimate the time left from finished trials; None before the first has finished."""
        if not self.seconds:
            return None
        mean = statistics.mean(self.seconds)
        left = [max(mean - run.seconds, 0.0) for run in self.running.values()]
        left += [mean for trial in self.waiting if not trial.finished]
        return max(sum(left) / self.jobs, max(left, default=0.0))

    def _fill_slots(self) -> None:
        """Start trials until all slots are taken or no waiting trial is free."""
        self.elsewhere = []
        for _ in range(len(self.waiting)):
            if len(self.running) == self.jobs or self.stopping:
                return
            trial = self.waiting.popleft()
            lock = FileLock(self.locks / f"{trial.name}.lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                self.elsewhere.append(trial)
                self.waiting.append(trial)
                continue
            if not self._take(trial, lock):
                lock.release()

    def _take(self, trial: Trial, lock: FileLock) -> bool:
        """Start a trial unless it needs no start; return whether it runs now."""
        try:
            check_same_run(trial.settings, trial.folder)  # another sweep may have written there
        except ConfigError as error:
            self.failed[trial.name] = "; ".join(error.problems)
            self.say(f"{trial.name}: {self.failed[trial.name]}")
            return False
        if trial.folder.is_dir() and _runs_without_sweep(trial.folder):
            self.waiting.append(trial)
            return False
        if trial.finished:
            self._finish(trial)
            return False
        slot = min(set(range(self.jobs)) - self.running.keys())
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.sweep.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(":"),
        }
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        trial.folder.mkdir(parents=True, exist_ok=True)
        resumed = bool(checkpoints(trial.folder))
        with (trial.folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                [*self.command, *trial.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,  # Ctrl-C reaches the sweep only, which asks its trials to save
            )
        self.tries[trial.name] += 1
        self.running[slot] = Running(trial, process, lock, time.monotonic(), resumed)
        return True

    def _collect_finished(self) -> None:
        for slot, run in list(self.running.items()):
            code = run.process.poll()
            if code is None:
                continue
            del self.running[slot]
            trial, log = run.trial, run.trial.folder / LOG
            if trial.finished:
                self._finish(trial)
                if not run.resumed:
                    self.seconds.append(run.seconds)
                self.say(f"{trial.name}: done in {duration(run.seconds)}; {self.progress()}")
            elif not self.stopping:
                reason = f"{_describe_exit(code)}: {_last_line(log)}"
                if self.tries[trial.name] < TRIES:
                    self.say(f"{trial.name}: {reason}; it will be tried once more")
                    self.waiting.append(trial)
                else:
                    self.say(f"{trial.name}: failed again, {reason}; see {log}")
                    self.failed[trial.name] = reason
            run.lock.release()

    def _finish(self, trial: Trial) -> None:
        tidy(trial.folder, self.sweep.keep)
        self.done.add(trial.name)

    def _kill_trials(self) -> None:
        for run in self.running.values():
            run.kill()

    def _stop(self, number: int, frame: object) -> None:
        if self.stopping == number:  # at the end of a session, SIGTERM and SIGHUP come together
            self._kill_trials()
        self.stopping = signal.Signals(number)

    def _stop_trials(self) -> None:
        """Ask all trials to save and end; kill those that take too long."""
        assert self.stopping is not None
        self.say(
            f"stopping: {len(self.running)} running trials finish their step and save "
            f"(at most {STOP_S} s; ask again to kill them)"
        )
        for run in self.running.values():
            run.process.terminate()
        deadline = time.monotonic() + STOP_S
        while self.running:
            if time.monotonic() > deadline:
                self._kill_trials()
            time.sleep(POLL_S)
            self._collect_finished()
        self.say(f"stopped by {self.stopping.name}; the same command continues")


def visible_gpus() -> list[str]:
    """Return the GPUs of this process as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    return names.split(",")[:count]


def tidy(folder: pathlib.Path, keep: bool | str) -> None:
    """Remove the lock of a finished trial, and the checkpoints that `keep` does not ask for."""
    removed = [] if keep is True else [*checkpoints(folder), folder / "final"]
    if keep is False:
        removed.append(folder / "best")
    for path in removed:
        if path.is_dir():
            shutil.rmtree(path)
    (folder / LOCK).unlink(missing_ok=True)


def recorded(sweep: Sweep, tables: Sequence[str]) -> dict[str, Run]:
    """Return the trials that earlier sweeps have run, by name, from their tables.

    Raises:
        ConfigError: for a damaged table, and for a trial with other settings than in this sweep.
    """
    trials = {trial.name: trial for trial in sweep.trials}
    runs = {run.folder.name: run for run in results.load(tables) if run.folder.name in trials}
    problems = []
    for name, run in runs.items():
        words = [override(key, value) for key, value in run.settings.items()]
        other = different(trials[name].settings, flat(stored(None, words)))
        if other:
            problems.append(
                f"--done: {run.folder} has a different {', '.join(other)}; leave it out"
            )
    if problems:
        raise ConfigError(problems)
    return runs


def save_table(sweep: Sweep, earlier: Mapping[str, Run] | None = None) -> pathlib.Path:
    """Write OUTPUT/results.csv with one row per finished trial; return its path.

    Args:
        earlier: trials that were run elsewhere, by name. Their rows come first.
    """
    path, runs = sweep.output / "results.csv", dict(earlier or {})
    with FileLock(sweep.output / ".locks" / "results.csv.lock"):
        if not runs or any(trial.finished for trial in sweep.trials):
            runs |= {run.folder.name: run for run in results.load([str(sweep.output)])}
        results.write_csv(list(runs.values()), path)
    return path


def _noted_seconds(folder: pathlib.Path) -> list[float]:
    """Return the time that a run noted; nothing if it was killed before it did."""
    try:
        return [float(read_json(folder / "timing.json")["seconds"])]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def duration(seconds: float) -> str:
    """Return a time as 35 s, 12 min or 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _runs_without_sweep(folder: pathlib.Path) -> bool:
    """Tell whether a training process holds the folder's lock."""
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True


def _describe_exit(code: int) -> str:
    if code == 0:
        return "ended without results"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last_line(path: pathlib.Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    text = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return text.removeprefix("- ")[:200]
