"""Tiny decoders with tokenizers of their own classes, which put nothing between texts of a pair."""

import json
import pathlib

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from tests.utils.tiny import backbone

END = "<|endoftext|>"
TEXTS = ["the plot is thin, and the actor is bad", "Russia says that it will act"]
CLASSES = {
    "gpt2": "GPT2Tokenizer",
    "llama": "LlamaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
}
PAIRS = [
    ("the plot is thin", "Russia says", "good"),
    ("the actor will act", "", "bad"),
    ("", "it is bad", "good"),
    ("the plot is thin, and the actor is bad, and it is thin", "Russia says it", "bad"),
]


def byte_level() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the merges of a byte-level tokenizer. END has id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=[END], initial_alphabet=letters)
    tokenizer.train_from_iterator(TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def make_tokenizer(family: str, **special: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer of the family's class; `special` are its special tokens."""
    vocabulary, merges = byte_level()
    if family == "llama":
        for token in ("▁", "\n"):
            vocabulary[token] = len(vocabulary)
    return getattr(transformers, CLASSES[family])(vocab=vocabulary, merges=merges, **special)


def make_decoder(
    folder: pathlib.Path,
    family: str,
    special: dict[str, str] | None = None,
    pad_token_id: int | None = None,
    **config,
) -> pathlib.Path:
    """Save a tiny decoder and its tokenizer, and return the folder.

    Args:
        special: special tokens of the tokenizer.
        pad_token_id: what config.json says.
        config: other changes to the model's config.
    """
    tokenizer = make_tokenizer(family, **(special or {}))
    tokenizer.save_pretrained(folder)
    ends = dict(bos_token_id=0, eos_token_id=tokenizer.eos_token_id)
    changes = dict(vocab_size=len(tokenizer), pad_token_id=None) | ends | config
    backbone(family, **changes).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": pad_token_id}))
    return folder


def write_pairs(folder: pathlib.Path, repeats: int = 8) -> pathlib.Path:
    """Write pairs.jsonl with the columns text, other and label, and return its path."""
    rows = [dict(zip(("text", "other", "label"), pair)) for pair in PAIRS * repeats]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
