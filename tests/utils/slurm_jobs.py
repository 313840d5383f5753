"""Jobs of the Slurm test cluster, and the record of what happens to them."""

import pathlib
import re
import sys
import time
from collections.abc import Callable

from benchmarks.slurm import SlurmCluster, wait_until
from tests.utils.workspace import ROOT

NOISE = re.compile(r"socket.cpp|model shards|real_accelerator|kernels-community")


def last_step(out: pathlib.Path) -> int:
    log = out / "log.jsonl"
    steps = re.findall(r'^{"step": (\d+)', log.read_text(), re.MULTILINE) if log.exists() else []
    return int(steps[-1]) if steps else 0


class Job:
    """A job, or one task of a job array, and the record of what happened to it.

    Args:
        number: as Slurm names it, for example 7, or 7_1 for the first task of an array.
        folder: where its log is, which is named job-NUMBER.log.
    """

    def __init__(self, cluster: SlurmCluster, folder: pathlib.Path, number: str):
        self.cluster, self.folder, self.id = cluster, folder, number
        self.log = folder / f"job-{number}.log"
        self.start = time.monotonic()
        self.events: list[str] = []
        self.state = ""

    @classmethod
    def submit(
        cls, cluster: SlurmCluster, folder: pathlib.Path, *words: str, name: str = "%j", **env: str
    ) -> "Job":
        """Submit a job; `words` are options, the script and its arguments."""
        command = ["sbatch", "--parsable", f"--output={folder}/job-{name}.log", *words]
        job = cls(cluster, folder, cluster.run(*command, **env).strip())
        job.note("$ " + " ".join(command))
        return job

    def note(self, text: str) -> None:
        self.events.append(f"{time.monotonic() - self.start:6.1f} s  {text}")

    def scontrol(self, *words: str) -> None:
        """Run a command of an operator and note it."""
        self.note("$ " + " ".join(words))
        self.cluster.run(*words)

    def show(self) -> dict[str, str]:
        """Return what Slurm says about the job, and note its state if that has changed."""
        text = self.cluster.run("scontrol", "--oneliner", "show", "job", self.id)
        found = dict(word.partition("=")[::2] for word in text.split())
        state = f"{found['JobState']}, restarts {found['Restarts']}, reason {found['Reason']}"
        if state != self.state:
            self.state = state
            self.note(state)
        return found

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(
        self, what: str, reached: Callable[[dict[str, str]], bool], timeout_s: float = 900
    ) -> None:
        """Wait until `reached(what Slurm says about the job)`."""
        try:
            wait_until(lambda: reached(self.show()), what, timeout_s)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.story()}{self.cluster.logs()}") from None

    def wait_for_step(self, out: pathlib.Path, step: int) -> None:
        """Wait until the run has logged a step."""
        self.wait_for(f"step {step}", lambda _: last_step(out) >= step)
        self.note(f"the run has logged step {last_step(out)}")

    def finish(self, state: str = "COMPLETED", hurry: bool = True) -> dict[str, str]:
        """Wait for the end of the job, and return what Slurm says about it.

        Args:
            hurry: let a requeued job start after 5 seconds instead of two minutes. It cannot start
                at once: slurmd refuses it within the second in which it ended the start before.
        """
        ends = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY", "DEADLINE")
        hurried = set()

        def ended(found: dict[str, str]) -> bool:
            delayed = found["JobState"] == "PENDING" and found["Reason"] == "BeginTime"
            if hurry and delayed and found["Restarts"] not in hurried:
                self.scontrol("scontrol", "update", f"JobId={self.id}", "StartTime=now+5")
                hurried.add(found["Restarts"])
            return found["JobState"] in ends

        self.wait_for("the end of the job", ended)
        found = self.show()
        assert found["JobState"] == state, self.story() + self.cluster.logs()
        return found

    def story(self) -> str:
        """Return the events and the job's log without the paths of this machine."""
        lines = [line for line in self.said().splitlines() if not NOISE.search(line)]
        text = "\n".join([*self.events, "", *(f"  {line}" for line in lines), ""])
        for path, name in (
            (self.folder.parent, "/runs"),
            (self.cluster.folder, "/slurm"),
            (ROOT, "/workspace"),
            (sys.prefix, "/venv"),
        ):
            text = text.replace(str(path), name)
        return text
