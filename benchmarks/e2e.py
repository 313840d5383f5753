"""Trains a small BART from nothing on E2E and keeps how BLEU rises and what it writes.

    python -m tests.e2e --output results/e2e [section.key=value …]

A byte-level tokenizer (2,000 pieces) and a BART of about 10M weights are made from the training texts, then launch/train.py
trains all of it: a proof that the seq2seq path learns and is scored rightly, not a result about UniPELT.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import pyarrow.parquet as pq
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import BartConfig, BartForConditionalGeneration, BartTokenizerFast

from tests.utils.workspace import ROOT


def make_model(folder: pathlib.Path, texts: list[str]) -> int:
    """A random BART with a tokenizer for these texts; its number of weights."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts,
        vocab_size=2000,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
    )
    folder.mkdir()
    tokenizer.save_model(str(folder))
    BartTokenizerFast(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(
        d_model=320,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=5,
        decoder_attention_heads=5,
        encoder_ffn_dim=1280,
        decoder_ffn_dim=1280,
    )
    config = BartConfig(
        vocab_size=2000,
        max_position_embeddings=256,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        **sizes,
    )
    config.forced_eos_token_id = None
    model = BartForConditionalGeneration(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data", type=pathlib.Path, default=ROOT.parent / "shared" / "data" / "seq2seq" / "e2e_nlg"
    )
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    table = pq.read_table(options.data / "train.parquet")
    with tempfile.TemporaryDirectory(prefix="e2e-") as name:
        folder = pathlib.Path(name)
        weights = make_model(
            folder / "bart", table["document"].to_pylist() + table["summary"].to_pylist()
        )
        words = [
            "--config",
            str(ROOT / "configs" / "bart_large_seq2seq.yaml"),
            f"model.name={folder / 'bart'}",
            "method=full",
            "train.deepspeed=null",
            f"data.train_file={options.data / 'train.parquet'}",
            f"data.test_file={options.data / 'validation.parquet'}",
            "data.max_target_length=64",
            "data.dev_size=300",
            "train.learning_rate=5e-4",
            "train.num_train_epochs=10",
            "train.per_device_train_batch_size=32",
            f"train.output_dir={folder / 'run'}",
            "train.disable_tqdm=true",
            *options.overrides,
        ]
        subprocess.run(
            [sys.executable, str(ROOT / "launch" / "train.py"), *words], check=True, cwd=ROOT
        )
        run = folder / "run"
        log = [
            json.loads(line)
            for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        found = {
            "weights": weights,
            "dev": [
                {
                    key.removeprefix("eval_"): line[key]
                    for key in ("step", "epoch", "eval_loss", "eval_bleu", "eval_rouge_l")
                }
                for line in log
                if "eval_bleu" in line
            ],
            "test": json.loads((run / "results.json").read_text(encoding="utf-8"))["test"],
            "samples": [
                json.loads(line)["written"]
                for line in (run / "predictions.jsonl")
                .read_text(encoding="utf-8")
                .splitlines()[::70]
            ],  # the data itself is not ours to pass on
        }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(
        json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
