"""Several processes of a host ask the hub no more often than one process does."""

import collections

import pytest

from benchmarks.cases import start_cases
from tests.utils.hub import hub
from tests.utils.workspace import environment, losses, make_workspace, overrides

pytestmark = pytest.mark.distributed
MODEL = "someone/tiny-bert"


def asked_by(folder, processes: int) -> collections.Counter:
    """Train from an empty cache, and return how often each path of the hub was asked for."""
    batch = f"train.per_device_train_batch_size={16 // processes}"
    out = folder / f"run{processes}"
    words = [w for w in overrides(folder, out, "train.max_steps=2", batch) if "model.name" not in w]
    with hub(folder / "bert", MODEL) as (address, asked):
        more = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": f"{out}-cache"}
        found = start_cases(
            {"run": [f"model.name={MODEL}", *words]},
            folder / "cases.json",
            processes,
            timeout=300,
            env=environment(**more),
        )
    assert found == {"run": None}
    return collections.Counter(path.rpartition("/")[2] for path in asked)


@pytest.mark.slow
def test_one_process_of_a_host_talks_to_the_hub(tmp_path):
    folder = make_workspace(tmp_path)
    one, two = asked_by(folder, 1), asked_by(folder, 2)
    assert one["model.safetensors"] >= 1
    assert two["model.safetensors"] == one["model.safetensors"]
    # The first process asks for a few small files twice: before the others, and with them.
    assert two.total() < 2 * one.total()
    assert losses(tmp_path / "run2") == pytest.approx(losses(tmp_path / "run1"), abs=1e-5)


@pytest.mark.slow
def test_a_model_that_no_process_can_download_is_named_in_one_line(tmp_path):
    folder = make_workspace(tmp_path)
    words = [w for w in overrides(folder, tmp_path / "run") if "model.name" not in w]
    more = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": f"{tmp_path}/c"}
    cases = {"run": [f"model.name={MODEL}", *words]}
    found = start_cases(cases, folder / "cases.json", 2, timeout=300, env=environment(**more))
    assert "the hub could not be reached" in (found["run"] or "")
