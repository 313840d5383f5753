"""What two processes exchange in a save, and which of them reads files, under ZeRO-3."""

import json
import pathlib
import socket
import subprocess
import sys

import pytest
from safetensors import safe_open
from transformers import AutoModel

from tests.utils.workspace import ROOT, environment, make_workspace, overrides

pytestmark = pytest.mark.distributed
# argv: the root of the repository, a file for what is measured, and the config. Every collective of
# Python passes the dispatcher of torch, whoever calls it.
SCRIPT = """
import builtins, json, os, pathlib, sys
sys.path.insert(0, sys.argv[1])
import safetensors
opened = []
def recording(function):
    def wrapped(path, *args, **kwargs):
        opened.append(str(path))
        return function(path, *args, **kwargs)
    return wrapped
safetensors.safe_open = recording(safetensors.safe_open)

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from scaleup.settings import schema
from scaleup.training import distributed, run
from scaleup.training.preflight import CHECKS
from scaleup.training.trainer import RunTrainer

settings = schema.load(None, sys.argv[3:], checks=CHECKS)
opened.clear()
pathlib.Path.open = recording(pathlib.Path.open)

class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.bytes = {}
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            # The larger of what goes in and what comes out.
            sizes = [sum(t.nbytes for t in tensors(arg)) for arg in args]
            name = str(function)
            self.bytes[name] = self.bytes.get(name, 0) + max(sizes, default=0)
        return function(*args, **(kwargs or {}))

def tensors(value):
    if torch.is_tensor(value):
        return [value]
    entries = value if isinstance(value, (list, tuple)) else []
    return [t for entry in entries for t in tensors(entry)]

saves = []
def counted(method):
    def wrapped(self, *args):
        with Collectives() as mode:
            result = method(self, *args)
        saves.append(mode.bytes)
        return result
    return wrapped
RunTrainer._save_checkpoint = counted(RunTrainer._save_checkpoint)
run.run(settings)
path = pathlib.Path(sys.argv[2] + os.environ["RANK"])
path.write_text(json.dumps({"opened": opened, "saves": saves}))
distributed.leave()
"""


def run(folder: pathlib.Path, *words: str) -> list[dict]:
    """Train on two processes, and return what each has measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(ROOT), str(folder / "measured"), *words],
            env=environment(**variables, RANK=str(rank), LOCAL_RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return [json.loads((folder / f"measured{rank}").read_text()) for rank in range(2)]


def size(path: pathlib.Path) -> int:
    """Return the bytes of the tensors in a file, without the random states of processes."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if not name.startswith("rng/")]  # noqa: SIM118
        return sum(file.get_tensor(name).nbytes for name in names)


@pytest.mark.slow
def test_a_save_moves_what_is_trained_and_one_process_reads(tmp_path):
    workspace = make_workspace(tmp_path)
    backbone = AutoModel.from_pretrained(workspace / "bert")
    backbone.resize_token_embeddings(40_000)
    backbone.save_pretrained(workspace / "bert")
    frozen = 4 * sum(p.numel() for p in backbone.parameters())
    preset = ROOT / "scaleup" / "settings" / "deepspeed" / "zero3.json"
    config = json.loads(preset.read_text())
    # By default tiny parameters stay whole, and a save would not have to gather them.
    for key in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance"):
        config["zero_optimization"][f"stage3_{key}"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    out = tmp_path / "run"
    words = overrides(
        workspace,
        out,
        f"train.deepspeed={tmp_path / 'zero3.json'}",
        "train.disable_tqdm=true",
        "train.per_device_train_batch_size=8",
        "method.prefix_hidden_size=512",
    )
    first = run(tmp_path, *words, "train.max_steps=4")
    second = run(tmp_path, *words, "train.max_steps=8", "train.resume=auto")
    folder = out / "checkpoint-8"
    stored = size(folder / "adapter_model.safetensors") + size(
        folder / "training_state.safetensors"
    )
    assert frozen > 3 * stored
    for measured in first, second:
        moved = [sum(save.values()) for rank in (0, 1) for save in measured[rank]["saves"]]
        assert len(moved) == 2 and max(moved) <= 1.1 * stored
        assert min(moved) > stored / 2  # the other process sends its half of the optimizer's state
        assert str(workspace / "bert" / "model.safetensors") in measured[0]["opened"]
        assert not [path for path in measured[1]["opened"] if path.endswith(".safetensors")]
    assert any("checkpoint-4/training_state.safetensors" in p for p in second[0]["opened"])
