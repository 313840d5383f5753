"""Runs the trials of a sweep that have no results yet, several at once, each as a process of launch/train.py on cores of its own.

    whole = Sweeper(sweep, trials, jobs).run()

A trial is done when its results.json is there; nothing else is remembered, so a sweep that was killed starts again where it was
(a run continues from its newest checkpoint). A run that ends without results is tried once more, then reported, and never
counted. Another sweep on the same folder takes other trials (scaleup.experiments.claims).

How many at once: as many as `jobs` allows, as cores suffice and as memory holds. What a run needs is measured by those that are
finished, and estimated (scaleup.memory.states) before. With GPUs each run has one to itself. Runs of other sweeps keep their cores and GPUs.
"""

import collections
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO

from scaleup.errors import ConfigError
from scaleup.experiments.claims import BEAT_S, Claims
from scaleup.experiments.grid import Trial, Sweep, same_run
from scaleup.experiments.machine import Places, Slot, available_bytes, needed_bytes
from scaleup.io import LOCK
from scaleup.training.resume import checkpoints

TRAIN = pathlib.Path(__file__).parents[2] / "launch" / "train.py"
TRIES = 2
STOP_S = 120  # for a run to finish its step and save
POLL_S = 0.2
MARGIN = 1.1  # on memory that was measured
LOG = "train.out"  # a suffix that a run takes for a scheduler's, not for somebody's file

# The run's process waits until the sweep has written its number into the claim, and ends if the sweep is gone by then: there is
# never a run that no claim knows of. Then it becomes launch/train.py, on its own cores.
START = """
import os, sys
cores = [int(core) for core in sys.argv[1].split(",") if core]
if not sys.stdin.buffer.read(1):
    sys.exit(1)
if cores:
    os.sched_setaffinity(0, cores)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@dataclasses.dataclass
class Running:
    """A run in its place. locks: of the place. since: of time.monotonic, s. goes_on: from a checkpoint of an earlier start."""

    trial: Trial
    slot: Slot
    locks: list[IO]
    process: subprocess.Popen
    since: float
    goes_on: bool

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since

    def kill(self) -> None:
        """At once, with whatever it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)


class Measured:
    """What finished runs took, to tell what others will take."""

    SIMILAR = (
        ("method", "task", "k"),
        ("task", "k"),
        ("k",),
        (),
    )  # the nearest that have finished count

    def __init__(self) -> None:
        self.seconds: dict[tuple, list[float]] = {}
        self.memory_mib: dict[tuple, float] = {}

    def add(self, trial: Trial, seconds: float | None = None, whole: bool = True) -> None:
        """A finished one. seconds: with its start-up, where it was watched; whole: from its first step on. One that was killed before it
        noted its time, or whose note was lost with the power, tells nothing."""
        try:
            timing = json.loads((trial.folder / "timing.json").read_text(encoding="utf-8"))
            noted, memory_mib = float(timing["seconds"]), float(timing["peak_memory_mib"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return
        for axes in self.SIMILAR if whole else ():
            self.seconds.setdefault(_key(trial, axes), []).append(
                noted if seconds is None else seconds
            )
        key = _key(trial, self.SIMILAR[0])
        self.memory_mib[key] = max(self.memory_mib.get(key, 0), memory_mib)

    def expected(self, trial: Trial) -> float | None:
        """Seconds; None before any has finished."""
        times = next(
            (
                self.seconds[key]
                for axes in self.SIMILAR
                if (key := _key(trial, axes)) in self.seconds
            ),
            None,
        )
        return sum(times) / len(times) if times else None

    def need(self, trial: Trial) -> int | None:
        """Bytes, from runs that differ in the seed only."""
        found = self.memory_mib.get(_key(trial, self.SIMILAR[0]))
        return int(MARGIN * found * 2**20) if found is not None else None


class Sweeper:
    """One sweep on one machine."""

    def __init__(
        self,
        sweep: Sweep,
        trials: Sequence[Trial],
        jobs: int | None = None,
        say: Callable[[str], None] = print,
        show: Callable[[str], None] = lambda line: None,
        entry: pathlib.Path = TRAIN,
    ):
        """trials: those of the sweep to run here. jobs: most at once. say: hears what happens; show: the line of progress, often.
        entry: the script that is started with a trial's arguments. Raises OSError where the output cannot be written."""
        self.sweep, self.trials, self.say, self.show, self.entry = (
            sweep,
            list(trials),
            say,
            show,
            entry,
        )
        self.claims = Claims(sweep.output)
        self.places = Places(jobs, sweep.threads)
        self.on_gpus = self.places.slots[0].gpu is not None
        self.waiting = collections.deque(
            sorted(self.trials, key=lambda trial: not trial.finished)
        )  # what is done is counted at once
        self.running: list[Running] = []
        self.done: set[str] = set()
        self.elsewhere: list[Trial] = []
        self.failed: dict[str, str] = {}
        self.tries: collections.Counter[str] = collections.Counter()
        self.measured = Measured()
        self.estimates: dict[str, int] = {}
        self.short = ""  # what keeps further runs from starting
        self.last_beat = 0.0
        self.stopping: signal.Signals | None = None
        for trial in sweep.trials:
            if trial.finished:
                self.measured.add(trial)

    def run(self) -> bool:
        """Until every trial is done, has failed for good or belongs to another sweep. True if all are done, here or there."""
        before = {
            number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            while not self.stopping and (self.waiting or self.running or self._look_elsewhere()):
                self._beat()
                self._reap()
                self._start_what_fits()
                self.show(self.progress())
                time.sleep(POLL_S)
            if self.stopping:
                self._end_all()
        finally:
            for run in self.running:  # after an error of our own
                run.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        return (
            not self.failed
            and not self.stopping
            and all(trial.finished for trial in self.elsewhere)
        )

    def progress(self) -> str:
        """One line: what is done, what runs, and for how long still."""
        left, running = (
            self.seconds_left(),
            ", ".join(f"{run.trial.name} {duration(run.seconds)}" for run in self.running),
        )
        parts = [
            f"{len(self.done)}/{len(self.trials)} done",
            "time left not known yet" if left is None else f"about {duration(left)} left",
        ]
        parts += [f"{len(self.failed)} failed"] * bool(self.failed) + [
            f"{len(self.elsewhere)} elsewhere"
        ] * bool(self.elsewhere)
        return "; ".join(
            [
                *parts,
                *([self.short] if self.short else []),
                f"{len(self.running)} running" + f" ({running})" * bool(running),
            ]
        )

    def seconds_left(self) -> float | None:
        """By the mean of the most similar runs that have finished; None before the first."""
        if not self.measured.seconds:
            return None
        left = [max(self.measured.expected(run.trial) - run.seconds, 0) for run in self.running]
        left += [self.measured.expected(trial) for trial in self.waiting if not trial.finished]
        return max(
            sum(left) / (max(len(self.running), 1) if self.short else self.places.count),
            max(left, default=0),
        )

    def _start_what_fits(self) -> None:
        before = self.short
        self._start_each()
        if (
            self.short and not before and not self.running
        ):  # a log would not tell waiting from working
            self.say(f"waiting: {self.short}")

    def _start_each(self) -> None:
        self.short = ""
        while self.waiting and len(self.running) < self.places.count and not self.stopping:
            trial, place = self.waiting[0], None
            if not trial.finished:
                if not self._fits(trial):
                    self.short = "no memory for more"
                    return
                place = self.places.take()
                if place is None:
                    self.short = "other sweeps' runs have the rest of the machine"
                    return
            self.waiting.popleft()
            if not self.claims.take(trial.name):
                self.elsewhere.append(trial)
            elif why := self._stranger(trial):
                self.claims.release(trial.name)
                self.say(f"{trial.name}: {why}")
                self.failed[trial.name] = why
            elif trial.finished:  # perhaps by a sweep that was killed before it could tidy up
                self._finish(trial)
            else:
                self._start(trial, *place)
                continue
            for file in place[1] if place else ():
                file.close()

    def _stranger(self, trial: Trial) -> str:
        """Why what another sweep has left in the trial's folder since the start is not this trial's; nothing if it is."""
        try:
            same_run(trial.settings, trial.folder)
        except ConfigError as error:
            return "; ".join(error.problems)
        return ""

    def _start(self, trial: Trial, slot: Slot, locks: list[IO]) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.sweep.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment |= {"CUDA_VISIBLE_DEVICES": slot.gpu} if slot.gpu is not None else {}
        trial.folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-c",
            START,
            ",".join(map(str, slot.cores)),
            str(self.entry),
            *trial.arguments,
        ]
        with (trial.folder / LOG).open("ab") as log:
            # A group of its own: Ctrl-C is meant for the sweep, which then asks its runs to save.
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,
                pass_fds=[file.fileno() for file in locks],
            )
        self.tries[trial.name] += 1
        self.places.note(locks, process.pid, self._need(trial))
        self.running.append(
            Running(trial, slot, locks, process, time.monotonic(), bool(checkpoints(trial.folder)))
        )
        self.claims.hand_over(trial.name, process.pid)
        try:
            process.stdin.write(b"g")
            process.stdin.close()
        except BrokenPipeError:  # it was killed already; its exit code will tell
            pass

    def _reap(self) -> None:
        for run in [run for run in self.running if run.process.poll() is not None]:
            self.running.remove(run)
            for file in run.locks:
                file.close()
            trial, code = run.trial, run.process.returncode
            if trial.finished:
                self._finish(trial)
                self.measured.add(trial, run.seconds, not run.goes_on)
                self.say(f"{trial.name}: done in {duration(run.seconds)}; {self.progress()}")
                continue
            self.claims.release(trial.name)
            why = f"{_ended(code)}: {_last_line(trial.folder / LOG)}"
            if self.stopping:
                continue
            if self.tries[trial.name] < TRIES:
                self.say(f"{trial.name}: {why}; it will be tried once more")
                self.waiting.append(trial)
            else:
                self.say(f"{trial.name}: failed again, {why}; see {trial.folder / LOG}")
                self.failed[trial.name] = why

    def _beat(self) -> None:
        """Tells sweeps on other hosts that this one lives."""
        if time.monotonic() - self.last_beat > BEAT_S:
            self.last_beat = time.monotonic()
            self.claims.beat([run.trial.name for run in self.running])

    def _finish(self, trial: Trial) -> None:
        if self.claims.own(trial.name):
            tidy(trial.folder, self.sweep.keep)
        self.claims.release(trial.name)
        self.done.add(trial.name)

    def _look_elsewhere(self) -> bool:
        """Whether to go on for trials that others have. A run whose sweep was killed comes to us; those of a live sweep do not."""
        wait = False
        for trial in list(self.elsewhere):
            claim = self.claims.of(trial.name)
            if claim is None or not claim.live:
                self.elsewhere.remove(trial)
                self.waiting.append(trial)
                wait = True
            elif claim.orphan:
                wait = True
        return wait

    def _fits(self, trial: Trial) -> bool:
        """Whether memory suffices for one more beside what the runs on this machine have not taken yet; where none runs nothing would
        become free, and it is tried."""
        to_come = self.places.to_come()
        return to_come is None or self._need(trial) + to_come <= available_bytes()

    def _need(self, trial: Trial) -> int:
        """Bytes on the host. What a run measures on a GPU is the GPU's memory, of which each run has its own."""
        found = self.measured.need(trial) if not self.on_gpus else None
        if found is None and trial.method not in self.estimates:
            self.estimates[trial.method] = needed_bytes(trial.settings)
        return found if found is not None else self.estimates[trial.method]

    def _stop(self, number: int, frame: object) -> None:
        if self.stopping:  # asked twice: at once
            for run in self.running:
                run.kill()
        self.stopping = signal.Signals(number)

    def _end_all(self) -> None:
        """Asks every run to save and end, waits, and kills what does not."""
        self.say(
            f"stopping: {len(self.running)} running, which finish their step and save (at most {STOP_S} s; ask again: at once)"
        )
        for run in self.running:
            run.process.terminate()
        deadline = time.monotonic() + STOP_S
        while self.running:
            if time.monotonic() > deadline:
                for run in self.running:
                    run.kill()
            time.sleep(POLL_S)
            self._reap()
        self.say(f"stopped by {self.stopping.name}; the same command continues")


def tidy(folder: pathlib.Path, keep: bool | str) -> None:
    """Removes from a finished run's folder its lock, and the checkpoints and bundles that the sweep's `keep` does not ask for."""
    bundles = (
        []
        if keep is True
        else [*checkpoints(folder), folder / "final"] + [folder / "best"] * (keep is False)
    )
    for path in bundles:
        if path.is_dir():
            shutil.rmtree(path)
    (folder / LOCK).unlink(missing_ok=True)


def duration(seconds: float) -> str:
    """35 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _key(trial: Trial, axes: tuple[str, ...]) -> tuple:
    return tuple((axis, getattr(trial, axis)) for axis in axes)


def _ended(code: int) -> str:
    if code == 0:
        return "it ended without results"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last_line(path: pathlib.Path) -> str:
    lines = [
        line.strip()
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    return lines[-1].removeprefix("- ")[:200] if lines else "it said nothing"
