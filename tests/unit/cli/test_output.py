"""Output that nobody takes: a full disk, a closed pipe, a terminal that is gone."""

import errno
import subprocess
import sys

import pytest

from scaleup.cli.sweep import Screen
from tests.utils.workspace import ROOT, environment

# A command that prints what argv names, in this process or by raising an error.
SCRIPT = """
import sys
from scaleup.cli.exit_codes import run_command
from scaleup.errors import ConfigError, Preempted
def command(options):
    if sys.argv[1] == "result":
        print("a result")
        return 0
    raise {"problem": ConfigError("train.seed: bad"), "stop": Preempted("stopped")}[sys.argv[1]]
sys.exit(run_command("train", command, None))
"""


def start(*words: str, **options) -> tuple[int, str]:
    """Run python and return its exit code and what it wrote to stderr."""
    process = subprocess.Popen(
        [sys.executable, *words], text=True, env=environment(), cwd=ROOT, **options
    )
    if process.stdout is not None:
        process.stdout.close()  # as `head` does when it has seen enough
    error = process.stderr.read() if process.stderr is not None else ""
    return process.wait(timeout=300), error


def test_a_result_that_cannot_be_written_is_one_line_and_an_exit_code():
    with open("/dev/full", "w") as full:
        result = start("-c", SCRIPT, "result", stdout=full, stderr=subprocess.PIPE)
    assert result == (1, "error: No space left on device\n")


@pytest.mark.parametrize(("what", "code"), [("problem", 2), ("stop", 0), ("result", 0)])
def test_a_message_that_cannot_be_written_does_not_change_the_exit_code(what, code):
    with open("/dev/full", "w") as full:
        assert start("-c", SCRIPT, what, stderr=full) == (code, "")


@pytest.mark.parametrize("words", [[], ["train"], ["plan"], ["bench"], ["bench", "memory"]])
def test_help_into_a_closed_pipe_ends_quietly(words):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    assert start("-m", "scaleup", *words, "--help", **pipes) == (0, "")


@pytest.mark.parametrize(
    ("name", "expected"), [("plan", (1, "")), ("train", (1, "error: Broken pipe\n"))]
)
def test_a_closed_pipe_is_reported_only_by_a_run_that_it_ends(name, expected):
    script = SCRIPT.replace('"train", command', f'"{name}", command')
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    assert start("-c", script, "result", **pipes) == expected


def test_a_sweep_goes_on_without_its_screen(monkeypatch):
    class Gone:
        """A terminal that was closed."""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> None:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stdout", Gone())
    screen = Screen()
    assert screen.terminal
    screen.say("one")
    screen.show("two")
    monkeypatch.setattr(sys, "stdout", None)
    assert not Screen().terminal
