"""What one machine has room for: places for runs (cores, a GPU each), memory that is left, memory that a run will need."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import tempfile
from typing import IO

import psutil
import torch

from scaleup.backbone import loading as backbone
from scaleup.backbone import precision
from scaleup.memory.states import estimate
from scaleup.settings.schema import Settings
from scaleup.training.arguments import deepspeed_file

# Python, libraries and activations beside the states, until a run of the kind has been measured. MiniLM on CPU takes 1.0 GiB of it.
OVERHEAD = 2 * 2**30
CGROUPS = pathlib.Path("/sys/fs/cgroup")
# Locks of the places, one file each, for all sweeps of a user on this machine.
LOCKS = pathlib.Path(tempfile.gettempdir(), f"scaleup-places-{os.getuid()}")


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one run. cores: empty on systems that do not pin processes. gpu: as CUDA_VISIBLE_DEVICES names it."""

    cores: tuple[int, ...]
    gpu: str | None
    index: int = 0

    @property
    def names(self) -> list[str]:
        """Of what is taken with it."""
        return [f"core-{core}" for core in self.cores] + (
            [f"gpu-{self.gpu}"] if self.gpu else []
        ) or [f"place-{self.index}"]


def slots(threads: int) -> list[Slot]:
    """The places of this machine: the cores this process may use in groups of `threads` (what is left over stays free), one for
    each GPU where there are any; at least one."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    count = max(1, (len(cores) or os.cpu_count() or 1) // threads)
    gpus = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[
        :gpus
    ]
    count = min(count, gpus or count)
    return [
        Slot(tuple(cores[i * threads : (i + 1) * threads]), names[i] if gpus else None, i)
        for i in range(count)
    ]


class Places:
    """The slots of this machine, of which no two runs of a user's sweeps have one at the same time.

    A run that has a slot holds locks on its cores and its GPU, as open files that it inherits: they are free when the run has
    ended, however it ended, and whatever became of the sweep that started it.
    """

    def __init__(self, jobs: int | None, threads: int):
        """jobs: most that are taken at once. Raises OSError where locks cannot be written."""
        self.slots = slots(threads)
        self.count = min(jobs or len(self.slots), len(self.slots))
        LOCKS.mkdir(mode=0o700, exist_ok=True)

    def take(self) -> tuple[Slot, list[IO]] | None:
        """A free slot and its locks, to be handed to the run and closed by the caller; None if other sweeps have all."""
        for slot in self.slots:
            with contextlib.ExitStack() as held:
                files = [held.enter_context((LOCKS / name).open("a+")) for name in slot.names]
                try:
                    for file in files:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                held.pop_all()
                for file in files:  # of who was there before
                    file.truncate(0)
                return slot, files
        return None

    @staticmethod
    def note(locks: list[IO], pid: int, need: int) -> None:
        """For all sweeps on this machine: whose process has these locks, and how much memory, bytes, it will take."""
        locks[0].write(f"{pid} {need}")
        locks[0].flush()

    @staticmethod
    def to_come() -> int | None:
        """Bytes that runs in the places of this machine have not taken yet; None if there is no run."""
        held = [path for path in LOCKS.iterdir() if _locked(path)]
        notes = [
            note.split() for note in (path.read_text(encoding="ascii") for path in held) if note
        ]  # one place may have several locks
        return (
            sum(max(int(need) - resident_bytes(int(pid)), 0) for pid, need in notes)
            if held
            else None
        )


def _locked(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def available_bytes() -> int:
    """Memory that may still be taken: the machine's, or its container's where that is less."""
    return min(
        [
            psutil.virtual_memory().available,
            *_left_of_cgroups(pathlib.Path("/proc/self/cgroup").read_text(encoding="ascii")),
        ]
    )


def _left_of_cgroups(mine: str) -> list[int]:
    """What each memory limit around this process leaves, from /proc/self/cgroup: `number:controllers:path`. Files that the kernel
    keeps in memory as long as nobody else wants it are not taken."""
    found = []
    for controllers, path in (line.split(":", 2)[1:] for line in mine.splitlines()):
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit, used, cached = (
            CGROUPS,
            "memory.max",
            "memory.current",
            ("inactive_file", "active_file"),
        )
        if controllers:  # version 1
            root, limit, used, cached = (
                CGROUPS / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                ("total_inactive_file", "total_active_file"),
            )
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(root) or not (folder / limit).is_file():
                continue
            text = (folder / limit).read_text(encoding="ascii").strip()
            if text != "max":
                stat = dict(
                    line.split()
                    for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines()
                )
                found.append(
                    int(text)
                    - int((folder / used).read_text(encoding="ascii"))
                    + sum(int(stat[name]) for name in cached)
                )
    return found


def resident_bytes(pid: int) -> int:
    """What a process has in memory; 0 once it is gone."""
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def needed_bytes(settings: Settings) -> int:
    """Of a run on this machine before any was measured: its states by scaleup.memory.states, and OVERHEAD.

    Raises ConfigError if the model's config cannot be loaded.
    """
    half = precision.half_dtype(
        settings, has_bf16=torch.cuda.is_available()
    )  # asking the GPU itself would take its memory
    file = deepspeed_file(settings.train.deepspeed)
    config = backbone.load_config(settings.model)
    states = estimate(
        settings, config, precision.backbone_dtype(settings, half), file, 1, half if file else None
    )
    return OVERHEAD + max(
        states.load, states.resident + states.gathered + states.gradients + states.host
    )
