"""FSDP beyond what tests/distributed/test_zero.py compares: loading, writing, hosts, resuming."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import multiprocessing
from transformers import AutoModelForSequenceClassification

from benchmarks.cases import start_cases
from scaleup.backbone import fsdp
from scaleup.backbone.loading import load_config, load_model
from scaleup.settings.schema import ModelSettings
from tests.distributed.test_multinode import free_port
from tests.utils.workspace import (
    ROOT,
    add_writer,
    environment,
    losses,
    make_workspace,
    overrides,
    writing,
)

pytestmark = pytest.mark.distributed


def _load(rank: int, folder: pathlib.Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    settings = ModelSettings(name=str(folder / "bert"))
    kind = (load_config(settings), AutoModelForSequenceClassification, torch.float32)
    mesh = fsdp.make_mesh("full", "cpu", 2, 2)
    model, _ = load_model(settings, *kind, torch.device("cpu"), mesh=mesh)
    stored = dict(model.named_parameters())
    shapes = {
        name: tuple((p.to_local() if hasattr(p, "to_local") else p).shape)
        for name, p in stored.items()
    }
    whole = {n: p.full_tensor() if hasattr(p, "to_local") else p for n, p in stored.items()}
    torch.save((shapes, {n: p.detach() for n, p in whole.items()}), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_each_process_reads_its_rows_of_frozen_matrices(tmp_path):
    make_workspace(tmp_path)
    multiprocessing.spawn(_load, (tmp_path,), nprocs=2)
    saved = load_file(tmp_path / "bert" / "model.safetensors")
    rows = {}
    for rank in range(2):
        shapes, whole = torch.load(tmp_path / f"{rank}.pt")
        for name, shape in shapes.items():
            if not name.startswith("classifier"):
                expected = saved[name.removeprefix("bert.")]
                assert torch.equal(whole[name], expected)
                rows.setdefault(name, []).append(shape[0])
                assert shape[1:] == expected.shape[1:]
    vocabulary = "bert.embeddings.word_embeddings.weight"
    assert rows[vocabulary] == [10, 9]
    assert rows["bert.encoder.layer.0.output.LayerNorm.weight"] == [32, 32]
    assert rows["bert.encoder.layer.0.output.dense.weight"] == [16, 16]


def final(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "adapter_model.safetensors")


def worst(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> pathlib.Path:
    """Runs on two processes: writing models, bfloat16, and a run that DDP continues."""
    folder = tmp_path_factory.mktemp("runs")
    make_workspace(folder)
    add_writer(folder, "llama")
    add_writer(folder, "t5")
    cases = {}
    for engine, words in (("fsdp", ["train.fsdp=full"]), ("ddp", [])):
        common = ["train.max_steps=4", "train.per_device_train_batch_size=8", *words]
        for family, task in (("llama", "causal_lm"), ("t5", "seq2seq")):
            more = [*common, "data.metric=loss"]
            name = f"{family}-{engine}"
            cases[name] = writing(folder, folder / name, family, task, *more)
        half = [*common, "train.bf16=true", "train.gradient_checkpointing=true"]
        cases[f"bf16-{engine}"] = overrides(folder, folder / f"bf16-{engine}", *half)
        long = [*common[1:], "train.max_steps=8", "train.eval_strategy=steps", "train.eval_steps=4"]
        cases[f"long-{engine}"] = overrides(folder, folder / f"long-{engine}", *long)
    out = folder / "long-fsdp"
    cases["continued"] = [*cases["long-ddp"], "train.resume=auto", f"train.output_dir={out}"]
    first = {name: cases[name] for name in cases if name != "continued"}
    assert start_cases(first, folder / "first.json", 2, env=environment()) == dict.fromkeys(first)
    (out / "complete").mkdir()
    for name in ("results.json", "final", "best", "checkpoint-8"):
        (out / name).rename(out / "complete" / name)
    last = {"continued": cases["continued"]}
    assert start_cases(last, folder / "last.json", 2, env=environment()) == dict.fromkeys(last)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5", "bf16"])
def test_training_equals_that_of_ddp(runs, name):
    one, other = runs / f"{name}-ddp", runs / f"{name}-fsdp"
    assert losses(other) == pytest.approx(losses(one), abs=1e-5)
    assert losses(other, "eval_loss") == pytest.approx(losses(one, "eval_loss"), abs=1e-5)
    assert worst(final(one), final(other)) < 1e-5


@pytest.mark.slow
def test_ddp_continues_a_checkpoint_of_fsdp(runs):
    complete = final(runs / "long-fsdp" / "complete")
    assert worst(final(runs / "long-fsdp"), complete) < 1e-6
    assert worst(final(runs / "long-ddp"), complete) < 1e-5


@pytest.mark.slow
def test_hybrid_on_two_hosts_equals_one_process(tmp_path):
    """Four processes, which are told that there are two on each host."""
    make_workspace(tmp_path)
    same = ("train.max_steps=4", "train.group_by_length=false", "train.disable_tqdm=true")
    four = ("train.fsdp=hybrid", "train.per_device_train_batch_size=4")
    train, port = [sys.executable, str(ROOT / "launch" / "train.py")], str(free_port())
    processes = []
    for rank in range(4):
        place = dict(RANK=rank, LOCAL_RANK=rank % 2, WORLD_SIZE=4, LOCAL_WORLD_SIZE=2)
        values = {name: str(value) for name, value in place.items()}
        env = environment(**values, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        words = overrides(tmp_path, tmp_path / "four", *same, *four)
        processes.append(subprocess.Popen([*train, *words], env=env, cwd=ROOT))
    assert [process.wait(timeout=300) for process in processes] == [0] * 4
    one = overrides(tmp_path, tmp_path / "one", *same)
    subprocess.run([*train, *one], check=True, env=environment(), cwd=ROOT, timeout=300)
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert worst(final(tmp_path / "one"), final(tmp_path / "four")) < 1e-5


def test_one_process_is_refused(tmp_path):
    make_workspace(tmp_path)
    words = overrides(tmp_path, tmp_path / "run", "train.fsdp=full")
    train = [sys.executable, str(ROOT / "launch" / "train.py"), *words]
    result = subprocess.run(train, capture_output=True, text=True, env=environment(), timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "train.fsdp: there is one process" in result.stderr
    assert not os.path.exists(tmp_path / "run")
