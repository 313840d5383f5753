"""`scaleup bench` as its users run it: the result file, and the options that it refuses."""

import argparse
import errno
import json
import os
import pathlib
import subprocess
import sys

import pytest

from scaleup.cli import bench as command
from scaleup.errors import ConfigError
from scaleup.experiments import bench, timing, variants
from scaleup.experiments.variants import BenchOptions

ROOT = pathlib.Path(__file__).resolve().parents[3]
MAIN = "import sys; from scaleup.cli import main; sys.exit(main())"
SMALL = ["--batch", "1", "--length", "4"]


@pytest.fixture(autouse=True)
def steady_allocator(monkeypatch):
    """Keep the command from starting this process again."""
    for name, value in command.STEADY_ALLOCATOR.items():
        monkeypatch.setenv(name, value)


def run(*words: str) -> int:
    parser = argparse.ArgumentParser(prog="scaleup bench", allow_abbrev=False)
    command.configure(parser)
    return command.run(parser.parse_args(words))


def test_the_command_writes_ratios_relative_to_its_reference(tmp_path):
    out = tmp_path / "deep" / "rows.json"
    only = ["--only", "lower-bound", "lora", "--reference", "lower-bound", "--rounds", "1"]
    words = ["bench", "training", *SMALL, *only, "--output", str(out)]
    plain = {k: v for k, v in os.environ.items() if k not in command.STEADY_ALLOCATOR}
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *words],
        cwd=tmp_path,
        env=plain | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert rows["lower-bound"]["ratio"] == 1.0
    assert rows["lora"]["calls"] > rows["lower-bound"]["calls"]
    assert "lora" in done.stdout


def test_the_command_offers_every_geometry():
    assert tuple(variants.GEOMETRIES) == command.GEOMETRIES


def test_rows_have_tokens_per_second_and_the_share_of_a_products_rate(monkeypatch, tiny_geometry):
    monkeypatch.setattr(timing, "time_rounds", lambda workers, rounds: {"bare": [[0.5]] * 3})
    monkeypatch.setattr("scaleup.experiments.meter.matmul_rate", lambda device, dtype: 1.0)
    options = BenchOptions("inference", batch=3, length=4, only=["bare"], dtype="bfloat16")
    row = bench.timed_rows(options)["bare"]
    assert row["tokens_per_second"] == 24
    assert row["of_matmul_rate"] == pytest.approx(row["gflop"] / 0.5)


def test_a_profile_has_the_longest_operations(capsys, tiny_geometry):
    run("inference", *SMALL, "--only", "bare", "lora", "--rounds", "1", "--profile")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("bare  1.000") and "ms in all operations" in lines[1]
    assert any("aten::addmm" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inference", "--batch", "0"], "argument --batch: 0 is not a positive integer"),
        (["inference", "--rounds", "two"], "argument --rounds: two is not a positive integer"),
        (["inference", "--examples", "3"], "unrecognized arguments: --examples 3"),
        (["memory", "--ragged", "--compile"], "unrecognized arguments: --ragged --compile"),
        (["memory", "--rounds", "3"], "unrecognized arguments: --rounds 3"),
        (
            ["inference", "--baseline", "python", "--compile"],
            "argument --compile: not allowed with argument --baseline",
        ),
        (
            ["inference", "--compile", "--profile"],
            "argument --profile: not allowed with argument --compile",
        ),
    ],
)
def test_options_without_effect_or_meaning_are_refused(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["inference", "--output", "/dev/null/rows.json"],
            "--output: /dev/null/rows.json cannot be written: ",
        ),
        (["inference", "--output", "/"], "--output: / cannot be written: Is a directory"),
        (["inference", "--length", "5000"], "--length: bert-base has only 512 positions"),
        (
            ["training", *SMALL, "--only", "lower-bound", "--baseline", "nowhere/python"],
            "--baseline: nowhere/python cannot run baseline_library.py (No such",
        ),
        (
            ["training", "--baseline", "python", "--dtype", "bfloat16"],
            "--baseline runs on the CPU in float32; leave out --device and --dtype",
        ),
        (
            ["inference", "--geometry", "llama-8b"],
            "--geometry llama-8b takes 32 GB in float32; add --dtype bfloat16",
        ),
        (
            ["training", "--ragged", "--batch", "1"],
            "--ragged needs --batch 2 and --length 8 or more",
        ),
        (
            ["training", "--compile", "reduce-overhead"],
            "--compile reduce-overhead makes CUDA graphs; on a CPU use plain --compile",
        ),
        (["training", "--graphs"], "--graphs records training steps as CUDA graphs; add --device"),
        (["training", "--device", "cuda"], "--device cuda: torch finds no GPU on this machine"),
        (
            ["ragged", "--texts", "colla", "nowhere", "nowhere"],
            "--texts, --examples: data.name: should be 'cola', 'sst2'",
        ),
        (
            ["training", *SMALL, "--only", "lora", "--reference", "lower-bound"],
            "--reference: lower-bound is not one of lora",
        ),
        (["training", *SMALL, "--only", "APL", "LORA"], "--only: LORA is not one of "),
        (["memory", *SMALL, "--only", "APL", "LORA"], "--only: LORA is not one of "),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(tiny_geometry, words, message):
    with pytest.raises(ConfigError) as refusal:
        run(*words)
    assert refusal.value.problems[0].startswith(message) and len(refusal.value.problems) == 1


def test_a_full_disk_leaves_no_partial_file(monkeypatch, tiny_geometry, tmp_path):
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    out = tmp_path / "rows.json"
    message = f"--output: {out} cannot be written: No space left on device"
    with pytest.raises(ConfigError, match=message):
        run("training", *SMALL, "--rounds", "1", "--only", "lower-bound", "--output", str(out))
    assert not out.exists()
