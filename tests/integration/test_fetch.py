"""Model and data are fetched once, and then used without internet access."""

import pathlib
import subprocess
import sys

import pytest

from tests.utils.hub import hub
from tests.utils.workspace import ROOT, environment, make_workspace, overrides

MODEL = "someone/tiny-bert"


def scaleup(command: str, words: list[str], **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "scaleup", command, *words],
        capture_output=True,
        text=True,
        env=environment(**more),
        cwd=ROOT,
    )


@pytest.mark.slow
def test_a_fetched_model_trains_without_internet_access(tmp_path):
    folder = make_workspace(tmp_path / "workspace")
    cache = tmp_path / "cache"
    words = [
        *(w for w in overrides(folder, tmp_path / "run") if not w.startswith("model.name")),
        f"model.name={MODEL}",
        "train.max_steps=2",
    ]
    with hub(folder / "bert", MODEL) as (address, asked):
        done = scaleup("prepare", [*words, f"--fetch={cache}"], HF_ENDPOINT=address)
        assert done.returncode == 0, done.stderr[-2000:]
        assert any(path.endswith("/model.safetensors") for path in asked)
    assert f"HF_HOME={cache} HF_HUB_OFFLINE=1 scaleup train" in done.stdout
    offline = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": address}
    done = scaleup("train", words, **offline)
    assert done.returncode == 0, done.stderr[-2000:]
    assert pathlib.Path(tmp_path, "run", "results.json").is_file()


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_named_in_one_line(tmp_path):
    folder = make_workspace(tmp_path / "workspace")
    words = [w for w in overrides(folder, tmp_path / "run") if not w.startswith("model.name")]
    more = [f"model.name={MODEL}", f"--fetch={tmp_path / 'cache'}"]
    done = scaleup("prepare", [*words, *more], HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    assert "the hub could not be reached" in done.stderr and "Traceback" not in done.stderr
