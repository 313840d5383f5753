"""The pad tokens of tokenizer, config and batch agree, or a decoder's classifier is refused."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    Gemma3Config,
)

from scaleup.backbone.loading import load_config
from scaleup.backbone.method import complete_config, load_run_model
from scaleup.backbone.tokenizer import load_tokenizer, pad_tokens, set_pad_token
from scaleup.data import classification as data
from scaleup.errors import ConfigError
from scaleup.settings.schema import ModelSettings, Settings, load
from tests.utils.decoders import END, make_decoder, make_tokenizer, write_pairs
from tests.utils.tiny import backbone

FAMILIES = ("gpt2", "llama", "qwen2")
CLASSIFIER, WRITER = AutoModelForSequenceClassification, AutoModelForCausalLM
OTHER = {"pad_token": "<pad>"}  # id of the last token


def loaded(folder, auto=CLASSIFIER):
    """Return the pad tokens of tokenizer and config, with the tokenizer."""
    settings = ModelSettings(name=str(folder))
    config = load_config(settings)
    tokenizer = load_tokenizer(settings, config, auto)
    return tokenizer.pad_token_id, pad_tokens(config), tokenizer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config_pad", [None, -1])
@pytest.mark.parametrize("auto", [CLASSIFIER, WRITER])
def test_a_missing_pad_token_is_the_end_of_sequence(tmp_path, family, config_pad, auto):
    make_decoder(tmp_path, family, pad_token_id=config_pad)
    pad, config_pads, tokenizer = loaded(tmp_path, auto)
    assert pad == tokenizer.eos_token_id and config_pads == {pad}


def test_a_missing_pad_token_is_the_one_of_the_config(tmp_path):
    special = {"bos_token": "<start>", "eos_token": "<stop>"}
    stop = make_tokenizer("gpt2", **special).eos_token_id
    make_decoder(tmp_path, "gpt2", special, pad_token_id=0)
    pad, config_pads, tokenizer = loaded(tmp_path)
    assert stop != 0 and (pad, config_pads, tokenizer.pad_token) == (0, {0}, END)


def test_a_config_without_a_pad_token_takes_the_tokenizers(tmp_path):
    make_decoder(tmp_path, "gpt2", OTHER)
    pad, config_pads, tokenizer = loaded(tmp_path)
    assert pad == len(tokenizer) - 1 and config_pads == {pad}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "special, config_pad", [(OTHER, 0), ({}, 5)], ids=["two pad tokens", "a word as pad token"]
)
def test_a_decoder_with_two_pad_tokens_is_refused(tmp_path, family, special, config_pad):
    make_decoder(tmp_path, family, special, pad_token_id=config_pad)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    pad = saved.eos_token_id if saved.pad_token_id is None else saved.pad_token_id
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path)
    assert caught.value.problems == [
        f"model.name: the pad token of {tmp_path} is {pad} in its tokenizer and {config_pad} in its"
        " config.json (pad_token_id), so that a classifier would read padding; save it with the"
        " same token in both"
    ]


def test_a_decoder_of_unknown_structure_with_two_pad_tokens_is_refused(tmp_path, monkeypatch):
    make_decoder(tmp_path, "gpt2", OTHER, pad_token_id=0)
    monkeypatch.setattr("scaleup.backbone.tokenizer.find_attentions", lambda *_: ([], "unknown"))
    with pytest.raises(ConfigError, match="model.name: the pad token of"):
        loaded(tmp_path)


def test_a_model_that_writes_takes_the_pad_token_of_its_tokenizer(tmp_path):
    make_decoder(tmp_path, "gpt2", OTHER, pad_token_id=0)
    pad, config_pads, _ = loaded(tmp_path, WRITER)
    assert pad != 0 and config_pads == {pad}


def test_an_encoder_keeps_the_pad_token_of_its_config(tmp_path):
    """Masks hide padding from it, and RoBERTa counts positions from its own pad token."""
    backbone("roberta", pad_token_id=1).save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good"]
    vocabulary = {word: i for i, word in enumerate(words)}
    BertTokenizer(vocab=vocabulary).save_pretrained(tmp_path)
    assert loaded(tmp_path)[:2] == (0, {1})


def test_a_pad_token_beyond_the_embedding_is_refused(tmp_path):
    make_decoder(tmp_path, "gpt2", OTHER, vocab_size=290)
    with pytest.raises(ConfigError, match="has 291 tokens, its model 290; they do not belong"):
        loaded(tmp_path)


def test_a_config_inside_another_gets_the_pad_token():
    config = Gemma3Config()
    assert pad_tokens(config) == {0}
    set_pad_token(config, 7)
    assert config.text_config.pad_token_id == 7 and pad_tokens(config) == {7}


def test_two_pad_tokens_inside_one_config_are_refused(tmp_path):
    make_decoder(tmp_path, "gpt2", OTHER)
    settings = ModelSettings(name=str(tmp_path))
    config = Gemma3Config()
    config.pad_token_id = 290
    config.text_config.pad_token_id = 0
    with pytest.raises(ConfigError, match="is 290 in its tokenizer and 0 in its config.json"):
        load_tokenizer(settings, config)


def run_settings(folder, *more: str) -> Settings:
    file = write_pairs(folder)
    return load(
        None,
        [
            f"model.name={folder}",
            f"data.train_file={file}",
            f"data.validation_file={file}",
            "data.text_pair_column=other",
            "data.max_length=24",
            f"train.output_dir={folder / 'out'}",
            *more,
        ],
    )


@pytest.mark.parametrize("pad", ["end of sequence", "its own"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["unipelt", "full"])
def test_neither_padding_nor_the_batch_moves_a_logit(tmp_path, family, side, pad, method):
    special = {"padding_side": side} | (OTHER if pad == "its own" else {})
    make_decoder(tmp_path, family, special)
    settings = run_settings(tmp_path, f"method={method}")
    config = load_config(settings.model)
    tokenizer = load_tokenizer(settings.model, config)
    examples = data.load(settings.data)
    encoded = data.tokenize(examples, tokenizer, settings.data)
    model = load_run_model(settings, config, CLASSIFIER, examples.labels, torch.device("cpu"))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    rows = [encoded.train[i] for i in range(4)]
    # A text without any token, and one that consists of what may be the pad token.
    rows += [
        row | {"input_ids": [tokenizer.eos_token_id], "attention_mask": [1]} for row in rows[:1]
    ]
    collate = data.collator(tokenizer, settings.data)
    padded = data.collator(tokenizer, settings.data.model_copy(update={"pad_to_max_length": True}))
    with torch.no_grad():
        alone = torch.cat([model.eval()(**collate([row])).logits for row in rows])
        batch = collate(rows)
        assert (batch["input_ids"] == model.config.pad_token_id).any()
        for inputs in (batch, padded(rows)):
            assert (model(**inputs).logits - alone).abs().max() < 1e-5
    assert (alone[0] - alone[1]).abs().max() > 1e-2


def test_the_side_of_the_padding_is_saved_with_a_decoders_tokenizer(tmp_path):
    make_decoder(tmp_path, "llama")  # transformers pads on the left for its class
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"
    tokenizer = loaded(tmp_path)[2]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").padding_side == "right"
    assert loaded(tmp_path, WRITER)[2].padding_side == "left"


def test_an_encoder_that_pads_on_the_left_keeps_doing_so(tmp_path):
    backbone("bert").save_pretrained(tmp_path)
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "good"]
    vocabulary = {word: i for i, word in enumerate(words)}
    BertTokenizer(vocab=vocabulary, padding_side="left").save_pretrained(tmp_path)
    assert loaded(tmp_path)[2].padding_side == "left"


@pytest.mark.parametrize("auto", [CLASSIFIER, WRITER])
def test_a_reloaded_config_gets_the_same_pad_token(tmp_path, auto):
    make_decoder(tmp_path, "gpt2")
    settings = run_settings(tmp_path)
    config = load_config(settings.model)
    complete_config(settings, config, auto, ["a", "b"])
    assert pad_tokens(config) == {loaded(tmp_path, auto)[0]}
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] is None
