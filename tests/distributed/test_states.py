"""A run goes on with other processes and engines, and equals one that was never stopped."""

import json
import pathlib
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from benchmarks.cases import start_cases
from tests.utils.workspace import ROOT, environment, losses, make_workspace, overrides

pytestmark = pytest.mark.distributed
# Four steps of 16 examples in an epoch, in groups of similar length. A run is stopped after each
# three steps, and the rates of this schedule do not depend on where it is going to end.
SHARED = (
    "train.lr_scheduler_type=inverse_sqrt",
    "train.warmup_steps=2",
    "train.weight_decay=0.1",
    "train.gate_learning_rate=0.01",
    "train.eval_strategy=steps",
    "train.eval_steps=3",
    "train.resume=auto",
)
PART = 3  # steps


class Chains:
    """Runs that continue with other processes or engines, in one folder."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.workspace = folder, make_workspace(folder)
        # Parameters below the default threshold are never shared out: all of a tiny model's.
        preset = ROOT / "scaleup" / "settings" / "deepspeed" / "zero3.json"
        config = json.loads(preset.read_text())
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (folder / "zero3.json").write_text(json.dumps(config))

    def words(self, name: str, engine: str, steps: int, *more: str) -> list[str]:
        file = str(self.folder / "zero3.json") if engine == "zero3" else engine
        chosen = {"plain": (), "fsdp": ("train.fsdp=full",)}
        parallel = chosen.get(engine, (f"train.deepspeed={file}",))
        length = f"train.max_steps={steps}"
        out = self.folder / name
        return overrides(self.workspace, out, *SHARED, *parallel, length, *more)

    def run(self, processes: int, *parts: tuple[str, str, int], more: tuple[str, ...] = ()) -> None:
        """Train parts of runs one after another in the same processes.

        Args:
            parts: name of a run, its engine now, and the step at which the part ends.
        """
        path = self.folder / "cases.json"
        cases = {
            f"{name} {steps}": self.words(name, engine, steps, *more)
            for name, engine, steps in parts
        }
        found = start_cases(cases, path, processes, timeout=500, env=environment())
        assert found == dict.fromkeys(cases), found

    def assert_equal(self, name: str) -> None:
        """Compare a run with the one that one process trained without a stop."""
        one, other = self.folder / "one", self.folder / name
        assert losses(one, "step") == losses(other, "step")
        for key, tolerance in (("loss", 1e-5), ("eval_loss", 1e-5), ("learning_rate", 0)):
            assert losses(other, key) == pytest.approx(losses(one, key), abs=tolerance, rel=0)
        whole, parts = (
            load_file(run / "final" / "adapter_model.safetensors") for run in (one, other)
        )
        assert whole.keys() == parts.keys()
        assert max((whole[key] - parts[key]).abs().max().item() for key in whole) < 1e-5


@pytest.fixture(scope="module")
def chains(tmp_path_factory) -> Chains:
    """One process trains `one` to its end, and the first part of the others."""
    chains = Chains(tmp_path_factory.mktemp("chains"))
    chains.run(1, ("one", "plain", 12), ("engines", "plain", 3), ("processes", "plain", 3))
    return chains


def test_a_run_goes_from_one_process_to_two_and_through_all_engines(chains):
    chains.run(2, ("engines", "zero2", 6), ("engines", "zero3", 9))
    chains.run(2, ("engines", "fsdp", 12))
    chains.assert_equal("engines")
    state = chains.folder / "engines" / "checkpoint-12" / "training_state.json"
    assert json.loads(state.read_text())["processes"] == 2


@pytest.mark.slow
def test_a_run_goes_from_one_process_to_two_four_and_two(chains):
    """The last part has two forward passes per step."""
    chains.run(2, ("processes", "plain", 6))
    chains.run(4, ("processes", "plain", 9))
    chains.run(
        2,
        ("processes", "plain", 12),
        more=("train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=2"),
    )
    chains.assert_equal("processes")


@pytest.mark.slow
def test_a_run_comes_back_from_deepspeed_to_one_process(chains):
    chains.run(1, ("back", "zero1", 3))
    chains.run(2, ("back", "zero3", 6), ("back", "zero2", 9))
    chains.run(1, ("back", "plain", 12))
    chains.assert_equal("back")


@pytest.mark.slow
def test_a_run_of_fsdp_continues_with_deepspeed_and_comes_back(chains):
    more = ("train.per_device_train_batch_size=8",)
    chains.run(2, ("sharded", "fsdp", 3), more=more)
    chains.run(2, ("sharded", "zero3", 6), ("sharded", "plain", 9), more=more)
    chains.run(2, ("sharded", "fsdp", 12), more=more)
    chains.assert_equal("sharded")


@pytest.mark.slow
def test_a_whole_model_with_tied_weights_goes_through_deepspeed(tmp_path):
    chains = Chains(tmp_path)
    full = ("method.name=full", f"model.name={tmp_path / 'bart'}", "train.learning_rate=1e-3")
    full += ("train.gate_learning_rate=null",)
    chains.run(1, ("one", "plain", 6), ("parts", "zero3", 3), ("parts", "zero2", 6), more=full)
    one, parts = (load_file(tmp_path / n / "final" / "model.safetensors") for n in ("one", "parts"))
    assert one.keys() == parts.keys()
    assert max((one[name] - parts[name]).abs().max().item() for name in one) < 1e-5
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


# argv: the root of the repository, and a file with cases. What an engine loads equals the file.
SCRIPT = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
from safetensors.torch import load_file
from benchmarks.cases import run_cases
from scaleup.training import training_state

load = training_state.load
def checked(folder, world, engine, model, state):
    result = load(folder, world, engine, model, state)
    found, stored = engine.read().tensors, load_file(folder / "training_state.safetensors")
    stored = {name: tensor for name, tensor in stored.items() if not name.startswith("rng/")}
    different = found.keys() ^ stored.keys()  # engines have masters or not
    assert all(name.startswith("master/") for name in different), different
    for name in found.keys() & stored.keys():
        assert found[name].double().equal(stored[name].double()), name
    print("compared", len(found.keys() & stored.keys()), flush=True)
    return result
training_state.load = checked
cases = json.loads(pathlib.Path(sys.argv[2]).read_text())
found = run_cases(cases)
assert found == dict.fromkeys(cases), found
"""


@pytest.mark.slow
def test_masters_and_moments_survive_every_engine_in_bfloat16(tmp_path):
    chains = Chains(tmp_path)
    engines = ["plain", "zero1", "zero2", "zero3", "zero3_offload", "zero1", "plain"]
    ends = {PART * number: engine for number, engine in enumerate(engines, 1)}
    cases = {
        str(end): chains.words("run", engine, end, "train.bf16=true", "train.keep_checkpoints=9")
        for end, engine in ends.items()
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT), str(tmp_path / "cases.json")],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("compared") == len(engines) - 1
    for end, engine in ends.items():
        state = load_file(tmp_path / "run" / f"checkpoint-{end}" / "training_state.safetensors")
        assert {t.item() for name, t in state.items() if name.startswith("step/")} == {end}
        assert any(name.startswith("master/") for name in state) == (engine != "plain")
