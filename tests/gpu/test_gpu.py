"""What only a GPU can show. `pytest -m gpu` on a machine with one; everywhere else these are left out.

Gradients and logits are the CPU's, nothing waits for the GPU within a step, half types and compiled models stay near, and the real entry script
trains, resumes and is exported in each precision, quantisation and ZeRO stage that this machine has the libraries for.
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


def on_gpu(things: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in things.items()}


def step(
    model: torch.nn.Module, given: dict[str, torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients, on the CPU."""
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return loss.item(), {
        name: p.grad.float().cpu().clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest ‖found − expected‖ / ‖expected‖, of the tensors that are not all but zero."""
    assert found.keys() == expected.keys()
    whole = max(e.norm() for e in expected.values())
    return max(
        ((found[name] - e).norm() / e.norm()).item()
        for name, e in expected.items()
        if e.norm() > 1e-4 * whole
    )


@pytest.mark.parametrize("gates", ["learned", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_cpus(family, gates):
    model = adapt(backbone(family), gates=gates)  # no dropout
    given = inputs(model, labels=True)
    loss, expected = step(model, given)
    model.cuda()
    found_loss, found = step(model, on_gpu(given))
    assert found_loss == pytest.approx(loss, rel=1e-4)
    assert distance(found, expected) < 2e-3


@pytest.mark.parametrize("flat", ["none", "mlp"])
@pytest.mark.parametrize("family", ["bert", "bart", "t5", "llama", "gpt2", "deberta-v2"])
def test_a_step_never_waits_for_the_gpu(family, flat):
    """Under autocast and with statistics of the gates, as in a run; transformers' own waits are the bare backbone's."""

    def waits(model) -> int:
        given = on_gpu(inputs(model, labels=True))
        for gate in model.modules():
            if isinstance(gate, LearnedGate):
                gate.statistics = GateMoments(len(gate.names), gate.bias.device)
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                model(**given).loss.backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns() as said:
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(**given).loss
                loss.backward()
                loss.item()  # one that must be seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in said)

    bare = waits(backbone(family).cuda().train())
    own = waits(adapt(backbone(family), prefix_reparameterization=flat).cuda().train())
    assert bare >= 1, "the GPU's waits are not seen"
    assert own == bare


@pytest.mark.parametrize("family", ["bert", "bart", "t5", "llama"])
def test_bfloat16_stays_near_float32(family):
    model = adapt(backbone(family), randomise=False).cuda().train()
    given = on_gpu(inputs(model, labels=True))
    loss, _ = step(model, given)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        half = model(**given).loss
    half.backward()
    assert half.item() == pytest.approx(loss, rel=0.05)
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )


# BART writes: its classification head picks tokens by their value, for which torch's compiler has no code.
@pytest.mark.parametrize(
    ("family", "cls"), [("bert", None), ("bart", BartForConditionalGeneration), ("llama", None)]
)
def test_the_compiled_model_is_one_graph_with_the_same_logits(family, cls):
    model = adapt(backbone(family, cls=cls).cuda(), prefix_reparameterization="none")
    given = on_gpu(inputs(model)) | ({} if family == "bert" else {"use_cache": False})
    with torch.no_grad():
        expected = model(**given).logits
        torch._dynamo.reset()
        found = torch.compile(model, fullgraph=True)(**given).logits
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = make_workspace(tmp_path_factory.mktemp("gpu"))
    add_writer(folder, "llama")
    return folder


def visible() -> dict[str, str]:
    """The environment of a run that finds the GPU."""
    hidden = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    return {key: value for key, value in environment().items() if key not in hidden} | {
        key: os.environ[key] for key in hidden if key in os.environ
    }


def script(name: str, *words: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", "scaleup", name, *words],
        cwd=ROOT,
        env=visible(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def needs(*words: str) -> list:
    """Marks for a run whose libraries this machine may lack."""
    library = {"deepspeed": "deepspeed", "quantization": "bitsandbytes"}
    wanted = {package for key, package in library.items() if any(key in word for word in words)}
    return [
        pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"no {package} here")
        for package in wanted
    ]


RUNS = [
    ("bert",),
    ("bert", "train.bf16=false"),
    ("bert", "train.fp16=true"),
    ("bert", "train.gradient_checkpointing=true"),
    ("bert", "method=full"),
    ("bert", "train.torch_compile=true"),
    ("bart", "train.deepspeed=zero2"),
    ("bert", "train.deepspeed=zero3"),
    ("bart", "model.quantization=8bit"),
    ("bert", "model.quantization=nf4"),
    ("bert", "train.deepspeed=zero3", "model.quantization=8bit"),
]


@pytest.mark.parametrize(
    "run", [pytest.param(run, id="-".join(run), marks=needs(*run)) for run in RUNS]
)
def test_the_entry_script_learns_on_the_gpu_and_resumes(workspace, tmp_path, run):
    family, *more = run
    out = tmp_path / "run"
    asked = overrides(
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
    done = script("train", *asked)
    assert "cuda" in done.stdout
    results = json.loads((out / "results.json").read_text())
    learned = losses(out)
    assert sum(learned[-8:]) < 0.9 * sum(learned[:8]), learned
    script(
        "train",
        *(word.replace("max_steps=64", "max_steps=68") for word in asked),
        "train.resume=auto",
    )
    assert (results["steps"], json.loads((out / "results.json").read_text())["steps"]) == (64, 68)


def test_a_run_on_the_gpu_is_exported_and_gives_the_same_answers(workspace, tmp_path):
    out = tmp_path / "run"
    script("train", *overrides(workspace, out, "train.max_steps=8", "train.disable_tqdm=true"))
    for kind in ("exact", "standalone", "merged"):
        script(
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


def test_a_language_model_learns_and_writes_on_the_gpu(workspace, tmp_path):
    out = tmp_path / "run"
    script(
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
