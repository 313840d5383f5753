"""Plans compared with what real runs allocate, and the command `scaleup plan`."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.plan_memory import measure
from scaleup import errors
from scaleup.backbone.method import apply_method
from scaleup.memory import states as memory
from scaleup.memory.activations import Kernels
from scaleup.memory.plan import make_plan
from scaleup.memory.report import as_json, table
from scaleup.memory.trace import trace
from scaleup.settings import schema as config
from scaleup.unipelt.model import parameter_counts
from tests.utils.planning import adapted, overrides, settings
from tests.utils.tiny import FAMILIES
from tests.utils.workspace import ROOT, environment


def start(words: Sequence[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        words, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment()
    )


def script(*arguments: str) -> subprocess.CompletedProcess:
    return start([sys.executable, "-m", "scaleup", "plan", *arguments])


@pytest.mark.distributed
@pytest.mark.parametrize(
    "engine, changes",
    [
        pytest.param("deepspeed=zero1", (), marks=pytest.mark.slow),
        ("fsdp=full", ("model.quantization=8bit",)),
        pytest.param("fsdp=full", (), marks=pytest.mark.slow),
        pytest.param("fsdp=hybrid", ("train.bf16=true",), marks=pytest.mark.slow),
        pytest.param("deepspeed=zero3_hpz", (), marks=pytest.mark.slow),
        pytest.param("deepspeed=zero2", ("train.bf16=true",), marks=pytest.mark.slow),
        pytest.param("deepspeed=zero3", (), marks=pytest.mark.slow),
        pytest.param("deepspeed=zero3", ("model.quantization=8bit",), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(value),
)
def test_the_plan_is_within_a_tenth_of_what_two_processes_hold(
    workspace, tmp_path, engine, changes
):
    more = (
        *changes,
        f"train.{engine}",
        f"train.output_dir={tmp_path / 'run'}",
        "train.max_steps=5",
    )
    row = next(
        row
        for row in make_plan(settings(workspace, *more), 2, "cpu", configured=True).rows
        if row.chosen
    )
    ranks = measure(tmp_path / "found", overrides(workspace, *more), env=environment())
    for rank, found in enumerate(ranks):
        assert found["shape"] == [8, 64]
        print(
            f"{engine} {changes} rank {rank}: rest {row.states.resident:,} planned, "
            f"{found['rest']:,}; peak {row.total(False):,} planned, {found['peak']:,}"
        )
        assert row.states.resident == pytest.approx(found["rest"], rel=0.1)
        assert row.total(False) == pytest.approx(found["peak"], rel=0.1)


@pytest.mark.slow
def test_the_script_shows_writes_and_judges(workspace, tmp_path):
    out = tmp_path / "plan.json"
    common = (
        "--configured",
        "--world",
        "16",
        *overrides(workspace, "train.deepspeed=zero2", "train.gradient_accumulation_steps=2"),
    )
    result = script("--gpu-memory", "1GiB", "--json", str(out), *common)
    assert result.returncode == 0, result.stderr
    assert "bitsandbytes" not in result.stderr and "gemm" not in result.stderr
    for words in (
        "256 = 8 per process x 16 processes x 2 accumulation; 64 examples, 1 steps an epoch",
        "*zero2",
        "trained",
        "stored",
        "as required",
        "deepspeed ",
        "planned    for cuda, mixed precision bf16",
        "kernels    Triton\n",
    ):
        assert words in result.stdout, result.stdout
    written = json.loads(out.read_text())
    assert (
        written["fits"] is True
        and [row["stage"] for row in written["rows"]] == ["zero2"]
        and written["rows"][0]["activations"] > 0
    )
    assert script("--gpu-memory", "1MiB", *common).returncode == 1


@pytest.mark.slow
def test_every_stage_and_kind_of_weights_fits_120_columns(workspace):
    made = make_plan(settings(workspace, "train.bf16=false"), 4, "cpu", 2**30)
    assert len(made.rows) == 22 and sum(row.chosen for row in made.rows) == 1
    lines = table(made)
    assert max(map(len, lines[lines.index("") :])) <= 120, "\n".join(lines)
    totals = {(row.stage, row.weights): row.total(False) for row in made.rows}
    assert (
        totals["zero3_offload", "none"] < totals["zero3", "none"]
        and totals["zero2", "nf4"] < totals["zero2", "none"]
    )


def test_everything_wrong_is_said_at_once_with_exit_code_2(workspace):
    result = script(
        "--world",
        "0",
        "--gpu-memory",
        "much",
        "--json",
        "/no/such/folder/plan.json",
        *overrides(workspace),
        "train.lerning_rate=1",
        "data.label_column=lable",
        "model.name=/no/such/folder",
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr and not result.stdout
    said = (
        "--world: 0 processes",
        "--gpu-memory: much is not an amount",
        "--json: no folder /no/such/folder",
        "did you mean learning_rate",
    )
    for words in (*said, "no column 'lable'", "no folder /no/such/folder"):
        assert words in result.stderr, result.stderr
    many = script("--world", "many")
    assert (
        many.returncode == 2
        and "invalid int value" in many.stderr
        and "Traceback" not in many.stderr
    )


def test_a_deepspeed_file_and_lengths_that_do_not_fit_are_refused(workspace, tmp_path):
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(errors.ConfigError, match="mine.json is not a DeepSpeed config"):
        make_plan(
            settings(workspace, f"train.deepspeed={tmp_path / 'mine.json'}"), 2, configured=True
        )
    with pytest.raises(errors.ConfigError, match="500 tokens, but"):
        settings(workspace, "data.max_length=500")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["null", "zero2", "zero3"])
def test_a_checkpoint_takes_the_planned_bytes_on_disk(workspace, tmp_path, stage):
    more = (f"train.deepspeed={stage}", f"train.output_dir={tmp_path / 'run'}", "train.max_steps=2")
    (row,) = (row for row in make_plan(settings(workspace, *more), 1, "cpu", configured=True).rows)
    result = start([sys.executable, "-m", "scaleup", "train", *overrides(workspace, *more)])
    assert result.returncode == 0, result.stderr[-3000:]
    (folder,) = (tmp_path / "run").glob("checkpoint-*")
    states = [*folder.rglob("*.safetensors"), *folder.rglob("*.pt")]
    found = sum(path.stat().st_size for path in states)
    print(f"{stage}: {row.states.checkpoint:,} planned, {found:,} on disk")
    assert row.states.checkpoint == pytest.approx(found, rel=0.1)


LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "bos_token_id": 128_000,
    "eos_token_id": 128_009,
}


@pytest.mark.slow  # plans 80 layers of a real size
def test_llama_70b_fits_the_nodes_that_its_config_names_and_takes_enough_steps(tmp_path):
    """Of the model there is a config.json in the cache of the hub, and no weights."""
    path = ROOT / "configs" / "llama_70b.yaml"
    repository = tmp_path / "models--meta-llama--Llama-3.3-70B-Instruct"
    for name, content in {
        "refs/main": "abc",
        "snapshots/abc/config.json": json.dumps(LLAMA_70B),
    }.items():
        (repository / name).parent.mkdir(parents=True)
        (repository / name).write_text(content)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = [
        json.dumps({"messages": [*chat, {**chat[0], "content": str(i)}, chat[1]]})
        for i in range(10_200)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(chats))
    words = ["--world", "16", "--gpu-memory", "80GB", "--configured", "--config", str(path)]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "scaleup",
            "plan",
            *words,
            f"data.train_file={tmp_path}/chats.jsonl",
        ],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
        env=environment(HF_HUB_CACHE=str(tmp_path)),
    )
    assert result.returncode == 0, result.stdout + result.stderr  # 1 if it does not fit
    arithmetic = "64 = 4 per process x 16 processes x 1 accumulation; 10000 examples, 157 steps"
    assert arithmetic in result.stdout and "warning" not in result.stdout
    assert "64 chats a step, so 10,000 chats are 157 steps an epoch" in path.read_text("utf-8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_plan_is_within_a_tenth_of_the_gpus_peak():
    """One training step at BERT-base geometry under bf16 autocast; the allocator's own peak."""
    shape = FAMILIES["bert"][1](num_labels=2)
    method = config.MethodSettings()
    kernels = Kernels("cuda", torch.bfloat16, "plain", False)

    def make(shape, device="meta"):
        with torch.device(device):
            model = AutoModelForSequenceClassification.from_config(
                shape, dtype=torch.bfloat16, attn_implementation="sdpa"
            )
        return apply_method(model, method)

    planned, state = (
        trace(make, shape, kernels, 32, 128),
        memory.states(make(shape), "none", memory.Zero(), 1, None),
    )
    model = make(shape, "cuda").train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), fused=True)
    ids = torch.randint(5, 1000, (32, 128), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, 100:] = 0
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids[:, 0] % 2).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    total = state.resident + max(planned.peak, state.gradients)
    assert total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


@pytest.mark.parametrize(
    "family, targets",
    [
        ("bert", "qv"),
        ("bart", "all-linear"),
        pytest.param("bart", "qv", marks=pytest.mark.slow),
        pytest.param("bert", "attention", marks=pytest.mark.slow),
        pytest.param("bart", "attention", marks=pytest.mark.slow),
        pytest.param("bert", "all-linear", marks=pytest.mark.slow),
    ],
)
def test_planned_parameters_are_those_of_the_real_model(workspace, family, targets):
    more = (f"method.lora_targets={targets}",)
    chosen = settings(workspace, *more, family=family)
    planned = make_plan(chosen, 1, "cpu", configured=True).counts
    assert planned == parameter_counts(adapted(workspace, family, "cpu", more=more))


def test_flash_attention_is_planned_for_a_gpu_only(workspace):
    chosen = settings(workspace, "model.attention=flash", "train.bf16=true")
    (row,) = make_plan(chosen, 1, "cuda", configured=True).rows
    (usual,) = make_plan(settings(workspace, "train.bf16=true"), 1, "cuda", configured=True).rows
    assert 0 < row.step.peak <= usual.step.peak
    with pytest.raises(errors.ConfigError, match="^model.attention: flash needs a GPU"):
        make_plan(chosen, 1, "cpu", configured=True)


def test_a_model_without_gradient_checkpointing_is_planned_without_it(workspace, tmp_path):
    model, config_class, sizes = FAMILIES["mpnet"]
    words = len((workspace / "vocab.txt").read_text().split())
    sizes = sizes | {"vocab_size": words, "pad_token_id": 0, "max_position_embeddings": 80}
    model(config_class(**sizes)).save_pretrained(tmp_path)
    for file in (workspace / "bert").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    chosen = settings(workspace, f"model.name={tmp_path}", "model.attention=eager")
    made = make_plan(chosen, 1, "cuda", 2**30, configured=True)
    (row,) = made.rows
    assert row.total(False) > 0 and row.total(True) is None and made.fits
    shown = next(line for line in table(made) if line.startswith("*none")).split()
    assert shown.count("–") == 3 and shown[-2:] == ["yes", "–"]
    (written,) = as_json(made)["rows"]
    assert written["total_checkpointing"] is None and written["fits_checkpointing"] == ""
    assert "computes its softmax itself" in made.kernels
