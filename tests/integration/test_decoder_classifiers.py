"""Runs of classifiers that are decoders: text pairs, pad tokens and exports."""

import hashlib
import json
import pathlib
import re

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from scaleup.errors import ConfigError
from scaleup.export import export
from scaleup.settings import schema
from scaleup.training import run
from scaleup.training.preflight import CHECKS
from tests.utils.decoders import PAIRS, make_decoder, write_pairs


def train(folder: pathlib.Path, *more: str) -> dict:
    """Train in `folder`/run on pairs.jsonl; its rows in another order are the development set."""
    lines = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "dev.jsonl").write_text("".join(reversed(lines)))
    words = [
        f"model.name={folder / 'model'}",
        f"data.train_file={folder / 'pairs.jsonl'}",
        f"data.validation_file={folder / 'dev.jsonl'}",
        "data.text_pair_column=other",
        "data.max_length=32",
        f"train.output_dir={folder / 'run'}",
        "train.max_steps=4",
        "train.learning_rate=0.01",
        "train.disable_tqdm=true",
        *more,
    ]
    return run.run(schema.load(None, words, checks=CHECKS))


def hashes(folder: pathlib.Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def batch(tokenizer) -> dict[str, torch.Tensor]:
    """Return all pairs as the owner of an exported folder encodes them."""
    texts, others, _ = (list(column) for column in zip(*PAIRS))
    return tokenizer(texts, others, padding=True, return_tensors="pt")


@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen2"))]
)
def test_an_exported_decoder_scores_pairs_as_its_run_did(tmp_path, family):
    make_decoder(tmp_path / "model", family)
    write_pairs(tmp_path)
    results = train(tmp_path)
    options = export.ExportOptions(tmp_path / "run" / "best", "standalone", tmp_path / "out")
    proof = export.run(options, print).proof
    assert proof.reload_difference < 1e-5
    assert proof.metric.after == pytest.approx(100 * results["dev"]["accuracy"], abs=1e-3)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pad_token_id"] == tokenizer.pad_token_id
    newline = " \n " if family == "llama" else "\n"
    joined = tokenizer.decode(batch(tokenizer)["input_ids"][0], skip_special_tokens=True)
    assert joined == f"the plot is thin{newline}Russia says"
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"It turns `one` and `two` into `{f'one{newline}two'!r}`" in card

    classify = pipeline(
        "text-classification",
        str(tmp_path / "out"),
        tokenizer=tokenizer,
        trust_remote_code=True,
        batch_size=4,
    )
    found = classify([{"text": text, "text_pair": other} for text, other, _ in PAIRS])
    right = [answer["label"] == label for answer, (_, _, label) in zip(found, PAIRS)]
    assert sum(right) / len(right) == pytest.approx(results["dev"]["accuracy"])


def test_the_card_of_an_adapter_loads_a_decoder_that_takes_batches(tmp_path):
    """GPT-2's own config has no pad token, without which transformers refuses batches."""
    make_decoder(tmp_path / "model", "gpt2")
    write_pairs(tmp_path)
    train(tmp_path)
    options = export.ExportOptions(tmp_path / "run" / "best", "exact", tmp_path / "out")
    assert export.run(options, print).proof.logit_difference["max"] < 1e-6
    card = (tmp_path / "out" / "README.md").read_text()
    names: dict = {}
    code = re.search(r"```python\n(.*?)```", card, re.S).group(1)
    exec(code.replace("THIS FOLDER", str(tmp_path / "out")), names)
    model, tokenizer = names["model"].eval(), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert isinstance(model, PeftModel) and model.config.pad_token_id == tokenizer.pad_token_id
    with torch.no_grad():
        inputs = batch(tokenizer)
        together = model(**inputs).logits
        for i, (text, other, _) in enumerate(PAIRS):
            alone = model(**tokenizer([text], [other], return_tensors="pt")).logits[0]
            assert (together[i] - alone).abs().max() < 1e-5


def test_fully_trained_decoders_save_the_pad_token_of_their_tokenizer(tmp_path):
    make_decoder(tmp_path / "model", "qwen2", {"pad_token": "<pad>"})
    write_pairs(tmp_path)
    train(tmp_path, "method=full")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "best")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "best")
    assert tokenizer.pad_token == "<pad>" and model.config.pad_token_id == tokenizer.pad_token_id


def test_two_pad_tokens_are_refused_before_anything_is_overwritten(tmp_path):
    make_decoder(tmp_path / "model", "llama", {"pad_token": "<pad>"})
    write_pairs(tmp_path)
    train(tmp_path)
    (tmp_path / "run" / "results.json").unlink()  # as if the run had been stopped
    before = hashes(tmp_path / "run")
    make_decoder(tmp_path / "model", "llama", {"pad_token": "<pad>"}, pad_token_id=0)
    with pytest.raises(ConfigError, match="^model.name: the pad token of .* in both$") as caught:
        train(tmp_path, "train.resume=auto", "train.max_steps=8")
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    assert hashes(tmp_path / "run") == before


def test_a_checkpoint_of_joined_pairs_is_not_exported(tmp_path, monkeypatch):
    """Earlier versions trained decoders on pairs without a separator."""
    make_decoder(tmp_path / "model", "gpt2")
    write_pairs(tmp_path)
    with monkeypatch.context() as patch:
        for module in ("training.preparation", "data.classification"):
            patch.setattr(f"scaleup.{module}.separate_pairs", lambda tokenizer: tokenizer)
        train(tmp_path)
    options = export.ExportOptions(tmp_path / "run" / "best", "exact", tmp_path / "out")
    with pytest.raises(ConfigError, match="--checkpoint: .* without a separator"):
        export.run(options, print)
    assert not (tmp_path / "out").exists()
