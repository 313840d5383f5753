"""Run the launch scripts on a real Slurm with two simulated hosts on this machine. Needs root.

    python -m benchmarks.slurm --output results/slurm

The command installs the Debian packages slurm-wlm and munge if they are missing, runs the tests in
tests/slurm, and writes the record of their jobs to OUTPUT/jobs.log. The hosts n01 and n02 are those
of benchmarks/two_hosts.py: network namespaces with names of their own. Each runs a slurmd, and n01
also runs the controller. Configuration, key, sockets and state are in a temporary folder, so the
settings in /etc and a Slurm that this machine belongs to are neither used nor changed.
"""

import contextlib
import functools
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from benchmarks.cases import ROOT, argument_parser
from benchmarks.two_hosts import NAMES, TwoHosts
from tests.utils.workspace import environment

PROGRAMS = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "ip": "iproute2"}
RECORD = "SCALEUP_SLURM_RECORD"  # the file to which the tests append what their jobs did
# Everything that needs cgroups, accounts or a database is switched off. Jobs in the partition
# `urgent` preempt those in `normal`.
CONFIG = """
ClusterName=scaleup
SlurmctldHost=n01(10.99.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{more}
KillWait=60
ReturnToService=1
GresTypes=gpu
NodeName=n01 NodeAddr=10.99.0.1 CPUs=4 RealMemory=1000 Gres=gpu:2
NodeName=n02 NodeAddr=10.99.0.2 CPUs=4 RealMemory=1000 Gres=gpu:2
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""
# Two devices that every machine has stand for the GPUs of a node. `ip netns exec` hides the cgroups
# of the machine, and slurmd only wants to know which version they have.
FILES = {
    "gres.conf": "Name=gpu File=/dev/zero\nName=gpu File=/dev/full\n",
    "cgroup.conf": "CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\n",
    "plugstack.conf": "",
}


def missing() -> str | None:
    """Return in one line what this machine lacks for a cluster, or None."""
    if os.geteuid() != 0:
        return "a test cluster needs root, for network namespaces and for daemons with jobs"
    lacks = [name for name in (*PROGRAMS, "unshare") if shutil.which(name) is None]
    packages = " ".join(sorted(set(PROGRAMS.values())))
    return f"not found: {', '.join(lacks)} (Debian packages {packages})" if lacks else None


def wait_until(reached: Callable[[], object], what: str, timeout_s: float = 60) -> None:
    """Wait until `reached()` is true.

    Raises:
        TimeoutError: the time is over. The message says what was waited for.
    """
    deadline = time.monotonic() + timeout_s
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.2)


def kill(process: subprocess.Popen) -> None:
    """Kill a process and wait for its end."""
    process.kill()
    process.wait()


class SlurmCluster:
    """Context with a running Slurm on the hosts n01 and n02; its end removes everything."""

    def __enter__(self) -> "SlurmCluster":
        with contextlib.ExitStack() as stack:
            # A short path: the names of sockets have at most 107 characters.
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-"))
            self.folder = pathlib.Path(name)
            self.hosts = TwoHosts(self.folder)
            self._configure()
            stack.callback(kill, self._start_munge())
            wait_until((self.folder / "munge.socket").exists, "munged has made its socket")
            stack.enter_context(self.hosts)
            for folder in ("state", *(f"spool-{name}" for name in NAMES)):
                (self.folder / folder).mkdir()
            self.hosts.start(0, ["slurmctld", "-D"], SLURM_CONF=self.conf)
            self.nodes = [self._start_node(host) for host in range(len(NAMES))]
            wait_until(lambda: self.node_states() == ["idle", "idle"], "both nodes are idle")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    @property
    def conf(self) -> str:
        return str(self.folder / "slurm.conf")

    def _configure(self, more: str = "") -> None:
        files = FILES | {"slurm.conf": CONFIG}
        for name, text in files.items():
            text = text.format(folder=self.folder, more=more)
            (self.folder / name).write_text(text, encoding="utf-8")

    def reconfigure(self, more: str = "") -> None:
        """Let the daemons read slurm.conf again, with this line added to it."""
        self._configure(more)
        self.run("scontrol", "reconfigure")

    def _start_munge(self) -> subprocess.Popen:
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"socket": "munge.socket", "key-file": key.name, "log-file": "munged.log"}
        files |= {"pid-file": "munged.pid", "seed-file": "munged.seed"}
        words = [f"--{option}={self.folder / name}" for option, name in files.items()]
        with (self.folder / "munged.out").open("w") as out:
            command = ["munged", "--foreground", "--force", *words]
            return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)

    def _start_node(self, host: int) -> subprocess.Popen:
        words = ["slurmd", "-D", "-N", NAMES[host]]
        return self.hosts.start(host, words, SLURM_CONF=self.conf)

    def node_states(self) -> list[str]:
        """Return the states of n01 and n02 as sinfo names them; nothing before it answers."""
        command = self.hosts.inside(0, ["sinfo", "-h", "-N", "-p", "normal", "-o", "%T"])
        env = environment(SLURM_CONF=self.conf)
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
        return done.stdout.split()

    def kill_node(self, host: int) -> None:
        """Kill the slurmd of a host and everything that it has started, as a power cut does."""
        kill(self.nodes[host])

    def restart_node(self, host: int) -> None:
        """Start the slurmd of a host again."""
        self.nodes[host] = self._start_node(host)

    def logs(self) -> str:
        """Return the last lines of every daemon's log."""
        paths = sorted(self.folder.glob("slurm*.log"))
        ends = ["\n".join(path.read_text().splitlines()[-40:]) for path in paths]
        return "\n".join(f"-- {path.name}\n{end}" for path, end in zip(paths, ends))

    def run(self, *command: str, timeout_s: float = 60, **env: str) -> str:
        """Run a command on n01 and return what it prints.

        Raises:
            RuntimeError: it failed. The message has its output.
        """
        done = subprocess.run(
            self.hosts.inside(0, command),
            capture_output=True,
            text=True,
            env=environment(SLURM_CONF=self.conf, **env),
            timeout=timeout_s,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout


def install() -> None:
    """Install the missing packages with apt-get.

    Raises:
        SystemExit: this is not possible here. The message says what is missing.
    """
    if os.geteuid() == 0 and missing() is not None and shutil.which("apt-get"):
        apt = functools.partial(
            subprocess.run, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, check=True
        )
        apt(["apt-get", "update", "--quiet"])
        apt(["apt-get", "install", "--yes", "--no-install-recommends", *set(PROGRAMS.values())])
    if problem := missing():
        raise SystemExit(f"error: {problem}")


def main() -> int:
    """Install what is missing, run the tests and write their record; return pytest's exit code."""
    output = argument_parser(__doc__).parse_args().output
    install()
    output.mkdir(parents=True, exist_ok=True)
    record = (output / "jobs.log").resolve()
    fresh = record.with_suffix(".new")
    version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True)
    fresh.write_text(f"{version.stdout}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-m", "slurm", "-v", "--durations=0", "tests/slurm"]
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | {RECORD: str(fresh)})
    # The tests remove their cluster when they are asked to end. Ctrl-C reaches them by itself.
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = child.wait()
    if code == 0:
        fresh.replace(record)
    else:
        print(f"the record of the jobs so far: {fresh}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
