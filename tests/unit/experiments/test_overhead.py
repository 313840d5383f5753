"""`scaleup bench calls` and `host`: what they measure, and the limits that the code must keep."""

import json
import os
import time

import pytest
import torch
from torch import nn

from scaleup.experiments import call_counts, overhead
from scaleup.experiments.overhead import BOUND, CallOptions, HostOptions
from scaleup.unipelt.kernels import ops, reference
from scaleup.unipelt.kernels.target import VARIABLE, fast_path, mode, target_device

# family → the most calls of APL per layer beyond the lower bound
CALLS = {"BERT": 30, "Llama": 30, "GPT-2": 30, "T5 encoder": 30, "T5 pair": 84, "BART pair": 84}
# family → the most host time of APL relative to the lower bound
HOST = {"BERT": 2.3, "BART pair": 2.4, "Llama": 2.1}
BUSY = 1.15  # a busy machine disturbs the measurement
NARROW = dict(selected=0, causal=False, activation="relu", ones_column=True, width=8)


def narrow_inputs() -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, 8), torch.randn(6), torch.ones(2), None]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", call_counts.FAMILIES)
def test_calls_of_a_layer_stay_within_the_limit(family, padded):
    bound, apl = (overhead.count_layer(family, name, padded) for name in (BOUND, "APL"))
    row = overhead.beyond_bound(apl, bound)
    assert 0 < row["beyond"] <= CALLS[family], row["beyond_by_name"]


@pytest.mark.parametrize("family", overhead.HOST_FAMILIES)
def test_host_time_of_a_step_stays_within_the_limit(family):
    """One of three measurements has to be within the limit."""
    measured = []
    while len(measured) < 3 and not (measured and measured[-1] <= BUSY * HOST[family]):
        rows = overhead.host_rows(family, rounds=12, launch_us=10, names=[BOUND, "APL"])
        measured.append(rows["APL"]["best"])
    assert 1 < measured[-1] <= BUSY * HOST[family], measured


def test_a_counter_leaves_out_views_and_counts_a_kernel_once():
    x, inputs = torch.ones(6, 4), narrow_inputs()
    with call_counts.CallCounter() as counter:
        nn.functional.linear(x.view(2, 3, 4).detach(), x[:3].unsqueeze(0)[0]).reshape(-1)
        ops.narrow_forward(*inputs, *NARROW.values())
    assert counter.calls == {"mm": 1, "narrow_forward": 1}


def test_a_layer_is_half_of_what_two_more_layers_add():
    calls = {2: {"mm": 10, "add": 3, "cat": 1}, 4: {"mm": 16, "add": 3, "sum": 1}}
    assert call_counts.layer_calls(calls.__getitem__) == {"cat": -0.5, "mm": 3.0, "sum": 0.5}
    row = overhead.beyond_bound({"mm": 3.0, "add": 2.0}, {"mm": 1.0, "add": 2.0, "cat": 0.5})
    assert row == {"layer": 5.0, "beyond": 1.5, "beyond_by_name": {"mm": 2.0, "cat": -0.5}}


def test_kernels_are_chosen_as_on_cuda_only_inside_of_the_context(monkeypatch):
    monkeypatch.setenv(VARIABLE, "auto")
    with pytest.raises(KeyError), overhead.kernels_as_on_cuda("off"):
        assert mode() == "off" and target_device(torch.ones(1)) == "cuda"
        raise KeyError
    assert mode() == "auto" and target_device(torch.ones(1)) == "cpu"
    monkeypatch.delenv(VARIABLE)
    with overhead.kernels_as_on_cuda("reference"):
        assert mode() == "reference" and fast_path(torch.ones(1))
    assert VARIABLE not in os.environ


def test_a_launch_allocates_the_outputs_of_its_kernel_and_keeps_the_host_busy():
    expected = reference.narrow_forward(*narrow_inputs(), *NARROW.values())
    kernel = ops.narrow_forward
    with pytest.raises(KeyError), overhead.launches_only(20_000):
        begin = time.thread_time()
        outputs = ops.narrow_forward(*narrow_inputs(), *NARROW.values())
        assert 0.02 <= time.thread_time() - begin < 0.04
        raise KeyError
    assert [(x.shape, x.dtype) for x in outputs] == [(x.shape, x.dtype) for x in expected]
    assert ops.narrow_forward is kernel


def test_the_result_files_have_every_variant(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overhead, "HOST_FAMILIES", ("BERT",))
    monkeypatch.setattr(call_counts, "FAMILIES", {"BERT": call_counts.FAMILIES["BERT"]})
    overhead.run_calls(CallOptions(output=tmp_path / "calls.json"))
    overhead.run_host(HostOptions(rounds=2, output=tmp_path / "host.json"))
    calls, host = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("calls", "host"))
    assert list(calls["rows"]) == ["BERT, full", "BERT, padded"] and list(host["rows"]) == ["BERT"]
    for rows in (*calls["rows"].values(), *host["rows"].values()):
        assert list(rows) == list(overhead.COMPARED)
    full = calls["rows"]["BERT, full"]
    assert full[BOUND]["beyond"] == 0 < full["PEFT LoRA"]["beyond"]
    assert full["APL"]["beyond"] < full["APL, kernels off"]["beyond"]
    assert host["settings"]["launch_us"] == 10 and host["rows"]["BERT"][BOUND]["ratio"] == 1
    assert "APL, kernels off" in capsys.readouterr().out
