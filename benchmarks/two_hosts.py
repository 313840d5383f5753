"""Two hosts on one machine: network namespaces joined by a veth pair, each with its own host name, hosts file and, where asked,
its own disk under the same path. Needs root.

    python -m tests.two_hosts [FOLDER]     one ZeRO-3 run over both, started by launch/torchrun.sh; logs into results/two_hosts/
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from tests.utils.workspace import ROOT, environment, make_workspace, overrides

NAMES = ("n01", "n02")


class TwoHosts:
    """`n01` (10.99.0.1) and `n02` (10.99.0.2). A context: everything it made, processes too, is gone after it."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.spaces = [f"su{os.getpid()}{name}" for name in NAMES]
        self.running: list[subprocess.Popen] = []

    def __enter__(self) -> "TwoHosts":
        with contextlib.ExitStack() as stack:
            stack.callback(self._remove)
            for space in self.spaces:
                self._ip("netns", "add", space)
            ends = [f"vs{os.getpid()}{side}" for side in "ab"]  # at most 15 characters
            self._ip(
                "link",
                "add",
                ends[0],
                "netns",
                self.spaces[0],
                "type",
                "veth",
                "peer",
                "name",
                ends[1],
                "netns",
                self.spaces[1],
            )
            self.ends = ends
            for number, (space, end) in enumerate(zip(self.spaces, ends), 1):
                self._ip("-n", space, "addr", "add", f"10.99.0.{number}/24", "dev", end)
                for device in (end, "lo"):
                    self._ip("-n", space, "link", "set", device, "up")
            (self.folder / "hosts").write_text(
                "127.0.0.1 localhost\n10.99.0.1 n01\n10.99.0.2 n02\n"
            )
            stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._remove()

    @staticmethod
    def _ip(*words: str) -> None:
        result = subprocess.run(["ip", *words], capture_output=True, text=True)
        if result.returncode:
            raise OSError(f"ip {' '.join(words)}: {result.stderr.strip()}")

    def _remove(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.kill()
                process.wait()
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def start(
        self,
        host: int,
        command: Sequence[str],
        disk: tuple[pathlib.Path, pathlib.Path] | None = None,
        **env: str,
    ) -> subprocess.Popen:
        """The command on host 0 or 1, both its outputs in `folder/n0X.log`. `disk`: (own folder, the path under which it is seen)."""
        mount = 'mount --bind "$4" "$5"; ' if disk else ""
        script = f'hostname "$1"; mount --bind "$2" /etc/hosts; {mount}cd "$3"; shift 5; exec "$@"'
        own, seen = map(str, disk or ("-", "-"))
        inside = [
            "bash",
            "-ec",
            script,
            "-",
            NAMES[host],
            str(self.folder / "hosts"),
            str(ROOT),
            own,
            seen,
            *command,
        ]
        # With a namespace of processes, what is killed here leaves nothing behind.
        apart = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        words = ["ip", "netns", "exec", self.spaces[host], *apart, *inside]
        output = (self.folder / f"{NAMES[host]}.log").open("a")
        process = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, env=environment(**env)
        )
        self.running.append(process)
        return process

    def said(self, host: int) -> str:
        """Everything the host's processes have written so far."""
        return (self.folder / f"{NAMES[host]}.log").read_text()

    def wait_for(self, host: int, words: str, timeout_s: float = 180) -> None:
        """Until the host has said `words`. Raises TimeoutError, with what it said instead."""
        deadline = time.monotonic() + timeout_s
        while words not in self.said(host):
            if time.monotonic() > deadline or self.running[host].poll() is not None:
                raise TimeoutError(
                    f"{NAMES[host]} never said {words!r}:\n{self.said(host)[-2000:]}"
                )
            time.sleep(0.2)

    def cut(self) -> None:
        """The link goes down, on both sides, without a word to either."""
        for space, end in zip(self.spaces, self.ends):
            self._ip("-n", space, "link", "set", end, "down")


def ranks(host: int, port: int) -> dict[str, str]:
    """What srun's wrapper sets: one process on each of two hosts."""
    return {
        "RANK": str(host),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "n01",
        "MASTER_PORT": str(port),
    }


def torchrun(host: int, port: int) -> dict[str, str]:
    """The environment of launch/torchrun.sh on host 0 or 1."""
    return {
        "NNODES": "2",
        "NODE_RANK": str(host),
        "MASTER_ADDR": "n01",
        "MASTER_PORT": str(port),
        "NPROC": "1",
        "PYTHON": sys.executable,
    }


def record(
    both: TwoHosts, command: list[str], codes: list[int], log: pathlib.Path
) -> dict[str, str]:
    """Label → all that a reader needs of one host's run: command, output, exit code, files on its disk, losses."""
    found = {}
    for host, label in enumerate(NAMES):
        start = " ".join(f"{k}={v}" for k, v in torchrun(host, 29511).items() if k != "PYTHON")
        files = sorted(path for path in (both.folder / label).rglob("*") if path.is_file())
        shown = "\n".join(
            f"  {path.stat().st_size:>9} {path.relative_to(both.folder / label)}" for path in files
        )
        text = f"[{label}] $ {start} {' '.join(command)}\n\n{both.said(host)}\nexit code {codes[host]}\n\nfiles on the disk of {label}, in bytes:\n{shown}\n"
        if host == 0:
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            text += "\nlog.jsonl without its gates:\n" + "".join(
                f"  { {k: v for k, v in line.items() if k != 'gates'} }\n" for line in lines
            )
        found[label] = text.replace(str(both.folder), "/run")
    return found


def main(target: pathlib.Path) -> int:
    """One run over two hosts without a shared folder; the exit code."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for part in ("workspace", "disk", *NAMES):
            (folder / part).mkdir()
        (folder / "empty.yaml").write_text("")
        more = (
            "train.max_steps=8",
            "train.deepspeed=zero3",
            "train.per_device_train_batch_size=8",
            "train.disable_tqdm=true",
        )
        words = overrides(make_workspace(folder / "workspace"), folder / "disk" / "out", *more)
        command = ["launch/torchrun.sh", str(folder / "empty.yaml"), *words]
        with TwoHosts(folder) as both:
            for host, label in enumerate(NAMES):
                both.start(
                    host, command, disk=(folder / label, folder / "disk"), **torchrun(host, 29511)
                )
            codes = [process.wait(timeout=400) for process in both.running]
            target.mkdir(parents=True, exist_ok=True)
            for label, text in record(
                both, command, codes, folder / NAMES[0] / "out" / "log.jsonl"
            ).items():
                (target / f"{label}.log").write_text(text, encoding="utf-8")
                print(text)
    return max(codes)


if __name__ == "__main__":
    sys.exit(
        main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "results" / "two_hosts")
    )
