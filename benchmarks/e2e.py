"""Train a small BART from random weights on E2E; record how BLEU rises and what the model writes.

    python -m benchmarks.e2e --output results/e2e/results.json [section.key=value …]

The script makes a byte-level tokenizer (2,000 pieces) and a BART of about 10M weights from the
training texts and trains all weights. This shows that sequence-to-sequence training learns and is
scored correctly; it is not a result about UniPELT.
"""

import json
import pathlib
import subprocess
import tempfile

import pyarrow.parquet as pq
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import BartConfig, BartForConditionalGeneration, BartTokenizerFast

from benchmarks.cases import ROOT, argument_parser, command, write_result

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
VOCABULARY = 2000
SCORES = ("step", "epoch", "eval_loss", "eval_bleu", "eval_rouge_l")


def make_model(folder: pathlib.Path, texts: list[str]) -> int:
    """Save a random BART and a tokenizer for these texts; return the number of weights."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    folder.mkdir()
    tokenizer.save_model(str(folder))
    BartTokenizerFast(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        d_model=320,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=5,
        decoder_attention_heads=5,
        encoder_ffn_dim=1280,
        decoder_ffn_dim=1280,
    )
    config.forced_eos_token_id = None
    model = BartForConditionalGeneration(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def read_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Train the model and write the result."""
    parser = argument_parser(__doc__)
    data = ROOT.parent / "shared" / "data" / "seq2seq" / "e2e_nlg"
    parser.add_argument("--data", type=pathlib.Path, default=data)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    rows = pq.read_table(options.data / "train.parquet")
    texts = rows["document"].to_pylist() + rows["summary"].to_pylist()
    with tempfile.TemporaryDirectory(prefix="e2e-") as name:
        model, out = pathlib.Path(name, "bart"), pathlib.Path(name, "run")
        weights = make_model(model, texts)
        words = [
            "--config",
            str(ROOT / "configs" / "bart_large_seq2seq.yaml"),
            f"model.name={model}",
            "method=full",
            "train.deepspeed=null",
            f"data.train_file={options.data / 'train.parquet'}",
            f"data.test_file={options.data / 'validation.parquet'}",
            "data.max_target_length=64",
            "data.dev_size=300",
            "train.learning_rate=5e-4",
            "train.num_train_epochs=10",
            "train.per_device_train_batch_size=32",
            f"train.output_dir={out}",
            "train.disable_tqdm=true",
            *options.overrides,
        ]
        subprocess.run(command(ROOT / "launch" / "train.py", words, 1), check=True, cwd=ROOT)
        log = [line for line in read_lines(out / "log.jsonl") if "eval_bleu" in line]
        result = {
            "weights": weights,
            "dev": [{key.removeprefix("eval_"): line[key] for key in SCORES} for line in log],
            "test": json.loads((out / "results.json").read_text(encoding="utf-8"))["test"],
            # Only what the model wrote: the licence of the data does not allow copies.
            "samples": [row["written"] for row in read_lines(out / "predictions.jsonl")[::70]],
        }
    write_result(options.output, result)
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
