"""The command line: help without slow imports, one error printer, one table of exit codes."""

import argparse
import json
import os
import subprocess
import sys
import time

import pytest

import scaleup
from scaleup.cli import main
from scaleup.cli.entry import COMMANDS
from scaleup.cli.exit_codes import run_command, stopped_code
from scaleup.errors import CheckpointError, ConfigError, ExportError, Preempted, RunError
from tests.utils.workspace import ROOT, environment


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=environment(**variables),
    )


def test_help_is_quick():
    begin = time.perf_counter()
    result = python("-m", "scaleup", "--help")
    assert time.perf_counter() - begin < 5
    assert result.returncode == 0 and not result.stderr
    assert all(f"  {name}" in result.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    "words", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_fits_100_columns_and_imports_no_model_library(words):
    script = (
        "import sys\n"
        "from scaleup.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])\n"
    )
    result = python("-c", script, *words)
    *shown, imported = result.stdout.splitlines()
    assert result.returncode == 0 and not result.stderr and len(shown) > 3
    assert max(map(len, shown)) <= 100
    # Only the help of `train` lists the settings, which come from these libraries.
    assert (imported == "[]") == (words[0] != "train")


def test_the_help_of_train_groups_every_setting_by_section(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert exit_.value.code == 0
    places = [shown.index(f"\n{name}: ") for name in ("model", "method", "data", "train")]
    assert places == sorted(places)
    assert "  method.adapter_size" in shown and "--print-config" in shown


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"{scaleup.__version__}\n"


@pytest.mark.parametrize(
    "words", [[], ["tain"], ["train", "--cofig", "x"], ["plan", "--world", "many"]], ids=" ".join
)
def test_arguments_of_another_shape_are_refused_with_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2 and "usage: scaleup" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ConfigError("train.seed: bad"), 2, "error: 1 problem:\n  - train.seed: bad\n"),
        (ConfigError(["a: 1", "b: 2"]), 2, "error: 2 problems:\n  - a: 1\n  - b: 2\n"),
        (RunError("out of memory"), 1, "error: out of memory\n"),
        (CheckpointError("no manifest"), 2, "error: no manifest\n"),
        (ExportError("logits differ"), 1, "error: logits differ\n"),
        (Preempted("stopped at step 3"), 0, "stopped at step 3\n"),
        (FileNotFoundError(2, "No such file", "x.yaml"), None, "error: No such file: x.yaml\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_command_prints_errors_alike(monkeypatch, capsys, name, error, code, printed):
    for variable in ("RANK", "LOCAL_RANK", "SCALEUP_EXIT_STOPPED"):
        monkeypatch.delenv(variable, raising=False)

    def command(options):
        raise error

    expected = (2 if name in ("plan", "report", "schema") else 1) if code is None else code
    assert run_command(name, command, None) == expected
    assert capsys.readouterr().err.startswith(printed)


def test_only_the_first_process_of_a_host_prints_problems_of_the_config(monkeypatch, capsys):
    def command(options):
        raise ConfigError("train.seed: bad")

    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_command("train", command, None) == 2 and not capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    def command(options):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command("train", command, None)


def test_the_environment_chooses_the_exit_code_of_a_stopped_run(monkeypatch):
    monkeypatch.setenv("SCALEUP_EXIT_STOPPED", "75")
    assert stopped_code() == 75


@pytest.mark.parametrize(
    "start", [["-m", "scaleup", "train"], ["launch/train.py"]], ids=["module", "script"]
)
def test_the_resolved_config_is_printed_without_noise(start, tmp_path):
    words = ["data.name=rte", "model.name=org/model", f"train.output_dir={tmp_path / 'run'}"]
    result = python(*start, *words, "--print-config")
    assert result.returncode == 0 and not result.stderr
    assert "adapter_size: 48" in result.stdout


def test_a_misspelt_key_is_answered_without_noise():
    result = python("-m", "scaleup", "train", "data.name=rte", "train.lerning_rate=1")
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("error: 1 problem:\n  - train.lerning_rate: unknown setting")


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["trian"], "did you mean train?"),
        (["report", "tabel1"], "did you mean table1?"),
        (["bench", "inferense"], "did you mean inference?"),
        (["plan", "--device", "cpux"], "did you mean cpu?"),
        (["train", "--cofig", "x"], "did you mean --config?"),
        (["train", "--data.path=/folder"], "; write data.path=/folder without dashes"),
        (["plan", "--train.seed", "3"], "; write train.seed=VALUE without dashes"),
        (["sweep", "x.yaml", "--data.k=3"], "; write data.k=3 without dashes"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_nearest_one(words, advice, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2 and capsys.readouterr().err.endswith(f"{advice}\n")


def test_attempts_to_reach_the_hub_are_no_noise():
    script = (
        "from scaleup.cli.entry import _quiet_libraries\n"
        "_quiet_libraries()\n"
        "from huggingface_hub.utils import logging\n"
        "logging.get_logger('huggingface_hub.utils._http').warning('Retrying in 1s')\n"
    )
    result = python("-c", script)
    assert result.returncode == 0 and not result.stderr


def test_the_schema_is_written_or_printed(tmp_path, capsys):
    assert main(["schema"]) == 0
    printed = capsys.readouterr().out
    assert main(["schema", "--output", str(tmp_path / "schema.json")]) == 0
    assert (tmp_path / "schema.json").read_text(encoding="utf-8") == printed
    assert json.loads(printed)["title"] == "scaleup run"


def test_a_message_is_never_longer_than_two_kilobytes(capsys):
    problems = [f"data.k: {'x' * 5000}; write {i}" for i in range(100)]

    def fail(options):
        raise ConfigError(problems)

    assert run_command("plan", fail, argparse.Namespace()) == 2
    error = capsys.readouterr().err
    assert len(error) <= 2048 and error.startswith("error: 100 problems:\n  - data.k: xxx")
    assert "; write 0\n" in error and error.endswith(" more; solve these first\n")
    with pytest.raises(SystemExit):
        main(["plan", "--device", "y" * 5000])
    error = capsys.readouterr().err
    assert len(error) < 2048 and "--device: invalid choice: 'yyy" in error


def test_short_messages_are_printed_whole(capsys):
    def fail(options):
        raise ConfigError(["train.seed: ä", "train.x: b"])

    assert run_command("plan", fail, argparse.Namespace()) == 2
    assert capsys.readouterr().err == "error: 2 problems:\n  - train.seed: ä\n  - train.x: b\n"


def test_the_home_of_an_unknown_user_is_no_folder_to_write_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["schema", "--output", "~nobody-of-this-name/schema.json"])
    assert ended.value.code == 2 and list(tmp_path.iterdir()) == []
    assert "--output: ~nobody-of-this-name has no home folder here" in capsys.readouterr().err


def test_a_tilde_that_the_shell_left_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["schema", "--output=~/schema.json"]) == 0
    assert (tmp_path / "schema.json").is_file()


@pytest.mark.parametrize("kind", ["folder", "pipe", "long name"])
def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr("scaleup.memory.plan.make_plan", lambda *_: pytest.fail("planned"))
    path = tmp_path / ("x" * 300 if kind == "long name" else "output")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    before = sorted(tmp_path.iterdir())
    assert main(["schema", "--output", str(path)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and len(shown.splitlines()) == 1
    if kind != "pipe":  # whether a process reads a pipe is known when it is written to
        assert main(["plan", "--json", str(path), "data.name=rte", "model.name=x"]) == 2
        assert f"--json: {path} cannot be written: " in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "words",
    [
        ["schema", "--output=--"],
        ["schema", "--output=\udcff"],
        ["report", "table1", "--runs=\udcff"],
        ["export", "--output=--", "--checkpoint", "x"],
        ["train", "data.train_file=\udcff"],
    ],
)
def test_words_that_are_no_values_or_no_text_are_refused(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "it is not UTF-8 text" in last or "-- is not a value" in last
