"""LoRA on all linear layers under ZeRO-3 and FSDP, on two real processes (gloo)."""

import json
import pathlib

import pytest
from safetensors.torch import load_file

from benchmarks.cases import start_cases
from tests.utils.workspace import ROOT, add_writer, environment, losses, make_workspace, writing

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
VARIANTS = {
    "plain": [],
    "checkpointing": ["train.gradient_checkpointing=true"],
    "8bit": ["model.quantization=8bit"],
}


@pytest.fixture(scope="module", params=["llama", "t5"])
def runs(request, tmp_path_factory) -> pathlib.Path:
    """Runs with a global batch of 16: on one process, and `<engine>-<variant>` on two."""
    folder = make_workspace(tmp_path_factory.mktemp(request.param))
    family, task = request.param, "seq2seq" if request.param == "t5" else "causal_lm"
    # Masks of dropout depend on the number of processes.
    add_writer(folder, family, **({"dropout_rate": 0.0} if family == "t5" else {}))
    path = ROOT / "scaleup" / "settings" / "deepspeed" / "zero3.json"
    config = json.loads(path.read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "zero3.json").write_text(json.dumps(config))
    engines = {"zero3": f"train.deepspeed={folder / 'zero3.json'}", "fsdp": "train.fsdp=full"}

    def case(name: str, *more: str) -> list[str]:
        shared = ("train.max_steps=6", "train.group_by_length=false", "data.metric=loss")
        targets = ("method.lora_targets=all-linear", "method.prefix_hidden_size=16")
        return writing(folder, folder / name, family, task, *shared, *targets, *more)

    one = {
        f"one-{name}": case(f"one-{name}", "train.per_device_train_batch_size=16", *changes)
        for name, changes in VARIANTS.items()
    }
    two = {
        f"{engine}-{name}": case(
            f"{engine}-{name}", setting, "train.per_device_train_batch_size=8", *changes
        )
        for engine, setting in engines.items()
        for name, changes in VARIANTS.items()
    }
    for processes, cases in ((1, one), (2, two)):
        file = folder / f"cases{processes}.json"
        found = start_cases(cases, file, processes, timeout=900, env=environment())
        assert found == dict.fromkeys(cases)
    return folder


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_equal_one(runs, engine, variant):
    one, two = runs / f"one-{variant}", runs / f"{engine}-{variant}"
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    trained = [load_file(run / "final" / "adapter_model.safetensors") for run in (one, two)]
    assert trained[0].keys() == trained[1].keys()
    assert any(".unipelt_linear.unipelt_gate." in name for name in trained[0])
    if variant != "8bit":  # there, one process has the layers of bitsandbytes
        assert max((trained[0][n] - trained[1][n]).abs().max().item() for n in trained[0]) < 1e-5
