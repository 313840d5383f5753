"""Ctrl-C: the first one ends a command in good order, the second one at once."""

import argparse
import signal
import subprocess
import sys
import time

import pytest

from scaleup.cli import train
from scaleup.cli.exit_codes import run_command
from scaleup.training import run
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
    assert process.stderr.readline() == "interrupted\n"
    return process


def test_an_interrupted_command_exits_with_130():
    process = start(0)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 130


def test_a_second_interrupt_ends_with_130_at_once():
    process, begin = start(600), time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 130
    assert time.monotonic() - begin < 30


@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize(
    ("folders", "advice"),
    [
        ([], "no checkpoint was saved yet, so that train.resume=auto would start from the beg"),
        (
            ["checkpoint-9", "checkpoint-10"],
            "continue with train.resume=auto from run/checkpoint-10",
        ),
        (
            ["before-1/checkpoint-4"],
            "no checkpoint was saved yet, so that train.resume=auto would start from the weights "
            "of run/before-1/checkpoint-4",
        ),
    ],
)
def test_an_interrupted_run_says_from_where_it_continues(
    folders, advice, tmp_path, monkeypatch, capsys
):
    def interrupt(settings):
        for folder in folders:
            (tmp_path / "run" / folder).mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "run", interrupt)
    words = ["data.name=rte", "model.name=org/model", "train.output_dir=run"]
    options = argparse.Namespace(config=None, overrides=words, print_config=False)
    assert run_command("train", train._train, options) == 130
    assert capsys.readouterr().err.startswith(f"interrupted; {advice}")
