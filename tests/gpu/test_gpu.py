"""Tests that need a CUDA GPU: `pytest -m gpu`. All other machines skip them.

Gradients equal those of the CPU, no step waits for the GPU, half types and compiled models stay
close, and `scaleup train` and `scaleup export` work in every precision, quantisation and ZeRO stage
for which this machine has the libraries.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import BartForConditionalGeneration

from scaleup.unipelt.gate import GateMoments, LearnedGate
from tests.utils.tiny import FAMILIES, adapt, backbone, inputs
from tests.utils.workspace import (
    ROOT,
    add_writer,
    environment,
    losses,
    make_workspace,
    overrides,
    writing,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def on_gpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


def step(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradients, moved to the CPU."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {
        name: p.grad.float().cpu().clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def distance(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest ‖actual − expected‖ / ‖expected‖ of the tensors that are not tiny."""
    assert actual.keys() == expected.keys()
    largest = max(e.norm() for e in expected.values())
    return max(
        ((actual[name] - e).norm() / e.norm()).item()
        for name, e in expected.items()
        if e.norm() > 1e-4 * largest
    )


@pytest.mark.parametrize("gates", ["learned", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_the_cpu(family, gates):
    model = adapt(backbone(family), gates=gates)  # without dropout
    batch = inputs(model, labels=True)
    cpu_loss, cpu_gradients = step(model, batch)
    loss, gradients = step(model.cuda(), on_gpu(batch))
    assert loss == pytest.approx(cpu_loss, rel=1e-4)
    assert distance(gradients, cpu_gradients) < 2e-3


@pytest.mark.parametrize("flat", ["none", "mlp"])
@pytest.mark.parametrize("family", ["bert", "bart", "t5", "llama", "gpt2", "deberta-v2"])
def test_a_step_never_waits_for_the_gpu(family, flat):
    """Count synchronizations under autocast and with statistics of the gates, as in a run.

    transformers synchronizes too, so the bare backbone is the reference.
    """

    def count_waits(model) -> int:
        batch = on_gpu(inputs(model, labels=True))
        for gate in model.modules():
            if isinstance(gate, LearnedGate):
                gate.statistics = GateMoments(len(gate.names), gate.bias.device)
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                model(**batch).loss.backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns() as warnings:
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(**batch).loss
                loss.backward()
                loss.item()  # this one must be counted
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in warnings)

    bare = count_waits(backbone(family).cuda().train())
    adapted = adapt(backbone(family), prefix_reparameterization=flat)
    assert bare >= 1, "synchronizations are not counted"
    assert count_waits(adapted.cuda().train()) == bare


@pytest.mark.parametrize("family", ["bert", "bart", "t5", "llama"])
def test_bfloat16_stays_close_to_float32(family):
    model = adapt(backbone(family), randomise=False).cuda().train()
    batch = on_gpu(inputs(model, labels=True))
    loss, _ = step(model, batch)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        half = model(**batch).loss
    half.backward()
    assert half.item() == pytest.approx(loss, rel=0.05)
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )


# BART as a language model: its classification head selects tokens by their value, which torch's
# compiler does not support.
@pytest.mark.parametrize(
    ("family", "cls"), [("bert", None), ("bart", BartForConditionalGeneration), ("llama", None)]
)
def test_the_compiled_model_is_one_graph_with_the_same_logits(family, cls):
    model = adapt(backbone(family, cls=cls).cuda(), prefix_reparameterization="none")
    batch = on_gpu(inputs(model)) | ({} if family == "bert" else {"use_cache": False})
    with torch.no_grad():
        expected = model(**batch).logits
        torch._dynamo.reset()
        logits = torch.compile(model, fullgraph=True)(**batch).logits
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = make_workspace(tmp_path_factory.mktemp("gpu"))
    add_writer(folder, "llama")
    return folder


def gpu_environment() -> dict[str, str]:
    """Return the environment of a run that can see the GPU."""
    hidden = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    return {key: value for key, value in environment().items() if key not in hidden} | {
        key: os.environ[key] for key in hidden if key in os.environ
    }


def scaleup(name: str, *words: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", "scaleup", name, *words],
        cwd=ROOT,
        env=gpu_environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def needs(*words: str) -> list:
    """Return marks that skip a run if this machine lacks a library for it."""
    library = {"deepspeed": "deepspeed", "quantization": "bitsandbytes"}
    required = {package for key, package in library.items() if any(key in word for word in words)}
    return [
        pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")
        for package in required
    ]


RUNS = [
    ("bert",),
    ("bert", "train.bf16=false"),
    ("bert", "train.fp16=true"),
    ("bert", "train.gradient_checkpointing=true"),
    ("bert", "method=full"),
    ("bert", "train.torch_compile=true"),
    ("bert", "train.cuda_graphs=true"),
    ("bart", "train.cuda_graphs=true", "train.fp16=true"),
    ("bart", "train.deepspeed=zero2"),
    ("bert", "train.deepspeed=zero3"),
    ("bart", "model.quantization=8bit"),
    ("bert", "model.quantization=nf4"),
    ("bert", "train.deepspeed=zero3", "model.quantization=8bit"),
]


@pytest.mark.parametrize(
    "run", [pytest.param(run, id="-".join(run), marks=needs(*run)) for run in RUNS]
)
def test_a_run_learns_on_the_gpu_and_resumes(workspace, tmp_path, run):
    family, *more = run
    out = tmp_path / "run"
    words = overrides(
        workspace,
        out,
        "train.max_steps=64",
        "train.eval_strategy=steps",
        "train.eval_steps=32",
        f"train.learning_rate={0.001 if 'method=full' in more else 0.01}",
        "train.disable_tqdm=true",
        *([] if "method=full" in more else ["method.submodules=[adapter,prefix,lora]"]),
        *more,
        family=family,
    )
    done = scaleup("train", *words)
    assert "cuda" in done.stdout
    results = json.loads((out / "results.json").read_text())
    logged = losses(out)
    assert sum(logged[-8:]) < 0.9 * sum(logged[:8]), logged
    scaleup(
        "train",
        *(word.replace("max_steps=64", "max_steps=68") for word in words),
        "train.resume=auto",
    )
    assert (results["steps"], json.loads((out / "results.json").read_text())["steps"]) == (64, 68)


def test_a_run_on_the_gpu_can_be_exported_as_every_kind(workspace, tmp_path):
    out = tmp_path / "run"
    scaleup("train", *overrides(workspace, out, "train.max_steps=8", "train.disable_tqdm=true"))
    for kind in ("exact", "standalone", "merged"):
        scaleup(
            "export",
            "--checkpoint",
            str(out / "best"),
            "--kind",
            kind,
            "--output",
            str(tmp_path / kind),
            "--max-metric-drop",
            "100",
        )
        assert (tmp_path / kind / "export.json").is_file()


def test_a_language_model_learns_and_generates_on_the_gpu(workspace, tmp_path):
    out = tmp_path / "run"
    scaleup(
        "train",
        *writing(
            workspace,
            out,
            "llama",
            "causal_lm",
            "data.target_column=target",
            "data.metric=exact_match",
            "data.max_target_length=4",
        ),
    )
    assert (out / "predictions.jsonl").is_file() and losses(out)[-1] < losses(out)[0]
