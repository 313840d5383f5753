"""Fixtures of the tests of `scaleup.memory`."""

import csv
import pathlib
import random

import pytest
import torch
from transformers import BertTokenizerFast

from tests.utils.planning import SIZES
from tests.utils.tiny import FAMILIES
from tests.utils.workspace import SPECIAL_TOKENS


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    """Save a small BERT and BART, and texts of every length.

    The models are large enough that batches and buffers do not hide the rest.
    """
    folder = tmp_path_factory.mktemp("plan")
    words = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", *(f"w{i}" for i in range(995))]
    (folder / "vocab.txt").write_text("\n".join(words))
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
        BertTokenizerFast(vocab=str(folder / "vocab.txt"), **SPECIAL_TOKENS).save_pretrained(
            folder / family
        )
    draw = random.Random(0)
    for name, count in (("train", 100), ("test", 20)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = [
                [" ".join(draw.choices(words[5:], k=draw.randint(20, 70))), ["good", "bad"][i % 2]]
                for i in range(count)
            ]
            csv.writer(file).writerows([["text", "label"], *rows])
    return folder
