"""The benchmark's own workings: whose turn it is, what a batch holds, what peaks are, and the script as a user starts it."""

import errno
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.turns import LAYERS, InTurns
from launch import bench as script
from scaleup.experiments import bench, meter

SCRIPT = pathlib.Path(__file__).resolve().parents[3] / "launch" / "bench.py"
TINY = BertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    vocab_size=50,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    num_labels=2,
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(bench.GEOMETRIES, "bert-base", lambda: TINY)
    return "bert-base"


class Layer(GradientCheckpointingLayer):
    def __init__(self, seconds: float, say):
        super().__init__()
        self.seconds, self.say = seconds, say

    def forward(self, x):
        self.say()
        time.sleep(self.seconds)
        return x


@pytest.fixture
def each_layer(monkeypatch):
    monkeypatch.setattr("launch.turns.LAYERS", 1)


def test_forward_passes_change_hands_after_each_layer_and_only_own_work_counts(each_layer):
    said, contenders = [], {}
    for name, seconds in {"quick": 0.05, "slow": 0.15}.items():
        model = nn.Sequential(
            *[Layer(seconds, lambda name=name: said.append(name)) for _ in range(2)]
        )
        contenders[name] = bench.Variant(lambda model=model: model(torch.zeros(1)), 0, model)
    found = script.measure_in_turns(contenders, 2)
    assert (
        said
        == ["quick", "slow"] * 2
        + ["slow", "quick"] * 2
        + ["quick", "slow"] * 2
        + ["slow", "quick"] * 2
    )
    assert [[len(pieces) for pieces in steps] for steps in found.values()] == [[3, 3]] * 2, (
        "before the first layer, and one of each layer"
    )
    assert all(0.1 <= sum(pieces) < 0.2 for pieces in found["quick"]) and all(
        0.3 <= sum(pieces) < 0.5 for pieces in found["slow"]
    )
    assert not contenders["quick"].model[0]._forward_pre_hooks


class Linear(GradientCheckpointingLayer):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return self.inner(x)


def test_a_training_step_pauses_between_layers_forwards_and_backwards_and_leaves_the_same_gradients(
    each_layer,
):
    model, x = nn.Sequential(Linear(), Linear()), torch.ones(2, 3, requires_grad=True)
    worker = InTurns(lambda: model(2 * x).square().sum().backward(), model)
    assert [worker.resume()[0] for _ in range(3)] == [
        False
    ] * 3  # before the layers 0 and 1, after the backward pass of 1
    assert model[1].inner.bias.grad is not None and model[0].inner.bias.grad is None
    assert [worker.resume()[0] for _ in range(2)] == [False, True]
    paused = [p.grad.clone() for p in model.parameters()]
    worker.leave_alone()
    model.zero_grad()
    model(2 * x).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(paused, model.parameters()))
    assert worker.resume()[0], "one piece again"


def test_a_piece_is_of_several_layers():
    model = nn.Sequential(*[Layer(0.0, lambda: None) for _ in range(2 * LAYERS)])
    worker = InTurns(lambda: model(torch.zeros(1)), model)
    assert [worker.resume()[0] for _ in range(3)] == [False, False, True]
    worker.leave_alone()


def test_a_step_that_fails_ends_the_measurement_and_does_not_leave_others_waiting(each_layer):
    def fail() -> None:
        raise ValueError("too long")

    said = {"good": lambda: None, "bad": fail, "other": lambda: None}
    models = {
        name: nn.Sequential(Layer(0.0, lambda: None), Layer(0.0, say), Layer(0.0, lambda: None))
        for name, say in said.items()
    }
    contenders = {
        name: bench.Variant(lambda model=model: model(torch.zeros(1)), 0, model)
        for name, model in models.items()
    }
    with pytest.raises(ValueError, match="too long"):
        script.measure_in_turns(contenders, 1)
    assert not models["other"][0]._forward_pre_hooks


def test_quartiles_lie_among_the_ratios_and_the_best_step_is_made_of_each_pieces_shortest(
    monkeypatch, tiny
):
    monkeypatch.setattr(
        script,
        "measure_in_turns",
        lambda contenders, rounds: {
            "bare": [[0.5, 0.5]] * 3,
            "lora": [[0.5, 0.5], [0.4, 0.8], [0.8, 0.6]],
        },
    )
    monkeypatch.setattr(
        sys,
        "argv",
        ["bench.py", "inference", "--batch", "1", "--length", "4", "--only", "bare", "lora"],
    )
    row = script.timed(script.arguments())["lora"]
    assert row["ratio"] == 1.2 and row["quartiles"] == [1.1, 1.3] and row["best"] == 0.9


def test_the_order_of_whole_steps_turns_round_by_round():
    said = []
    contenders = {
        name: bench.Variant(lambda name=name: said.append(name), 0, None) for name in "abc"
    }
    assert {name: len(times) for name, times in script.measure(contenders, 1, "cpu").items()} == {
        "a": 1,
        "b": 1,
        "c": 1,
    }
    assert "".join(said) == "abcbcacab"


def test_half_padding_is_half():
    lengths = bench.half_padding(16, 128)
    assert len(lengths) == 16 and lengths[-1] == 128 and 0.45 < sum(lengths) / (16 * 128) < 0.55
    given = bench.batch(lengths, 128, 50)
    assert given["attention_mask"].sum(1).tolist() == lengths
    assert (given["input_ids"][range(16), [n - 1 for n in lengths]] == bench.EOS).all() and (
        given["input_ids"][given["attention_mask"] == 0] == 1
    ).all()


def test_every_contender_of_training_does_a_step_and_trains_what_it_should(tiny):
    found = bench.training(tiny, bench.batch([6] * 4, 6, 50), "cpu", [])
    assert {"full fine-tuning", "floor", "BitFit", "PEFT LoRA", *bench.UNIPELT} == set(found)
    for contender in found.values():
        before = [p.detach().clone() for p in contender.model.parameters() if p.requires_grad]
        contender.step()
        assert sum(
            not torch.equal(a, b)
            for a, b in zip(before, (p for p in contender.model.parameters() if p.requires_grad))
        ) > 0.7 * len(before)
    addresses = [p.data_ptr() for contender in found.values() for p in contender.model.parameters()]
    assert len(addresses) == len(set(addresses)), "two contenders share weights"


def test_contenders_of_inference_have_their_own_weights_and_merged_is_what_an_export_writes(tiny):
    found = bench.inference(tiny, bench.batch([6] * 4, 6, 50), "cpu", ["bare", "APL merged"])
    assert list(found) == ["bare", "APL merged"]
    addresses = [
        {p.data_ptr() for p in contender.model.parameters()} for contender in found.values()
    ]
    assert not addresses[0] & addresses[1]
    assert all(contender.step().shape == (4, 2) for contender in found.values())
    assert (found["APL merged"].step() - found["bare"].step()).abs().max() > 1e-6


def test_length_groups_see_the_same_tokens_in_narrower_batches(tiny):
    lengths = [3, 12] * 32
    found = bench.ragged(tiny, lengths, 4, 12, "cpu")
    seen = {}
    for name, contender in found.items():
        shapes = seen[name] = []
        contender.model.register_forward_pre_hook(
            lambda module, args, kwargs, shapes=shapes: shapes.append(kwargs["attention_mask"]),
            with_kwargs=True,
        )
        contender.step()
    assert {int(sum(mask.sum() for mask in masks)) for masks in seen.values()} == {sum(lengths)}
    width = {name: sum(mask.numel() for mask in masks) for name, masks in seen.items()}
    assert (
        width["padded to 12"]
        == width["padded to the longest"]
        == 64 * 12
        > 1.3 * width["length groups"]
    )


def test_memory_counts_gradients_and_optimizer_of_what_is_trained(tiny):
    given = bench.batch([6] * 4, 6, 50)
    full, own = (bench.memory(name, tiny, given, "cpu") for name in ("full fine-tuning", "APL"))
    state, weights = 8 * full["trained"], 4 * full["trained"]
    assert full["rest"] >= weights + state and full["peak"] >= full["rest"] + weights
    assert own["peak"] - own["rest"] >= 4 * own["trained"]


def test_the_script_writes_ratios_over_its_reference(tmp_path):
    out = tmp_path / "deep" / "rows.json"
    asked = [
        "training",
        "--batch",
        "1",
        "--length",
        "4",
        "--rounds",
        "1",
        "--only",
        "floor",
        "lora",
        "--reference",
        "floor",
        "--output",
        str(out),
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *asked], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert (
        rows["floor"]["ratio"] == 1.0
        and rows["lora"]["calls"] > rows["floor"]["calls"]
        and "lora" in done.stdout
    )


def test_a_reference_that_does_not_take_part_and_idle_arguments_are_refused(
    monkeypatch, capsys, tiny
):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "bench.py",
            "training",
            "--batch",
            "1",
            "--length",
            "4",
            "--only",
            "lora",
            "--reference",
            "floor",
        ],
    )
    assert (
        script.main() == 2
        and capsys.readouterr().err == "error: --reference: floor is none of lora\n"
    )
    for what in ("training", "memory"):
        monkeypatch.setattr(
            sys,
            "argv",
            ["bench.py", what, "--batch", "1", "--length", "4", "--only", "APL", "LORA"],
        )
        assert script.main() == 2 and capsys.readouterr().err.startswith(
            "error: --only: LORA is none of "
        )
    monkeypatch.setattr(sys, "argv", ["bench.py", "memory", "--ragged", "--compile"])
    with pytest.raises(SystemExit):
        script.main()
    assert (
        "--ragged, --compile would have no effect on memory; leave it out"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["inference", "--batch", "0"], "argument --batch: 0 is no number from 1 on"),
        (["inference", "--rounds", "two"], "argument --rounds: two is no number from 1 on"),
        (
            ["inference", "--output", "/dev/null/rows.json"],
            "--output: /dev/null/rows.json cannot be written: ",
        ),
        (
            ["inference", "--length", "5000"],
            "error: --length: bert-base has 512 positions, 5000 do not fit",
        ),
        (
            [
                "training",
                "--batch",
                "1",
                "--length",
                "4",
                "--only",
                "floor",
                "--peer",
                "nowhere/python",
            ],
            "error: --peer: nowhere/python cannot be started (No such",
        ),
        (
            ["inference", "--peer", "python", "--compile"],
            "--peer works on the CPU, in float32 and as it is; leave out --device, --dtype and --compile",
        ),
        (
            ["inference", "--geometry", "llama-8b"],
            "--geometry llama-8b would take 32 GB in float32; add --dtype bfloat16",
        ),
        (
            ["training", "--ragged", "--batch", "1"],
            "--ragged spreads lengths over a batch; give it --batch 2 and --length 8 or more",
        ),
        (
            ["inference", "--examples", "3"],
            "--examples would have no effect on inference; leave it out",
        ),
        (["memory", "--rounds", "3"], "--rounds would have no effect on memory; leave it out"),
        (
            ["training", "--compile", "reduce-overhead"],
            "--compile reduce-overhead makes CUDA graphs, a CPU has none; leave out the mode",
        ),
        (
            ["ragged", "--texts", "colla", "nowhere", "nowhere"],
            "error: --texts, --examples: data.name: should be 'cola', 'sst2'",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line_of_its_own(
    monkeypatch, capsys, tiny, asked, said
):
    monkeypatch.setattr(sys, "argv", ["bench.py", *asked])
    try:
        code = script.main()
    except SystemExit as stop:  # argparse's way
        code = stop.code
    assert code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_leaves_no_half_of_a_file_and_says_so(monkeypatch, capsys, tiny, tmp_path):
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "bench.py",
            "training",
            "--batch",
            "1",
            "--length",
            "4",
            "--rounds",
            "1",
            "--only",
            "floor",
            "--output",
            str(tmp_path / "rows.json"),
        ],
    )
    assert script.main() == 2 and not (tmp_path / "rows.json").exists()
    assert (
        capsys.readouterr().err
        == f"error: --output: {tmp_path / 'rows.json'} cannot be written: No space left on device\n"
    )


def test_live_bytes_leave_out_fake_tensors_that_a_compilation_left():
    before = meter.live_bytes()
    with FakeTensorMode():
        fake = torch.zeros(1000, 1000)
    real = torch.zeros(1000)
    assert (
        fake.device.type == "cpu"
        and 4 * 1000 <= meter.live_bytes() - before < 4 * 2000
        and real.numel() == 1000
    )


def test_attention_with_shared_keys_is_counted_forwards_and_backwards():
    assert meter._attention((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)) == 2 * 2 * 4 * 5 * 7 * 16
    query, key = torch.randn(1, 4, 512, 64, requires_grad=True), torch.randn(1, 2, 512, 64)
    forwards = meter.counted(
        lambda: nn.functional.scaled_dot_product_attention(
            query, key, key, enable_gqa=True
        ).detach()
    )
    both = meter.counted(
        lambda: (
            nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)
            .sum()
            .backward()
        )
    )
    products = 4 * 4 * 512 * 512 * 64 / 1e9  # two forwards; five backwards
    assert (forwards["gflop"], both["gflop"]) == (
        round(products, 2),
        round(7 / 2 * products, 2),
    ) and forwards["gflop"] > 0


def test_a_language_model_in_a_half_type_trains_and_writes_no_head(monkeypatch):
    shape = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        use_cache=False,
    )
    monkeypatch.setitem(bench.GEOMETRIES, "llama-8b", lambda: shape)
    given = bench.batch([6] * 2, 6, 50)
    found = bench.training(
        "llama-8b",
        given,
        "cpu",
        ["floor", "PEFT LoRA", "APL", "APL, prefix MLP"],
        dtype=torch.bfloat16,
    )
    assert found["floor"].trained == 0
    for contender in found.values():
        contender.step()
        kinds = {
            parameter.requires_grad: parameter.dtype for parameter in contender.model.parameters()
        }
        assert kinds[False] == torch.bfloat16 and kinds.get(True, torch.float32) == torch.float32
    found = bench.inference("llama-8b", given, "cpu", [], dtype=torch.bfloat16)
    assert "APL merged" not in found and {
        contender.step().dtype for contender in found.values()
    } == {torch.bfloat16}
    with pytest.raises(ValueError, match="APL merged"):
        bench.inference("llama-8b", given, "cpu", ["APL merged"])


def test_rows_have_tokens_per_second_and_the_share_of_a_products_rate(monkeypatch, tiny):
    monkeypatch.setattr(
        script, "measure_in_turns", lambda contenders, rounds: {"bare": [[0.5]] * 3}
    )
    monkeypatch.setattr("scaleup.experiments.meter.matmul_rate", lambda device, dtype: 1.0)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "bench.py",
            "inference",
            "--batch",
            "3",
            "--length",
            "4",
            "--only",
            "bare",
            "--dtype",
            "bfloat16",
        ],
    )
    row = script.timed(script.arguments())["bare"]
    assert row["tokens_per_second"] == 24 and row["of_matmul_rate"] == pytest.approx(
        row["gflop"] / 0.5
    )
