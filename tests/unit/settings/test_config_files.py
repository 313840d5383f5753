"""The files in configs/: the ones to start from, the ZeRO presets, the schema for editors."""

import json
import pathlib

import pytest

from scaleup.settings import rules
from scaleup.settings import schema as config
from scaleup.settings.describe import json_schema

CONFIGS = pathlib.Path(__file__).resolve().parents[3] / "configs"
PRESETS = CONFIGS.parent / "scaleup" / "settings" / "deepspeed"


def test_the_schema_for_editors_is_current():
    assert json.loads((CONFIGS / "schema.json").read_text(encoding="utf-8")) == json_schema(), (
        "run `make schema`"
    )


@pytest.mark.parametrize("name", rules.ZERO_PRESETS)
def test_a_zero_preset_leaves_to_the_trainer_what_the_trainer_knows(name):
    preset = json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8"))
    assert preset["zero_optimization"]["stage"] == int(name[4])
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert preset[key] == "auto"
    assert preset["bf16"]["enabled"] == preset["fp16"]["enabled"] == "auto"
    assert "optimizer" not in preset and "scheduler" not in preset, (
        "the Trainer's own AdamW is meant"
    )
    offloaded = {
        key: value
        for key, value in preset["zero_optimization"].items()
        if key.startswith("offload")
    }
    assert set(offloaded) == (
        {"offload_optimizer", "offload_param"} if name.endswith("offload") else set()
    )
    assert all(value == {"device": "cpu", "pin_memory": True} for value in offloaded.values())
    # Otherwise Accelerate replaces the Trainer's AdamW by DeepSpeed's CPU version, which has to be
    # compiled on the user's machine.
    assert preset.get("zero_force_ds_cpu_optimizer", True) != bool(offloaded)


def test_every_zero_preset_has_a_file_and_the_other_way_round():
    assert {path.stem for path in (PRESETS).glob("*.json")} == set(rules.ZERO_PRESETS)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_config_that_comes_with_the_project_loads_and_says_where_its_schema_is(
    path, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # its runs/… must not meet what lies in the checkout
    assert config.load(str(path)).train.output_dir.startswith("runs/")
    assert path.read_text(encoding="utf-8").startswith(
        "# yaml-language-server: $schema=./schema.json\n"
    )
