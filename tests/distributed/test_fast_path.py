"""DDP with two processes: gradients on the fast path are the mean of those of one process each."""

import os
import pathlib

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from scaleup.unipelt.kernels.target import VARIABLE
from tests.unit.unipelt.test_fast_path import EVERYTHING, examples, gradients, trained, worst

pytestmark = pytest.mark.distributed


def _train(rank: int, folder: pathlib.Path, family: str, find_unused: bool) -> None:
    torch.set_num_threads(1)
    os.environ[VARIABLE] = "reference"
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = trained(family, EVERYTHING)
    given = examples(model)[rank]
    ddp = DistributedDataParallel(model, find_unused_parameters=find_unused)
    for _ in range(2):  # a step that is not synchronised, and one that sums both up
        with ddp.no_sync():
            ddp(**given).loss.backward()
        ddp(**given).loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # the destructors of DDP and its process group have waited for each other once


@pytest.mark.parametrize("family, find_unused", [("bert", False), ("t5", True)])
def test_gradients_are_the_mean_of_both_processes(family, find_unused, tmp_path, monkeypatch):
    multiprocessing.spawn(_train, (tmp_path, family, find_unused), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    monkeypatch.setenv(VARIABLE, "off")
    model = trained(family, EVERYTHING)
    alone = [gradients(model, given) for given in examples(model)]
    expected = {name: alone[0][name] + alone[1][name] for name in alone[0]}  # 2 steps / 2
    assert worst(found[0], found[1]) == 0
    assert worst(found[0], expected) < 1e-5
