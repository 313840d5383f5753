"""DeepSpeed and FSDP on two real processes (gloo): every engine equals one process."""

import json
import pathlib

import pytest
from safetensors.torch import load_file

from benchmarks.cases import start_cases
from tests.utils.workspace import ROOT, environment, losses, make_workspace, overrides

pytestmark = pytest.mark.distributed
VARIANTS = {
    "plain": ["train.per_device_train_batch_size=8"],
    "both": [  # accumulation and checkpointing
        "train.per_device_train_batch_size=4",
        "train.gradient_accumulation_steps=2",
        "train.gradient_checkpointing=true",
    ],
}
CASES = [
    ("zero1", "plain"),
    ("zero2", "both"),
    *(("zero3", variant) for variant in VARIANTS),
    ("hpz", "both"),
    ("fsdp", "both"),
]
BART = [
    *(("zero2", "both"), ("zero3", "both"), ("zero2", "8bit"), ("zero3", "8bit")),
    *(("hpz", "both"), ("hpz", "8bit"), ("fsdp", "both"), ("fsdp", "8bit")),
]
BERT = [(stage, kind) for stage in ("zero2", "zero3") for kind in ("8bit", "nf4")]
BERT += [("fsdp", "8bit")]
QUANTISED = [("8bit", "zero3"), ("8bit", "fsdp"), ("8bit", "hpz"), ("nf4", "zero3")]


def run_cases(cases: dict[str, list[str]], processes: int, folder: pathlib.Path) -> None:
    """launch/cases.py; every case must succeed."""
    found = start_cases(
        cases, folder / f"cases{processes}.json", processes, timeout=900, env=environment()
    )
    assert found == dict.fromkeys(cases)


@pytest.fixture(scope="module", params=["bert", pytest.param("bart", marks=pytest.mark.slow)])
def runs(request, tmp_path_factory) -> pathlib.Path:
    """Runs of one family with a global batch of 16: `one` process, `<stage>-<variant>` on two."""
    folder = tmp_path_factory.mktemp(request.param)
    workspace = make_workspace(folder)
    # Parameters below the default threshold are never shared out, and all of a tiny model's are.
    stages = {stage: f"train.deepspeed={stage}" for stage in ("zero1", "zero2")}
    for stage, preset in (("zero3", "zero3"), ("hpz", "zero3_hpz")):
        path = ROOT / "scaleup" / "settings" / "deepspeed" / f"{preset}.json"
        config = json.loads(path.read_text())
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (folder / f"{stage}.json").write_text(json.dumps(config))
        stages[stage] = f"train.deepspeed={folder / stage}.json"
    stages["fsdp"] = "train.fsdp=full"

    def case(name: str, *more: str) -> list[str]:
        shared = ("train.max_steps=6", "train.group_by_length=false", "model.head_bias=prior")
        return overrides(workspace, folder / name, *shared, *more, family=request.param)

    run_cases(
        {"one": case("one"), "one-8bit": case("one-8bit", "model.quantization=8bit")}, 1, folder
    )
    changes = VARIANTS | {
        kind: [f"model.quantization={kind}", *VARIANTS["plain"]] for kind in ("8bit", "nf4")
    }
    pairs = BART if request.param == "bart" else [*CASES, *BERT]
    run_cases(
        {
            f"{stage}-{name}": case(f"{stage}-{name}", stages[stage], *changes[name])
            for stage, name in pairs
        },
        2,
        folder,
    )
    return folder


@pytest.mark.parametrize("stage, variant", CASES)
def test_losses_and_trained_tensors_equal_one_process(runs, stage, variant):
    if not (runs / f"{stage}-{variant}").exists():
        pytest.skip("of BART only the fullest variant, to save time")
    assert losses(runs / f"{stage}-{variant}") == pytest.approx(losses(runs / "one"), abs=1e-5)
    one, many = (
        load_file(runs / name / "final" / "adapter_model.safetensors")
        for name in ("one", f"{stage}-{variant}")
    )
    assert one.keys() == many.keys()
    worst = max((one[name] - many[name]).abs().max().item() for name in one)
    assert worst < 1e-5


@pytest.mark.parametrize("kind, engine", QUANTISED)
def test_a_quantised_backbone_gives_the_losses_of_zero2_if_it_is_sharded(runs, kind, engine):
    """8 bit: bitsandbytes' own layer against ours."""
    if not (runs / f"{engine}-{kind}").exists():
        pytest.skip("of BART only 8 bit, and hpZ only of BART, to save time")
    expected = losses(runs / f"zero2-{kind}")
    assert losses(runs / f"{engine}-{kind}") == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_bitsandbytes_in_one_process_gives_the_losses_of_a_sharded_backbone(runs, engine):
    assert losses(runs / f"{engine}-8bit") == pytest.approx(losses(runs / "one-8bit"), abs=1e-5)
