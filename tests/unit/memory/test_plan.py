"""The plan against what real runs allocate: two processes under ZeRO, activations on CPU, bitsandbytes' layers; and the script."""

import csv
import json
import pathlib
import random
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BertTokenizerFast

from benchmarks.cases import command
from scaleup import errors, io
from scaleup.backbone.method import apply_method
from scaleup.memory import plan
from scaleup.memory import states as memory
from scaleup.memory.activations import Kernels, _fake_step, step, trace
from scaleup.settings import rules
from scaleup.settings import schema as config
from scaleup.training.preflight import CHECKS
from tests.utils import measured
from tests.utils.tiny import FAMILIES
from tests.utils.workspace import ROOT, environment

SIZES = {
    "bert": dict(hidden_size=128, num_hidden_layers=4, intermediate_size=512),
    "bart": dict(
        d_model=128, encoder_layers=3, decoder_layers=2, encoder_ffn_dim=512, decoder_ffn_dim=512
    ),
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    """Small BERT and BART (large enough that batches and buffers do not hide the rest), and texts of every length."""
    folder = tmp_path_factory.mktemp("plan")
    words = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", *(f"w{i}" for i in range(995))]
    (folder / "vocab.txt").write_text("\n".join(words))
    names = dict(
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
        eos_token="</s>",
    )
    for family, sizes in SIZES.items():
        cls, config_cls, values = FAMILIES[family]
        special = dict(
            vocab_size=1000,
            max_position_embeddings=80,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
        extra = {"decoder_start_token_id": 3} if family == "bart" else {}
        torch.manual_seed(0)
        cls(config_cls(**(values | special | sizes | extra | {"num_labels": 2}))).save_pretrained(
            folder / family
        )
        BertTokenizerFast(vocab=str(folder / "vocab.txt"), **names).save_pretrained(folder / family)
    draw = random.Random(0)
    for name, count in (("train", 100), ("test", 20)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = [
                [" ".join(draw.choices(words[5:], k=draw.randint(20, 70))), ["good", "bad"][i % 2]]
                for i in range(count)
            ]
            csv.writer(file).writerows([["text", "label"], *rows])
    return folder


def overrides(workspace: pathlib.Path, *more: str, family: str = "bert") -> list[str]:
    return [
        f"model.name={workspace / family}",
        f"data.train_file={workspace / 'train.csv'}",
        f"data.test_file={workspace / 'test.csv'}",
        "data.k=64",
        "data.dev_size=4",
        "data.max_length=64",
        "data.pad_to_max_length=true",
        "method.prefix_hidden_size=256",
        f"train.output_dir={workspace / 'out' / str(random.random())}",
        "train.per_device_train_batch_size=8",
        *more,
    ]


def settings(workspace: pathlib.Path, *more: str, family: str = "bert") -> config.Settings:
    return config.load(None, overrides(workspace, *more, family=family), checks=CHECKS)


def start(words: Sequence[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        words, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment()
    )


def script(*arguments: str) -> subprocess.CompletedProcess:
    return start([sys.executable, "-m", "scaleup", "plan", *arguments])


@pytest.mark.distributed
@pytest.mark.parametrize(
    "stage, changes",
    [
        ("zero1", ()),
        pytest.param("zero2", ("train.bf16=true",), marks=pytest.mark.slow),
        pytest.param("zero3", (), marks=pytest.mark.slow),
        pytest.param("zero3", ("model.quantization=8bit",), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(value),
)
def test_the_plan_is_within_a_tenth_of_what_two_processes_hold(workspace, tmp_path, stage, changes):
    more = (
        *changes,
        f"train.deepspeed={stage}",
        f"train.output_dir={tmp_path / 'run'}",
        "train.max_steps=5",
    )
    row = next(
        row
        for row in plan.make_plan(settings(workspace, *more), 2, "cpu", configured=True).rows
        if row.chosen
    )
    measured = ROOT / "tests" / "utils" / "measured.py"
    result = start(command(measured, [str(tmp_path / "found"), *overrides(workspace, *more)], 2))
    for rank in (0, 1):
        path = tmp_path / f"found.{rank}.json"
        assert path.is_file(), result.stderr[-3000:]
        found = json.loads(path.read_text())
        assert found["shape"] == [8, 64]
        print(
            f"{stage} {changes} rank {rank}: rest {row.states.resident:,} planned, {found['rest']:,}; peak {row.total(False):,} planned, {found['peak']:,}"
        )
        assert row.states.resident == pytest.approx(found["rest"], rel=0.1)
        assert row.total(False) == pytest.approx(found["peak"], rel=0.1)


def adapted(workspace: pathlib.Path, family: str, device: str, shape=None) -> nn.Module:
    chosen = settings(workspace, family=family)
    shape = shape or AutoConfig.from_pretrained(workspace / family)
    with torch.device(device):
        model = AutoModelForSequenceClassification.from_config(shape, attn_implementation="sdpa")
    return apply_method(model, chosen.method)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", ["bert", "bart"])
def test_activations_are_those_of_a_real_step(workspace, family, checkpointing):
    """What autograd saves in a real pass, counted by hooks, and the CPU allocator's own peak, against tensors without data."""
    kernels = Kernels("cpu", None, "plain", checkpointing)
    planned = trace(
        lambda shape: adapted(workspace, family, "meta", shape),
        AutoConfig.from_pretrained(workspace / family),
        kernels,
        8,
        64,
    )
    model = adapted(workspace, family, "cpu").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    ids = torch.randint(5, 1000, (8, 64))
    ids[:, -1] = 3
    mask = torch.ones_like(ids)
    mask[0, 50:] = 0
    own, kept = (
        {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())},
        {},
    )

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = (
            tensor.untyped_storage().nbytes(),
            tensor,
        )  # held: addresses are used again
        return tensor

    if not checkpointing:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(input_ids=ids, attention_mask=mask).logits.sum()
        real = sum(size for address, (size, _) in kept.items() if address not in own)
        assert planned.kept == pytest.approx(real, rel=0.05)
        kept.clear()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    peak = measured.allocated_peak(
        lambda: model(input_ids=ids, attention_mask=mask).logits.sum().backward()
    )
    print(f"{family}: kept {planned.kept:,}, peak {planned.peak:,} planned, {peak:,} allocated")
    assert planned.peak == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("linear", ["plain", "8bit"])
@pytest.mark.parametrize("family", ["bert", "bart"])
def test_a_deep_model_follows_from_shallow_copies(workspace, family, linear):
    kernels = Kernels("cuda", torch.bfloat16, linear, False)
    shape = AutoConfig.from_pretrained(workspace / family)
    whole = _fake_step(adapted(workspace, family, "meta"), kernels, 8, 64)
    shallow = trace(lambda shape: adapted(workspace, family, "meta", shape), shape, kernels, 8, 64)
    assert shallow.kept == pytest.approx(whole.kept, rel=0.02) and shallow.peak == pytest.approx(
        whole.peak, rel=0.02
    )


def test_a_plan_for_a_gpu_knows_nothing_of_a_cpus_attention(workspace, monkeypatch):
    shape, kernels = (
        AutoConfig.from_pretrained(workspace / "bert"),
        Kernels("cuda", None, "plain", False),
    )
    planned = trace(lambda shape: adapted(workspace, "bert", "meta", shape), shape, kernels, 8, 32)
    monkeypatch.setattr("scaleup.unipelt.kernels.short_attention.MOST_KEYS", 0)
    monkeypatch.setattr("scaleup.unipelt.kernels.short_attention.MOST_KEYS_WITHOUT_FUSED", 0)
    assert planned == trace(
        lambda shape: adapted(workspace, "bert", "meta", shape), shape, kernels, 8, 32
    )


def test_torchs_functions_are_put_back_after_a_failure():
    before = (nn.functional.linear, nn.functional.layer_norm, nn.functional.dropout, torch.rand)
    with pytest.raises(AttributeError):  # no config, no forward
        step(nn.Module(), Kernels("cuda", torch.bfloat16, "8bit", False), 1, 4)
    assert before == (
        nn.functional.linear,
        nn.functional.layer_norm,
        nn.functional.dropout,
        torch.rand,
    )


@pytest.mark.parametrize("kind", ["8bit", "nf4"])
def test_quantised_weights_take_what_bitsandbytes_takes(kind):
    bnb = pytest.importorskip("bitsandbytes")
    plain = nn.Sequential(nn.Linear(96, 64, bias=False))
    model = nn.Sequential(nn.Linear(96, 64, bias=False, device="meta")).requires_grad_(False)
    planned = sum(piece.bytes for piece in memory.frozen_pieces(model, kind))
    if kind == "8bit":
        layer = bnb.nn.Linear8bitLt(96, 64, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(
            plain[0].weight.data, requires_grad=False, has_fp16_weights=False
        )
        layer = layer.to("cpu")
        layer(torch.zeros(2, 96))
        tensors = [layer.state.CB, layer.state.SCB]
    else:
        layer = bnb.nn.Linear4bit(96, 64, bias=False, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(
            plain[0].weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False
        )
        layer = layer.to("cpu")
        tensors = [layer.weight.data, layer.weight.quant_state.absmax]
    assert planned == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    "text, size",
    [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("512 MiB", 2**29), ("1.5G", 3 * 2**29)],
)
def test_amounts_of_memory(text, size):
    assert io.parse_bytes(text, "--gpu-memory") == size


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "0GiB", "24 bananas", "", "1e3G"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(errors.ConfigError, match="--max-shard-size"):
        io.parse_bytes(text, "--max-shard-size")


def test_automatic_deepspeed_settings_are_those_of_transformers(tmp_path):
    zero = memory.read_zero(ROOT / "configs" / "deepspeed" / "zero3_offload.json", 64)
    assert (zero.stage, zero.bucket, zero.prefetch, zero.persistence) == (3, 4096, 3686, 640)
    assert zero.offload_optimizer and zero.offload_parameters
    for content in ("{", "[1]", '{"zero_optimization": {"stage": "many"}}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(errors.ConfigError, match="is not a DeepSpeed config"):
            memory.read_zero(tmp_path / "bad.json", 64)


def test_zero3_holds_what_it_reads_again_within_the_reuse_distance():
    pieces = [
        memory.Piece(1000, 2),
        memory.Piece(3000, 2),
        memory.Piece(5000, 2, reused=False),
        memory.Piece(10, 2),
    ]
    near = memory.Zero(stage=3, persistence=100)
    assert memory.gathered(pieces, near) == 10_000  # the embedding, while it is read
    assert memory.gathered(pieces[:2], near) == 8000
    assert (
        memory.gathered(pieces[:2], memory.Zero(stage=3, persistence=100, reuse_distance=2000))
        == 6000
    )


def test_states_shrink_from_stage_to_stage(workspace):
    model = adapted(workspace, "bert", "meta")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    zeros = {
        name: memory.read_zero(ROOT / "configs" / "deepspeed" / f"{name}.json", 128)
        for name in rules.ZERO_PRESETS
    }
    alone, ddp = (memory.states(model, "none", memory.Zero(), world, None) for world in (1, 8))
    assert (
        alone.trained == trained * 4
        and alone.optimizer == trained * 8
        and alone.buffers == 0
        and ddp.buffers == trained * 4
    )
    one, two, three, offload = (
        memory.states(model, "none", zeros[name], 8, None) for name in rules.ZERO_PRESETS
    )
    assert (
        one.resident == two.resident > three.resident > offload.resident
        and two.gradients < one.gradients
    )
    assert three.backbone < two.backbone / 7 and offload.host > offload.resident and three.host == 0
    assert (
        memory.states(model, "nf4", zeros["zero2"], 8, None).backbone
        < memory.states(model, "8bit", zeros["zero2"], 8, None).backbone
        < two.backbone
    )


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
    for words in (
        "256 = 8 per process x 16 processes x 2 accumulation; 64 examples, 1 steps an epoch",
        "*zero2",
        "trained",
        "stored",
        "requirements.txt",
        "deepspeed ",
        "planned    for cuda, mixed precision bf16",
    ):
        assert words in result.stdout, result.stdout
    written = json.loads(out.read_text())
    assert (
        written["fits"] is True
        and [row["stage"] for row in written["rows"]] == ["zero2"]
        and written["rows"][0]["activations"] > 0
    )
    assert script("--gpu-memory", "1MiB", *common).returncode == 1


def test_every_stage_and_kind_of_weights_fits_120_columns(workspace):
    made = plan.make_plan(settings(workspace, "train.bf16=false"), 4, "cpu", 2**30)
    assert len(made.rows) == 15 and sum(row.chosen for row in made.rows) == 1
    lines = plan.table(made)
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
        "--gpu-memory: much is no amount",
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
        plan.make_plan(
            settings(workspace, f"train.deepspeed={tmp_path / 'mine.json'}"), 2, configured=True
        )
    with pytest.raises(errors.ConfigError, match="500 tokens, but"):
        settings(workspace, "data.max_length=500")


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
