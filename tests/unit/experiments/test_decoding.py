"""`scaleup bench decode`: what it counts and times of one generated token."""

import json

import pytest
import torch
from transformers import LlamaConfig

from scaleup.errors import ConfigError
from scaleup.experiments import call_counts, decoding, overhead, variants
from scaleup.experiments.decoding import REFERENCE, DecodeOptions

SMALL = dict(batch=2, length=8, tokens=4, rounds=1)
# variant → the most calls per layer and token beyond the bare backbone
CALLS = {"PEFT LoRA": 8, "APL": 20, "APL, prefix MLP": 20, "NoGate": 16}


@pytest.fixture
def tiny_smollm(monkeypatch) -> LlamaConfig:
    config = call_counts.FAMILIES["Llama"][1](2)
    monkeypatch.setitem(variants.GEOMETRIES, decoding.GEOMETRY, lambda: config)
    return config


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_a_layer_for_one_token_stay_within_the_limit(name):
    bare, calls = (decoding.count_layer(n, DecodeOptions()) for n in (REFERENCE, name))
    row = overhead.beyond_bound(calls, bare)
    assert 0 < row["beyond"] <= CALLS[name], row["beyond_by_name"]


def test_the_prefix_mlp_adds_no_calls_to_a_layer():
    flat, mlp = (decoding.count_layer(n, DecodeOptions()) for n in ("APL", "APL, prefix MLP"))
    assert flat == mlp


def test_every_variant_generates_all_tokens_for_prompts_padded_on_the_left():
    options = DecodeOptions(**SMALL, ragged=True)
    inputs = decoding.prompts(options, call_counts.VOCABULARY)
    assert inputs["attention_mask"].tolist() == [[0] * 7 + [1], [1] * 8]
    for add in decoding.COMPARED.values():
        model = add(decoding._narrow_backbone(2)).eval()
        assert len(decoding._generate(model, inputs, 4)) == 3


def test_the_result_file_has_times_calls_and_functions(tmp_path, monkeypatch, capsys, tiny_smollm):
    names = [REFERENCE, "APL"]
    monkeypatch.setattr(decoding, "COMPARED", {n: decoding.COMPARED[n] for n in names})
    out = tmp_path / "decode.json"
    decoding.run(DecodeOptions(**SMALL, profile=True, output=out))
    written = json.loads(out.read_text())
    assert list(written["rows"]["time"]) == ["smollm2-135m", "2 layers with almost no width"]
    for rows in written["rows"]["time"].values():
        assert list(rows) == names and rows[REFERENCE]["ratio"] == 1
        functions = [name for name, *_ in rows["APL"]["functions"]]
        assert any(name.startswith("scaleup/unipelt/") for name in functions), functions
    assert list(written["rows"]["calls"]) == names
    assert written["settings"]["tokens"] == 4 and "calls per layer" in capsys.readouterr().out


def test_a_folder_is_measured_and_a_missing_one_refused(tmp_path, tiny_smollm):
    torch.manual_seed(0)
    decoding._backbone(DecodeOptions()).save_pretrained(tmp_path / "model")
    rows = decoding.time_tokens(
        lambda: decoding._backbone(DecodeOptions(str(tmp_path / "model"))), DecodeOptions(**SMALL)
    )
    assert all(row["milliseconds"] > 0 for row in rows.values())
    with pytest.raises(ConfigError, match="nowhere"):
        decoding._backbone(DecodeOptions(str(tmp_path / "nowhere")))


def test_one_token_has_no_time_after_the_first(tmp_path):
    with pytest.raises(ConfigError, match="--tokens: .* it takes at least 2"):
        decoding.run(DecodeOptions(**SMALL | {"tokens": 1}, output=tmp_path / "d.json"))
