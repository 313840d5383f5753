"""Train under ZeRO-3 on two simulated hosts that share no folder. Needs root.

    python -m benchmarks.two_hosts --output results/two_hosts

The hosts are network namespaces on this machine, joined by a veth pair. Each has its own host name,
its own hosts file and, if requested, its own disk under the same path. launch/torchrun.sh starts
the run on both; OUTPUT/n01.log and OUTPUT/n02.log record it. Tests use the class `TwoHosts` too.
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

from benchmarks.cases import ROOT, argument_parser
from tests.utils.workspace import environment, make_workspace, overrides

NAMES = ("n01", "n02")
PORT = 29511
# A namespace of processes ends all of them when its first process is killed.
UNSHARE = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
SETTINGS = (
    "train.max_steps=8",
    "train.deepspeed=zero3",
    "train.per_device_train_batch_size=8",
    "train.disable_tqdm=true",
)


class TwoHosts:
    """Context with the hosts n01 (10.99.0.1) and n02 (10.99.0.2); its end removes everything.

    Args:
        folder: for the hosts file and the output of both hosts, `n01.log` and `n02.log`.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.spaces = [f"su{os.getpid()}{name}" for name in NAMES]
        self.ends = [f"vs{os.getpid()}{side}" for side in "ab"]  # at most 15 characters
        self.running: list[subprocess.Popen] = []

    def __enter__(self) -> "TwoHosts":
        with contextlib.ExitStack() as stack:
            stack.callback(self._remove)
            for space in self.spaces:
                self._ip(f"netns add {space}")
            (a, b), (end_a, end_b) = self.spaces, self.ends
            self._ip(f"link add {end_a} netns {a} type veth peer name {end_b} netns {b}")
            for number, (space, end) in enumerate(zip(self.spaces, self.ends), 1):
                self._ip(f"-n {space} addr add 10.99.0.{number}/24 dev {end}")
                for device in (end, "lo"):
                    self._ip(f"-n {space} link set {device} up")
            hosts = "127.0.0.1 localhost\n10.99.0.1 n01\n10.99.0.2 n02\n"
            (self.folder / "hosts").write_text(hosts)
            stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._remove()

    @staticmethod
    def _ip(arguments: str) -> None:
        result = subprocess.run(["ip", *arguments.split()], capture_output=True, text=True)
        if result.returncode:
            raise OSError(f"ip {arguments}: {result.stderr.strip()}")

    def _remove(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.kill()
                process.wait()
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def inside(
        self,
        host: int,
        command: Sequence[str],
        disk: tuple[pathlib.Path, pathlib.Path] | None = None,
    ) -> list[str]:
        """Return the command line that runs a command on host 0 or 1.

        Args:
            disk: a folder for this host alone, and the path under which the host sees it.
        """
        mount = 'mount --bind "$4" "$5"; ' if disk else ""
        script = f'hostname "$1"; mount --bind "$2" /etc/hosts; {mount}cd "$3"; shift 5; exec "$@"'
        folder, seen_as = map(str, disk or ("-", "-"))
        parameters = [NAMES[host], str(self.folder / "hosts"), str(ROOT), folder, seen_as]
        shell = ["bash", "-ec", script, "-", *parameters, *command]
        return ["ip", "netns", "exec", self.spaces[host], *UNSHARE, *shell]

    def start(
        self,
        host: int,
        command: Sequence[str],
        disk: tuple[pathlib.Path, pathlib.Path] | None = None,
        **env: str,
    ) -> subprocess.Popen:
        """Start a command on a host; its output is appended to the host's log.

        Args:
            disk: as for `inside`.
            env: variables of the environment.
        """
        process = subprocess.Popen(
            self.inside(host, command, disk),
            stdout=self._log(host).open("a"),
            stderr=subprocess.STDOUT,
            env=environment(**env),
        )
        self.running.append(process)
        return process

    def _log(self, host: int) -> pathlib.Path:
        return self.folder / f"{NAMES[host]}.log"

    def output(self, host: int) -> str:
        """Return everything that the host's processes have written so far."""
        return self._log(host).read_text()

    def wait_for(self, host: int, text: str, timeout_s: float = 180) -> None:
        """Wait until the output of the host contains `text`.

        Raises:
            TimeoutError: the time is over or the process has ended. The message has the output.
        """
        deadline = time.monotonic() + timeout_s
        while text not in self.output(host):
            if time.monotonic() > deadline or self.running[host].poll() is not None:
                end = self.output(host)[-2000:]
                raise TimeoutError(f"{NAMES[host]} did not print {text!r}:\n{end}")
            time.sleep(0.2)

    def cut(self) -> None:
        """Take the link down on both sides. No process is notified."""
        for space, end in zip(self.spaces, self.ends):
            self._ip(f"-n {space} link set {end} down")


def ranks(host: int, port: int) -> dict[str, str]:
    """Return the environment of one process per host, as a wrapper of srun sets it."""
    return {
        "RANK": str(host),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "n01",
        "MASTER_PORT": str(port),
    }


def torchrun(host: int, port: int) -> dict[str, str]:
    """Return the environment of launch/torchrun.sh on host 0 or 1."""
    return {
        "NNODES": "2",
        "NODE_RANK": str(host),
        "MASTER_ADDR": "n01",
        "MASTER_PORT": str(port),
        "NPROC": "1",
        "PYTHON": sys.executable,
    }


def record(both: TwoHosts, command: list[str], host: int, code: int) -> str:
    """Describe the run of a host: command, output, exit code, files on its disk, and its log."""
    name, disk = NAMES[host], both.folder / NAMES[host]
    variables = [f"{k}={v}" for k, v in torchrun(host, PORT).items() if k != "PYTHON"]
    files = sorted(path for path in disk.rglob("*") if path.is_file())
    sections = [
        f"[{name}] $ {' '.join([*variables, *command])}\n",
        f"{both.output(host)}\nexit code {code}\n",
        f"files on the disk of {name}, in bytes:",
        *(f"  {path.stat().st_size:>9} {path.relative_to(disk)}" for path in files),
    ]
    if host == 0:
        sections.append("\nlog.jsonl without its gates:")
        for line in (disk / "out" / "log.jsonl").read_text().splitlines():
            entry = json.loads(line)
            entry.pop("gates", None)
            sections.append(f"  {entry}")
    return "\n".join(sections).replace(str(both.folder), "/run") + "\n"


def main() -> int:
    """Run on both hosts and write their logs; return the larger exit code."""
    target = argument_parser(__doc__).parse_args().output
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for part in ("workspace", "disk", *NAMES):
            (folder / part).mkdir()
        (folder / "empty.yaml").write_text("")
        workspace, disk = make_workspace(folder / "workspace"), folder / "disk"
        words = overrides(workspace, disk / "out", *SETTINGS)
        command = ["launch/torchrun.sh", str(folder / "empty.yaml"), *words]
        with TwoHosts(folder) as both:
            for host, label in enumerate(NAMES):
                both.start(host, command, disk=(folder / label, disk), **torchrun(host, PORT))
            codes = [process.wait(timeout=400) for process in both.running]
            target.mkdir(parents=True, exist_ok=True)
            for host, label in enumerate(NAMES):
                text = record(both, command, host, codes[host])
                (target / f"{label}.log").write_text(text, encoding="utf-8")
                print(text)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
