"""Ctrl-C: the first one ends a command in good order, the second one at once."""

import signal
import subprocess
import sys
import time

from tests.utils.workspace import ROOT, environment

# A command that is interrupted, and then waits for other processes to end.
SCRIPT = """
import sys, time
from scaleup.cli.exit_codes import run_command
def command(options):
    print("running", flush=True)
    time.sleep(600)
code = run_command("train", command, None)
time.sleep(float(sys.argv[1]))
sys.exit(code)
"""


def start(seconds: float) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "interrupted; continue with train.resume=auto\n"
    return process


def test_an_interrupted_command_exits_with_130():
    process = start(0)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 130


def test_a_second_interrupt_ends_with_130_at_once():
    process, begin = start(600), time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 130
    assert time.monotonic() - begin < 30
