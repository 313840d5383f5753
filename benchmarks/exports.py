"""Exports of models trained on real data, every kind from every source, and the memory that the export of a BART-large takes.

    python -m tests.exports --model quickstart/model --data ../shared/data --output results/export

Each run is one call of launch/train.py, each export one of scaleup export; its export.json is kept, a table is made of all. Runs what is
missing. About half an hour on two cores.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys

import torch
from peft import get_peft_model
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from scaleup.backbone import sharded as weights
from scaleup.settings import schema as config
from scaleup.training import checkpoint
from scaleup.unipelt.config import UniPeltConfig
from tests.utils.workspace import ROOT, environment

KINDS = {
    "exact": [],
    "standalone": [],
    "merged": ["--max-metric-drop", "100"],
    "merged, pruned 0.02": ["--max-metric-drop", "100", "--prune", "0.02"],
}
SMALL = dict(
    vocab_size=30522,
    pad_token_id=0,
    bos_token_id=101,
    eos_token_id=102,
    max_position_embeddings=512,
)


def small_models(folder: pathlib.Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Backbones of other families with random weights: what they learn is little, what an export does to it shows all the same."""
    tokenizer.eos_token, tokenizer.bos_token = tokenizer.sep_token, tokenizer.cls_token
    shapes = {
        "bart": (
            BartForConditionalGeneration,
            BartConfig(
                **SMALL,
                d_model=128,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=256,
                decoder_ffn_dim=256,
                decoder_start_token_id=102,
                forced_eos_token_id=102,
            ),
        ),
        "t5": (
            T5ForConditionalGeneration,
            T5Config(
                vocab_size=30522,
                pad_token_id=0,
                eos_token_id=102,
                decoder_start_token_id=0,
                d_model=128,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
            ),
        ),
        "llama": (
            LlamaForCausalLM,
            LlamaConfig(
                **SMALL,
                hidden_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=256,
            ),
        ),
    }
    for name, (cls, shape) in shapes.items():
        torch.manual_seed(0)
        cls(shape).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def e2e_data(data: pathlib.Path) -> list[str]:
    return [
        f"data.train_file={data}/seq2seq/e2e_nlg/train.parquet",
        "data.text_column=document",
        "data.target_column=summary",
    ]


def runs(options: argparse.Namespace, work: pathlib.Path) -> dict[str, tuple[int, list[str]]]:
    """name → processes, overrides."""
    often = ["train.eval_strategy=steps", "train.eval_steps=16"]

    def glue(task: str, *more: str) -> list[str]:
        return [
            f"model.name={options.model}",
            f"data.name={task}",
            f"data.path={options.data}/glue",
            "data.k=500",
            "data.dev_size=200",
            "data.max_length=96",
            *often,
            *more,
        ]

    def e2e(family: str, task: str) -> list[str]:
        return [
            f"model.name={work / family}",
            f"data.task={task}",
            *e2e_data(options.data),
            "data.k=500",
            "data.dev_size=32",
            "data.max_length=96",
            "data.max_target_length=24",
            "data.metric=bleu",
            *often,
        ]

    long, short = ["train.num_train_epochs=6"], ["train.max_steps=24"]
    return {
        "minilm film reviews": (
            1,
            ["--config", "configs/quickstart.yaml", f"model.name={options.model}"],
        ),
        "minilm cola": (1, glue("cola", *long)),
        "minilm rte": (1, glue("rte", *long)),
        "minilm cola, ZeRO-3 on 2": (2, glue("cola", "train.deepspeed=zero3", *short)),
        "minilm cola, 8 bit": (1, glue("cola", "model.quantization=8bit", *short)),
        "minilm cola, 4 bit": (1, glue("cola", "model.quantization=nf4", *short)),
        "minilm cola, LoRA": (1, glue("cola", "method.submodules=[lora]", *short)),
        "bart rte": (1, [f"model.name={work / 'bart'}", *glue("rte", *short)[1:]]),
        "t5 e2e": (1, [*e2e("t5", "seq2seq"), *short]),
        "llama e2e": (1, [*e2e("llama", "causal_lm"), *short]),
    }


def train(name: str, processes: int, words: list[str], work: pathlib.Path) -> pathlib.Path:
    """The run's folder."""
    out = work / name.replace(" ", "-").replace(",", "")
    command = (
        ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    done = [f"train.output_dir={out}", "train.resume=auto", "train.disable_tqdm=true"]
    subprocess.run(
        [sys.executable, *command, str(ROOT / "launch" / "train.py"), *words, *done],
        check=True,
        cwd=ROOT,
        env=environment(),
    )
    return out


def large(
    work: pathlib.Path, data: pathlib.Path, tokenizer: PreTrainedTokenizerBase, shard: str
) -> dict[str, dict]:
    """Writing a 1.6 GB BART-large in shards, as standalone and, of an ungated method, merged: peak memory of the process that writes."""
    base, bundle = work / "bart-large", work / "large-run" / "best"
    if not bundle.exists():
        torch.manual_seed(0)
        model = BartForConditionalGeneration(BartConfig())
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        adapted = get_peft_model(model, UniPeltConfig(task_type="SEQ_2_SEQ_LM", gates="learned"))
        settings = config.load(
            None,
            [
                f"model.name={base}",
                "data.task=seq2seq",
                *e2e_data(data),
                f"train.output_dir={work}/large-run",
                "train.resume=auto",
            ],
        )
        written = checkpoint.create_staging_folder(bundle)
        adapted.save_pretrained(written)
        tokenizer.save_pretrained(written)
        (bundle.parent / "config.yaml").write_text(config.to_yaml(settings))
        about = {
            "method": settings.dump()["method"],
            "backbone": {
                "name": str(base),
                "revision": None,
                "quantization": "none",
                "fingerprint": weights.fingerprint(str(base), None),
            },
            "task": "seq2seq",
            "labels": None,
            "data": [],
            "run": {"processes": 1, "zero_stage": 0},
        }
        checkpoint.commit_checkpoint(written, bundle, checkpoint.expected_tensors(adapted), about)
    found = {}
    for kind in ("exact", "standalone"):
        out = work / f"large-{kind}"
        shutil.rmtree(out, ignore_errors=True)
        words = [] if kind == "exact" else ["--max-shard-size", shard]
        found[f"bart-large, {kind}"] = export(bundle, out, ["--kind", kind, "--no-verify", *words])
        shutil.rmtree(out)
    return found


def export(bundle: pathlib.Path, out: pathlib.Path, words: list[str]) -> dict:
    """What export.json says."""
    command = [
        sys.executable,
        "-m",
        "scaleup",
        "export",
        "--checkpoint",
        str(bundle),
        "--output",
        str(out),
        *words,
    ]
    subprocess.run(command, check=True, cwd=ROOT, env=environment())
    return json.loads((out / "export.json").read_text())


def table(reports: dict[str, dict[str, dict]], memory: dict[str, dict]) -> str:
    """Markdown."""
    lines = [
        "# Exports",
        "",
        "Made by `python -m tests.exports`. Each was loaded in a fresh process, the folders where neither scaleup nor PEFT exists.",
        "",
        "| source | kind | logits moved, max | metric before | after | same predictions | reload differs by | dropped | remote code | MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for source, kinds in reports.items():
        for kind, report in kinds.items():
            proof = report["proof"]
            dropped = (
                ""
                if report["calibration"] is None
                else f"{sum(g['dropped'] for g in report['calibration']['gates'])} of {len(report['calibration']['gates'])}"
            )
            same = "" if proof["agreement"] is None else f"{100 * proof['agreement']:.1f}%"
            code = {True: "yes", False: "no"}[report["remote_code"]] if kind != "exact" else "PEFT"
            metric = proof["metric"]
            lines.append(
                f"| {source} | {kind} | {proof['logit_difference']['max']:.1e} | {metric['before']:.2f} ({metric['name']}) | {metric['after']:.2f} | {same} | "
                f"{proof['reload_difference']:.0e} | {dropped} | {code} | {report['bytes']['weights'] / 1e6:.1f} |"
            )
    lines += [
        "",
        "| export without measuring | written, MB | largest file asked, MB | checkpoint, MB | peak memory of the process, MiB |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {report['bytes']['weights'] / 1e6:.1f} | {report['shard']} | {report['bytes']['checkpoint'] / 1e6:.1f} | {report['peak_memory_mib']['writing']:.0f} |"
        for name, report in memory.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path("runs/exports"),
        help="runs and exports stay there",
    )
    parser.add_argument("--only", default="", help="sources whose name contains this")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args()
    work, tokenizer = options.work.resolve(), AutoTokenizer.from_pretrained(options.model)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "llama").exists():
        small_models(work, tokenizer)
    store = options.output / "exports.json"
    kept = json.loads(store.read_text()) if store.exists() else {"reports": {}, "memory": {}}
    for name, (processes, words) in runs(options, work).items():
        if options.only not in name:
            continue
        out = train(name, processes, words, work)
        for kind, more in KINDS.items():
            if kind in kept["reports"].get(name, {}):
                continue
            folder = out / f"export-{kind.partition(',')[0]}{'-pruned' if 'pruned' in kind else ''}"
            shutil.rmtree(folder, ignore_errors=True)
            kept["reports"].setdefault(name, {})[kind] = export(
                out / "best", folder, ["--kind", kind.partition(",")[0], *more]
            )
            store.parent.mkdir(parents=True, exist_ok=True)
            store.write_text(json.dumps(kept, indent=1) + "\n")
    if not kept["memory"]:
        kept["memory"] = {
            name: report | {"shard": shard}
            for shard in ("200MB",)
            for name, report in large(work, options.data, tokenizer, shard).items()
        }
        store.write_text(json.dumps(kept, indent=1) + "\n")
    (options.output / "table.md").write_text(table(kept["reports"], kept["memory"]))
    print(table(kept["reports"], kept["memory"]))


if __name__ == "__main__":
    main()
