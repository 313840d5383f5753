"""Runs the cells of a sweep that have no results yet, several at once, each as a process of launch/train.py on cores of its own.

    whole = Sweeper(sweep, cells, jobs).run()

A cell is done when its results.json is there; nothing else is remembered, so a sweep that was killed starts again where it was
(a run continues from its newest checkpoint). A run that ends without results is tried once more, then reported, and never
counted. Another sweep on the same folder takes other cells (scaleup.experiments.claims).

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
from scaleup.experiments.grid import Cell, Sweep, same_run
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

    cell: Cell
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

    def add(self, cell: Cell, seconds: float | None = None, whole: bool = True) -> None:
        """A finished one. seconds: with its start-up, where it was watched; whole: from its first step on. One that was killed before it
        noted its time, or whose note was lost with the power, tells nothing."""
        try:
            timing = json.loads((cell.folder / "timing.json").read_text(encoding="utf-8"))
            noted, memory_mib = float(timing["seconds"]), float(timing["peak_memory_mib"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return
        for axes in self.SIMILAR if whole else ():
            self.seconds.setdefault(_key(cell, axes), []).append(
                noted if seconds is None else seconds
            )
        key = _key(cell, self.SIMILAR[0])
        self.memory_mib[key] = max(self.memory_mib.get(key, 0), memory_mib)

    def expected(self, cell: Cell) -> float | None:
        """Seconds; None before any has finished."""
        times = next(
            (
                self.seconds[key]
                for axes in self.SIMILAR
                if (key := _key(cell, axes)) in self.seconds
            ),
            None,
        )
        return sum(times) / len(times) if times else None

    def need(self, cell: Cell) -> int | None:
        """Bytes, from runs that differ in the seed only."""
        found = self.memory_mib.get(_key(cell, self.SIMILAR[0]))
        return int(MARGIN * found * 2**20) if found is not None else None


class Sweeper:
    """One sweep on one machine."""

    def __init__(
        self,
        sweep: Sweep,
        cells: Sequence[Cell],
        jobs: int | None = None,
        say: Callable[[str], None] = print,
        show: Callable[[str], None] = lambda line: None,
        entry: pathlib.Path = TRAIN,
    ):
        """cells: those of the sweep to run here. jobs: most at once. say: hears what happens; show: the line of progress, often.
        entry: the script that is started with a cell's arguments. Raises OSError where the output cannot be written."""
        self.sweep, self.cells, self.say, self.show, self.entry = (
            sweep,
            list(cells),
            say,
            show,
            entry,
        )
        self.claims = Claims(sweep.output)
        self.places = Places(jobs, sweep.threads)
        self.on_gpus = self.places.slots[0].gpu is not None
        self.waiting = collections.deque(
            sorted(self.cells, key=lambda cell: not cell.finished)
        )  # what is done is counted at once
        self.running: list[Running] = []
        self.done: set[str] = set()
        self.elsewhere: list[Cell] = []
        self.failed: dict[str, str] = {}
        self.tries: collections.Counter[str] = collections.Counter()
        self.measured = Measured()
        self.estimates: dict[str, int] = {}
        self.short = ""  # what keeps further runs from starting
        self.last_beat = 0.0
        self.stopping: signal.Signals | None = None
        for cell in sweep.cells:
            if cell.finished:
                self.measured.add(cell)

    def run(self) -> bool:
        """Until every cell is done, has failed for good or belongs to another sweep. True if all are done, here or there."""
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
            not self.failed and not self.stopping and all(cell.finished for cell in self.elsewhere)
        )

    def progress(self) -> str:
        """One line: what is done, what runs, and for how long still."""
        left, running = (
            self.seconds_left(),
            ", ".join(f"{run.cell.name} {duration(run.seconds)}" for run in self.running),
        )
        parts = [
            f"{len(self.done)}/{len(self.cells)} done",
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
        left = [max(self.measured.expected(run.cell) - run.seconds, 0) for run in self.running]
        left += [self.measured.expected(cell) for cell in self.waiting if not cell.finished]
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
            cell, place = self.waiting[0], None
            if not cell.finished:
                if not self._fits(cell):
                    self.short = "no memory for more"
                    return
                place = self.places.take()
                if place is None:
                    self.short = "other sweeps' runs have the rest of the machine"
                    return
            self.waiting.popleft()
            if not self.claims.take(cell.name):
                self.elsewhere.append(cell)
            elif why := self._stranger(cell):
                self.claims.release(cell.name)
                self.say(f"{cell.name}: {why}")
                self.failed[cell.name] = why
            elif cell.finished:  # perhaps by a sweep that was killed before it could tidy up
                self._finish(cell)
            else:
                self._start(cell, *place)
                continue
            for file in place[1] if place else ():
                file.close()

    def _stranger(self, cell: Cell) -> str:
        """Why what another sweep has left in the cell's folder since the start is not this cell's; nothing if it is."""
        try:
            same_run(cell.settings, cell.folder)
        except ConfigError as error:
            return "; ".join(error.problems)
        return ""

    def _start(self, cell: Cell, slot: Slot, locks: list[IO]) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.sweep.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment |= {"CUDA_VISIBLE_DEVICES": slot.gpu} if slot.gpu is not None else {}
        cell.folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-c",
            START,
            ",".join(map(str, slot.cores)),
            str(self.entry),
            *cell.arguments,
        ]
        with (cell.folder / LOG).open("ab") as log:
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
        self.tries[cell.name] += 1
        self.places.note(locks, process.pid, self._need(cell))
        self.running.append(
            Running(cell, slot, locks, process, time.monotonic(), bool(checkpoints(cell.folder)))
        )
        self.claims.hand_over(cell.name, process.pid)
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
            cell, code = run.cell, run.process.returncode
            if cell.finished:
                self._finish(cell)
                self.measured.add(cell, run.seconds, not run.goes_on)
                self.say(f"{cell.name}: done in {duration(run.seconds)}; {self.progress()}")
                continue
            self.claims.release(cell.name)
            why = f"{_ended(code)}: {_last_line(cell.folder / LOG)}"
            if self.stopping:
                continue
            if self.tries[cell.name] < TRIES:
                self.say(f"{cell.name}: {why}; it will be tried once more")
                self.waiting.append(cell)
            else:
                self.say(f"{cell.name}: failed again, {why}; see {cell.folder / LOG}")
                self.failed[cell.name] = why

    def _beat(self) -> None:
        """Tells sweeps on other hosts that this one lives."""
        if time.monotonic() - self.last_beat > BEAT_S:
            self.last_beat = time.monotonic()
            self.claims.beat([run.cell.name for run in self.running])

    def _finish(self, cell: Cell) -> None:
        if self.claims.own(cell.name):
            tidy(cell.folder, self.sweep.keep)
        self.claims.release(cell.name)
        self.done.add(cell.name)

    def _look_elsewhere(self) -> bool:
        """Whether to go on for cells that others have. A run whose sweep was killed comes to us; those of a live sweep do not."""
        wait = False
        for cell in list(self.elsewhere):
            claim = self.claims.of(cell.name)
            if claim is None or not claim.live:
                self.elsewhere.remove(cell)
                self.waiting.append(cell)
                wait = True
            elif claim.orphan:
                wait = True
        return wait

    def _fits(self, cell: Cell) -> bool:
        """Whether memory suffices for one more beside what the runs on this machine have not taken yet; where none runs nothing would
        become free, and it is tried."""
        to_come = self.places.to_come()
        return to_come is None or self._need(cell) + to_come <= available_bytes()

    def _need(self, cell: Cell) -> int:
        """Bytes on the host. What a run measures on a GPU is the GPU's memory, of which each run has its own."""
        found = self.measured.need(cell) if not self.on_gpus else None
        if found is None and cell.method not in self.estimates:
            self.estimates[cell.method] = needed_bytes(cell.settings)
        return found if found is not None else self.estimates[cell.method]

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


def _key(cell: Cell, axes: tuple[str, ...]) -> tuple:
    return tuple((axis, getattr(cell, axis)) for axis in axes)


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
