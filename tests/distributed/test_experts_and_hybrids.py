"""Decoders with experts or with linear attention: sharded weights train as whole ones do."""

import json
import pathlib

import pytest
from safetensors.torch import load_file

from benchmarks.cases import start_cases
from tests.utils.workspace import ROOT, add_writer, environment, losses, writing

pytestmark = pytest.mark.distributed
FAMILIES = [
    "qwen3_moe",
    *(
        pytest.param(family, marks=pytest.mark.slow)
        for family in (
            "qwen3_next",  # has both
            "gpt_oss",
            "mixtral",
            "glm4_moe",
            "falcon_h1",
            "lfm2",
            "qwen3_5_text",
        )
    ),
]


@pytest.fixture(scope="module", params=FAMILIES)
def runs(request, tmp_path_factory) -> pathlib.Path:
    """Runs of one family: `one` process, and two with FSDP and with ZeRO-3."""
    folder, family = tmp_path_factory.mktemp(request.param), request.param
    add_writer(folder, family)
    # Parameters below the default threshold are never shared out: all of a tiny model's.
    preset = ROOT / "scaleup" / "settings" / "deepspeed" / "zero3.json"
    config = json.loads(preset.read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "zero3.json").write_text(json.dumps(config))
    eager = ["model.attention=eager"] if family == "gpt_oss" else []

    def words(name: str, *more: str) -> list[str]:
        steps = ("train.max_steps=3", "train.lr_scheduler_type=constant")
        return writing(folder, folder / name, family, "causal_lm", *steps, *eager, *more)

    batch = "train.per_device_train_batch_size=8"
    sharded = {
        "fsdp": words("fsdp", batch, "train.fsdp=full"),
        "zero3": words("zero3", batch, f"train.deepspeed={folder / 'zero3.json'}"),
    }
    for processes, cases in ((1, {"one": words("one")}), (2, sharded)):
        path = folder / f"cases{processes}.json"
        assert start_cases(cases, path, processes, timeout=300, env=environment()) == dict.fromkeys(
            cases
        )
    return folder


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_sharded_weights_give_the_losses_and_tensors_of_one_process(runs, engine):
    assert losses(runs / engine) == pytest.approx(losses(runs / "one"), abs=1e-5)
    one, two = (
        load_file(runs / name / "final" / "adapter_model.safetensors") for name in ("one", engine)
    )
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
