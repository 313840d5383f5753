"""Launches of the Triton kernels: what they refuse, and that later launches equal the first."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from triton.runtime import driver

from scaleup.unipelt.kernels import ops, target, triton_launch, triton_merge, triton_narrow
from tests.conftest import ROOT
from tests.utils.kernel_cases import Merge, Narrow
from tests.utils.triton_driver import AbsentGpu

MERGE = Merge(2, 4, 2, 5, 16, 3, "token")
NARROW = Narrow(2, 5, 6, 2, 8, 8, torch.bool, True, grads=(3, 3), heads=2)


@pytest.fixture
def launches(monkeypatch):
    """Replace launches; the arguments of each."""
    launches = []
    for module in (triton_merge, triton_narrow):
        monkeypatch.setattr(module, "launch", lambda *args: launches.append(args))
    return launches


def merge_forward(case: Merge, dtype: torch.dtype, **changed: torch.Tensor) -> None:
    x = case.inputs(dtype) | changed
    triton_merge.merge_forward(
        *(x[name] for name in ("query", "out", "lse", "prefix", "gate", "scale"))
    )


def merge_backward(case: Merge, dtype: torch.dtype, **changed: torch.Tensor) -> None:
    x = case.inputs(dtype) | changed
    triton_merge.merge_backward(
        *(x[name] for name in ("query", "out", "lse", "prefix", "gate", "grad_out")),
        *(x["grad_query"], x["scale"]),
    )


def narrow_forward(case: Narrow, dtype: torch.dtype) -> None:
    x = case.inputs(dtype)
    triton_narrow.narrow_forward(
        *(x["z"], x["bias"], x["scales"], x["mask"], case.selected, *case.options, case.v_width)
    )


def narrow_backward(case: Narrow, dtype: torch.dtype, **changed: torch.Tensor) -> None:
    x = case.inputs(dtype) | changed
    gates = torch.rand(case.batch, case.tokens if case.causal else 1, case.gates)
    triton_narrow.narrow_backward(
        *(x["z"], x["bias"], x["scales"], x["mask"], gates, x["grads_v"], x["grad_gate"]),
        *(x["grad_bias"], case.selected, case.handed_out, *case.options),
    )


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("run", [merge_forward, merge_backward])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 16, 128, 129, 256, 257])
def test_merge_kernels_run_exactly_where_no_reason_speaks_against_it(run, dtype, size, launches):
    case = dataclasses.replace(MERGE, size=size)
    reason = target.merge_refusal(dtype, size)
    most = {torch.float32: 128, torch.float64: 0}.get(dtype, 256)
    assert (reason is None) == (size <= most)
    if reason is None:
        run(case, dtype)
        assert len(launches) == 1
    else:
        with pytest.raises(ValueError, match=f"SCALEUP_KERNELS: .*{reason}"):
            run(case, dtype)
        assert not launches


@pytest.mark.parametrize("run", [narrow_forward, narrow_backward])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "activation"), [(0, "none"), (512, "gelu"), (513, "none")])
def test_narrow_kernels_run_exactly_where_no_reason_speaks_against_it(
    run, dtype, rank, activation, launches
):
    case = dataclasses.replace(
        NARROW, rank=rank, width=rank + 8, grads=(rank,), activation=activation
    )
    reason = target.narrow_refusal(dtype, rank, activation)
    assert (reason is None) == (dtype != torch.float64 and rank <= 512)
    if reason is None:
        run(case, dtype)
        assert len(launches) == 1
    else:
        with pytest.raises(ValueError, match=f"SCALEUP_KERNELS: .*{reason}"):
            run(case, dtype)
        assert not launches


def test_unknown_activations_are_refused(launches):
    with pytest.raises(ValueError, match="SCALEUP_KERNELS: .*mish; it takes none, relu"):
        narrow_forward(dataclasses.replace(NARROW, activation="mish"), torch.float32)
    assert not launches


def test_results_cannot_be_written_across_the_last_dimension(launches):
    across = torch.randn(2, 4, 16, 5).transpose(2, 3)
    with pytest.raises(ValueError, match="out is changed in place"):
        merge_forward(MERGE, torch.float32, out=across)
    with pytest.raises(ValueError, match="grad_query is changed in place"):
        merge_backward(MERGE, torch.float32, grad_query=across)
    with pytest.raises(ValueError, match="grad_bias must have stride 1"):
        narrow_backward(NARROW, torch.float32, grad_bias=torch.zeros(8, 2).t())
    assert not launches


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Let Triton compile for a GPU that is not there, and record what it would launch."""
    gpu = AbsentGpu()
    monkeypatch.setattr(driver, "_active", gpu)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_launch, "_compiled", {})
    return gpu


def test_later_launches_pass_the_same_arguments_without_tritons_launcher(
    gpu, launches, monkeypatch
):
    narrow_forward(NARROW, torch.bfloat16)
    (arguments,) = launches
    triton_launch.launch(*arguments)
    (kernel, *_), tensors = arguments, arguments[2]
    assert len(triton_launch._compiled) == 1

    def refuse(*args, **kwargs):
        raise AssertionError("Triton's own launcher was used again")

    with monkeypatch.context() as patch:
        patch.setattr(kernel, "run", refuse)
        triton_launch.launch(*arguments)
    first, second = gpu.launches
    assert first[:2] == second[:2]
    assert first[0] == "forward_kernel" and first[1][:5] == (2, 1, 1, 0, "function")
    assert len(first[2]) == len(second[2]) == len(kernel.arg_names)
    assert all(a is b or a == b for a, b in zip(first[2], second[2]))
    # A tensor at another alignment, or of another type, needs another compiled kernel.
    shifted = torch.empty(tensors[0].numel() + 1, dtype=torch.bfloat16)[1:].view_as(tensors[0])
    for other in (shifted, tensors[0].half()):
        triton_launch.launch(kernel, arguments[1], (other, *tensors[1:]), *arguments[3:])
    assert len(triton_launch._compiled) == 3
    assert len(gpu.launches) == 4


def test_nothing_is_launched_without_examples(gpu, launches):
    narrow_forward(dataclasses.replace(NARROW, batch=1), torch.float32)
    kernel, _, *rest = launches[0]
    triton_launch.launch(kernel, 0, *rest)
    assert not gpu.launches


def test_a_cpu_takes_the_formulas():
    x = NARROW.inputs(torch.float64)  # which Triton refuses
    v, gates = ops.narrow_forward(x["z"], x["bias"], x["scales"], None, 0, False, "none", False, 8)
    assert v.dtype == gates.dtype == torch.float64


def test_the_fast_path_of_a_gpu_leaves_out_float64(monkeypatch):
    monkeypatch.delenv(target.VARIABLE, raising=False)
    with target.planned_for("cuda"):
        assert target.fast_path(torch.ones(1))
        assert not target.fast_path(torch.ones(1, dtype=torch.float64))
    assert not target.fast_path(torch.ones(1))


def test_without_triton_one_error_says_what_to_install():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from scaleup.unipelt.kernels import ops\n"
        "ops._launchers()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "ImportError: SCALEUP_KERNELS: Triton is not installed; install" in done.stderr
