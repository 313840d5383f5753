"""The wheel: built, installed into an environment of its own, and used from another folder."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from tests.utils.workspace import environment, make_workspace, overrides

ROOT = pathlib.Path(__file__).resolve().parents[2]
PRESETS = ("zero1", "zero2", "zero3", "zero3_hpz", "zero3_offload")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Build the wheel from a copy of the sources, without network access."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(
        ROOT / "scaleup", source / "scaleup", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source))
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> pathlib.Path:
    """Install the wheel into a new environment that shares only the dependencies with this one.

    A path in a `.pth` file gives access to this environment's packages. The `.pth` files there are
    not followed, so an editable installation of scaleup stays out of sight.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "bin" / "python")
    pip("--python", python, "install", "--no-deps", "--no-index", str(wheel))
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def trained(installed, workspace) -> pathlib.Path:
    """Train a tiny model under ZeRO-2 with the installed command."""
    settings = overrides(workspace, pathlib.Path("run"), "train.deepspeed=zero2")
    scaleup(installed, workspace, "train", *settings, "train.max_steps=4")
    return workspace / "run"


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def scaleup(installed: pathlib.Path, folder: pathlib.Path, *arguments: str) -> str:
    """Run the installed command in `folder` and return what it prints."""
    search_path = [str(installed / "bin"), sysconfig.get_path("scripts"), os.environ["PATH"]]
    variables = environment(PATH=os.pathsep.join(search_path))
    variables.pop("PYTHONPATH", None)
    command = [str(installed / "bin" / "scaleup"), *arguments]
    process = subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def test_wheel_has_presets_paper_numbers_and_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert {f"scaleup/settings/deepspeed/{name}.json" for name in PRESETS} <= set(names)
    assert "scaleup/experiments/paper.yaml" in names
    assert "scaleup/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith(("scaleup/", "scaleup-")) for name in names)
    assert "License-Expression: Apache-2.0" in metadata


def test_help_lists_every_command(installed, tmp_path):
    text = scaleup(installed, tmp_path, "--help")
    for name in ("train", "plan", "export", "sweep", "report", "bench"):
        assert f"\n  {name} " in text


@pytest.mark.parametrize("name", ["sweep", "report", "bench"])
def test_every_command_imports_what_it_needs(installed, tmp_path, name):
    assert "usage: scaleup " + name in scaleup(installed, tmp_path, name, "--help")


def test_package_is_imported_from_the_wheel(installed, tmp_path):
    python = str(installed / "bin" / "python")
    code = "import scaleup; print(scaleup.__version__, scaleup.__file__)"
    output = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True
    ).stdout
    assert str(installed) in output


def test_config_resolves_with_a_preset_of_the_wheel(installed, workspace):
    settings = overrides(workspace, pathlib.Path("unused"), "train.deepspeed=zero2")
    text = scaleup(installed, workspace, "train", "--print-config", *settings)
    assert "deepspeed: zero2" in text


def test_memory_is_planned_from_another_folder(installed, workspace):
    settings = overrides(workspace, pathlib.Path("planned"), "train.deepspeed=zero2")
    text = scaleup(
        installed, workspace, "plan", "--world", "2", "--configured", "--device", "cpu", *settings
    )
    assert "zero2" in text.lower().replace("-", "")


def test_model_is_trained_under_zero2(trained):
    assert (trained / "results.json").exists()
    assert (trained / "best" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_trained_model_is_exported(installed, workspace, trained):
    arguments = ("--checkpoint", "run/best", "--kind", "standalone", "--output", "exported")
    scaleup(installed, workspace, "export", *arguments)
    assert (workspace / "exported" / "model.safetensors").exists()
