"""A workspace for whole runs: tiny backbones with tokenizers, and data that they can learn."""

import csv
import json
import os
import pathlib
import random

import torch
from transformers import BartForConditionalGeneration, BertTokenizerFast

from tests.utils.tiny import FAMILIES

SPECIAL_TOKENS = dict(
    pad_token="<pad>",
    unk_token="<unk>",
    cls_token="<s>",
    sep_token="</s>",
    mask_token="<mask>",
    eos_token="</s>",
)
ROOT = pathlib.Path(__file__).resolve().parents[2]
WORDS = {
    "good": ["fine", "great", "warm", "bright"],
    "bad": ["poor", "cold", "dull", "weak"],
    "other": ["film", "plot", "scene", "actor", "the", "a"],
}


def make_workspace(folder: pathlib.Path) -> pathlib.Path:
    """Fills the folder with bert/, bart/ (without dropout), train.csv and test.csv."""
    words = [
        "<pad>",
        "<unk>",
        "<s>",
        "</s>",
        "<mask>",
        *[w for kind in WORDS.values() for w in kind],
    ]
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for family in ("bert", "bart"):
        cls, config_cls, values = FAMILIES[family]
        special = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3)
        extra = still if family == "bert" else {"dropout": 0.0, "decoder_start_token_id": 3}
        torch.manual_seed(0)
        model = cls(config_cls(**(values | special | extra | {"vocab_size": len(words)})))
        # BERT as pretraining leaves it, and BART with a head for three classes, which a run with
        # two classes has to replace.
        (model.base_model if family == "bert" else model).save_pretrained(folder / family)
        (folder / "vocab.txt").write_text("\n".join(words))
        BertTokenizerFast(vocab=str(folder / "vocab.txt"), **SPECIAL_TOKENS).save_pretrained(
            folder / family
        )
    draw = random.Random(0)
    for name, count in (("train", 120), ("test", 40)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "score"])
            for _ in range(count):
                label = draw.choice(["good", "bad"])
                text = [
                    draw.choice(WORDS[label]),
                    *draw.choices(WORDS["other"], k=draw.randint(1, 9)),
                ]
                draw.shuffle(text)
                writer.writerow(
                    [" ".join(text), label, float(label == "good") + draw.random() / 10]
                )
    return folder


def add_writer(folder: pathlib.Path, family: str, **changes) -> None:
    """Add a tiny model of the family that generates text, a tokenizer, pairs.jsonl and chats.jsonl.

    The task is to repeat the second word.
    """
    words = [
        "<pad>",
        "<unk>",
        "<s>",
        "</s>",
        "<mask>",
        "user",
        "assistant",
        ":",
        *[w for kind in WORDS.values() for w in kind],
    ]
    special = dict(vocab_size=len(words), pad_token_id=0, bos_token_id=2, eos_token_id=3)
    torch.manual_seed(0)
    cls, config_cls, values = FAMILIES[family]
    cls = {"bart": BartForConditionalGeneration}.get(family, cls)
    model = cls(
        config_cls(
            **(
                values
                | special
                | ({"decoder_start_token_id": 0} if "decoder_start_token_id" in values else {})
                | changes
            )
        )
    )
    model.save_pretrained(folder / family)
    (folder / "words.txt").write_text("\n".join(words))
    vocabulary = str(folder / "words.txt")
    tokenizer = BertTokenizerFast(vocab=vocabulary, **SPECIAL_TOKENS, bos_token="<s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    tokenizer.save_pretrained(folder / family)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words[8:], k=draw.randint(2, 6))) for _ in range(120)]
    rows = [{"text": text, "target": text.split()[1]} for text in texts]
    chats = [
        [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["target"]}]
        for row in rows
    ]
    for name, content in (("pairs", rows), ("chats", [{"messages": chat} for chat in chats])):
        lines = [json.dumps(row) + "\n" for row in content]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        # The same rows in another order: a test file that is a copy would be refused.
        (folder / f"{name}_test.jsonl").write_text("".join(reversed(lines)))


def writing(
    folder: pathlib.Path, out: pathlib.Path, family: str, task: str, *more: str, file: str = "pairs"
) -> list[str]:
    """Overrides of a run that learns to write."""
    return [
        f"model.name={folder / family}",
        f"data.task={task}",
        f"data.train_file={folder / file}.jsonl",
        f"data.test_file={folder / file}_test.jsonl",
        "data.k=64",
        "data.dev_size=24",
        f"train.output_dir={out}",
        "train.num_train_epochs=2",
        "train.logging_steps=1",
        "train.disable_tqdm=true",
        "method.prefix_hidden_size=16",
        *more,
    ]


def overrides(
    workspace: pathlib.Path, out: pathlib.Path, *more: str, family: str = "bert"
) -> list[str]:
    return [
        f"model.name={workspace / family}",
        f"data.train_file={workspace / 'train.csv'}",
        f"data.test_file={workspace / 'test.csv'}",
        "data.k=64",
        "data.dev_size=32",
        f"train.output_dir={out}",
        "train.num_train_epochs=3",
        "train.logging_steps=1",
        "method.prefix_hidden_size=16" if not any("method" in m for m in more) else "train.seed=42",
        *more,
    ]


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a run: no variables of launchers, no GPU, no hub, one thread."""
    drop = ("ACCELERATE", "OMP_", "PET_", "SLURM_", "TORCHELASTIC", "SCALEUP_WATCHDOG")
    cpu = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {k: v for k, v in os.environ.items() if not k.startswith(drop)} | cpu | more


def losses(out: pathlib.Path, key: str = "loss") -> list[float]:
    """What a run logged under `key`, in the order of steps."""
    return [
        line[key]
        for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())
        if key in line
    ]
