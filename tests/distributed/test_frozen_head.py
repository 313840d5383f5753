"""A frozen head under ZeRO on two real processes: saved, resumed, equal to one process."""

import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.cases import start_cases
from tests.utils.workspace import ROOT, environment, make_workspace, overrides

pytestmark = pytest.mark.distributed
STAGES = ("zero2", "zero3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> pathlib.Path:
    """LoRA on `one` process, on two with each stage, and with each stage after a resume."""
    folder = make_workspace(tmp_path_factory.mktemp("runs"))
    config = json.loads((ROOT / "scaleup" / "settings" / "deepspeed" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "zero3.json").write_text(json.dumps(config))

    def case(name: str, *more: str) -> list[str]:
        shared = ("method.submodules=[lora]", "method.head=frozen", "train.learning_rate=0.01")
        schedule = ("train.lr_scheduler_type=constant", "train.warmup_steps=0", "train.max_steps=4")
        steps = ("train.group_by_length=false", "train.eval_strategy=steps", "train.eval_steps=2")
        return overrides(folder, folder / name, *shared, *schedule, *steps, *more)

    cases = {}
    for stage in STAGES:
        file = stage if stage == "zero2" else str(folder / "zero3.json")
        two = (f"train.deepspeed={file}", "train.per_device_train_batch_size=8")
        cases[f"{stage}-whole"] = case(f"{stage}-whole", *two)
        cases[f"{stage}-first"] = case(f"{stage}-parts", *two, "train.max_steps=2")
        cases[f"{stage}-second"] = case(f"{stage}-parts", *two, "train.resume=auto")
    for number, some in ((1, {"one": case("one")}), (2, cases)):
        path = folder / f"cases{number}.json"
        problems = start_cases(some, path, number, timeout=900, env=environment())
        assert problems == dict.fromkeys(some)
    return folder


def tensors(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_a_frozen_head_is_saved_whole_and_unchanged(runs, stage, kind):
    one, many = tensors(runs / "one"), tensors(runs / f"{stage}-{kind}")
    assert one.keys() == many.keys()
    head = [name for name in one if "classifier" in name]
    assert len(head) == 2 and all(torch.equal(one[name], many[name]) for name in head)
    assert max((one[name] - many[name]).abs().max().item() for name in one) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_uninterrupted_one(runs, stage):
    whole, parts = (tensors(runs / f"{stage}-{kind}") for kind in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
