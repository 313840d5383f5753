"""Export models that were trained on real data, every kind from every source, and tabulate them.

    python -m benchmarks.exports --model quickstart/model --data ../shared/data --output
    results/export

Each source is one run of launch/train.py, and each export is one call of `scaleup export`, whose
export.json is kept in OUTPUT/exports.json. OUTPUT/table.md has one row per export, and the memory
that writing a BART-large takes. Only what is missing is run. It takes half an hour on two cores.
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

from benchmarks.cases import ROOT, argument_parser, command, write_result
from scaleup.backbone import weights
from scaleup.settings import schema
from scaleup.training import checkpoint
from scaleup.training.manifest import Manifest
from scaleup.unipelt.config import UniPeltConfig
from tests.utils.workspace import environment

KINDS = {
    "exact": [],
    "standalone": [],
    "merged": ["--max-metric-drop", "100"],
    "merged, pruned 0.02": ["--max-metric-drop", "100", "--prune", "0.02"],
}
SMALL = {
    "vocab_size": 30522,
    "pad_token_id": 0,
    "bos_token_id": 101,
    "eos_token_id": 102,
    "max_position_embeddings": 512,
}
MAX_SHARD_SIZE = "200MB"  # for the exports of BART-large


def save_small_models(folder: pathlib.Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save backbones of other families with random weights.

    They learn little, but what an export changes can be measured all the same.
    """
    tokenizer.eos_token, tokenizer.bos_token = tokenizer.sep_token, tokenizer.cls_token
    bart = BartConfig(
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
    )
    t5 = T5Config(
        vocab_size=30522,
        pad_token_id=0,
        eos_token_id=102,
        decoder_start_token_id=0,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
    )
    llama = LlamaConfig(
        **SMALL,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
    )
    for name, model_class, config in (
        ("bart", BartForConditionalGeneration, bart),
        ("t5", T5ForConditionalGeneration, t5),
        ("llama", LlamaForCausalLM, llama),
    ):
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def e2e_data(data: pathlib.Path) -> list[str]:
    """Return the overrides that read the E2E data."""
    return [
        f"data.train_file={data}/seq2seq/e2e_nlg/train.parquet",
        "data.text_column=document",
        "data.target_column=summary",
    ]


def sources(options: argparse.Namespace) -> dict[str, tuple[int, list[str]]]:
    """Return the number of processes and the overrides of every run."""
    often = ["train.eval_strategy=steps", "train.eval_steps=16"]
    long, short = ["train.num_train_epochs=6"], ["train.max_steps=24"]
    minilm, work = str(options.model), options.work

    def glue(task: str, *more: str, model: str = minilm) -> list[str]:
        return [
            f"model.name={model}",
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
            *short,
        ]

    reviews = ["--config", "configs/quickstart.yaml", f"model.name={minilm}"]
    return {
        "minilm film reviews": (1, reviews),
        "minilm cola": (1, glue("cola", *long)),
        "minilm rte": (1, glue("rte", *long)),
        "minilm cola, ZeRO-3 on 2": (2, glue("cola", "train.deepspeed=zero3", *short)),
        "minilm cola, int8": (1, glue("cola", "model.quantization=8bit", *short)),
        "minilm cola, nf4": (1, glue("cola", "model.quantization=nf4", *short)),
        "minilm cola, LoRA": (1, glue("cola", "method.submodules=[lora]", *short)),
        "bart rte": (1, glue("rte", *short, model=str(work / "bart"))),
        "t5 e2e": (1, e2e("t5", "seq2seq")),
        "llama e2e": (1, e2e("llama", "causal_lm")),
    }


def train(name: str, processes: int, words: list[str], work: pathlib.Path) -> pathlib.Path:
    """Run a source, or continue it; return its output folder."""
    out = work / name.replace(" ", "-").replace(",", "")
    words = [*words, f"train.output_dir={out}", "train.resume=auto", "train.disable_tqdm=true"]
    script = ROOT / "launch" / "train.py"
    subprocess.run(command(script, words, processes), check=True, cwd=ROOT, env=environment())
    return out


def export(checkpoint_folder: pathlib.Path, out: pathlib.Path, words: list[str]) -> dict:
    """Export a checkpoint into `out`; return the content of export.json."""
    shutil.rmtree(out, ignore_errors=True)
    paths = ["--checkpoint", str(checkpoint_folder), "--output", str(out)]
    subprocess.run(
        [sys.executable, "-m", "scaleup", "export", *paths, *words],
        check=True,
        cwd=ROOT,
        env=environment(),
    )
    return json.loads((out / "export.json").read_text())


def save_large_checkpoint(
    folder: pathlib.Path, work: pathlib.Path, data: pathlib.Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Save an adapter checkpoint of an untrained UniPELT on a BART-large with random weights."""
    base = work / "bart-large"
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig())
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapted = get_peft_model(model, UniPeltConfig(task_type="SEQ_2_SEQ_LM", gates="learned"))
    overrides = [
        f"model.name={base}",
        "data.task=seq2seq",
        *e2e_data(data),
        f"train.output_dir={folder.parent}",
        "train.resume=auto",
    ]
    settings = schema.load(None, overrides)
    staging = checkpoint.create_staging_folder(folder)
    adapted.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    (folder.parent / "config.yaml").write_text(schema.to_yaml(settings))
    manifest = Manifest(
        method=settings.dump()["method"],
        backbone={
            "name": str(base),
            "revision": None,
            "quantization": "none",
            "fingerprint": weights.fingerprint(str(base), None),
        },
        task="seq2seq",
        labels=None,
        data=[],
        run={"processes": 1, "zero_stage": 0},
    )
    checkpoint.commit_checkpoint(staging, folder, checkpoint.expected_tensors(adapted), manifest)


def export_large(
    work: pathlib.Path, data: pathlib.Path, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict]:
    """Export a BART-large (1.6 GB) without verification; measure the memory of the process."""
    folder = work / "large-run" / "best"
    if not folder.exists():
        save_large_checkpoint(folder, work, data, tokenizer)
    reports = {}
    for kind, words in (("exact", []), ("standalone", ["--max-shard-size", MAX_SHARD_SIZE])):
        out = work / f"large-{kind}"
        report = export(folder, out, ["--kind", kind, "--no-verify", *words])
        reports[f"bart-large, {kind}"] = report | {"shard": MAX_SHARD_SIZE}
        shutil.rmtree(out)
    return reports


def table(reports: dict[str, dict[str, dict]], memory: dict[str, dict]) -> str:
    """Make the Markdown page of all exports."""
    lines = [
        "# Exports",
        "",
        "Written by `python -m benchmarks.exports`. Each export was loaded in a new process, "
        "standalone and merged ones where neither scaleup nor PEFT is installed.",
        "",
        "| source | kind | logits moved, max | metric before | after | same predictions "
        "| reload differs by | dropped | remote code | MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for source, kinds in reports.items():
        for kind, report in kinds.items():
            proof, metric = report["proof"], report["proof"]["metric"]
            dropped = ""
            if report["calibration"] is not None:
                gates = report["calibration"]["gates"]
                dropped = f"{sum(gate['dropped'] for gate in gates)} of {len(gates)}"
            same = "" if proof["agreement"] is None else f"{100 * proof['agreement']:.1f}%"
            code = "yes" if report["remote_code"] else "no"
            cells = [
                source,
                kind,
                f"{proof['logit_difference']['max']:.1e}",
                f"{metric['before']:.2f} ({metric['name']})",
                f"{metric['after']:.2f}",
                same,
                f"{proof['reload_difference']:.0e}",
                dropped,
                code if kind != "exact" else "PEFT",
                f"{report['bytes']['weights'] / 1e6:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| export without measuring | written, MB | largest file, MB | checkpoint, MB "
        "| peak memory of the process, MiB |",
        "|---|---|---|---|---|",
    ]
    for name, report in memory.items():
        written, adapter = (report["bytes"][key] / 1e6 for key in ("weights", "checkpoint"))
        peak = report["peak_memory_mib"]["writing"]
        lines.append(f"| {name} | {written:.1f} | {report['shard']} | {adapter:.1f} | {peak:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the page."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    work_help = "folder in which runs and exports stay (default: runs/exports)"
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs/exports", help=work_help)
    parser.add_argument("--only", default="", help="sources whose name contains this")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if not (options.work / "llama").exists():
        save_small_models(options.work, tokenizer)
    store = options.output / "exports.json"
    results = json.loads(store.read_text()) if store.exists() else {"reports": {}, "memory": {}}
    for name, (processes, words) in sources(options).items():
        if options.only not in name:
            continue
        out = train(name, processes, words, options.work)
        reports = results["reports"].setdefault(name, {})
        for kind, more in KINDS.items():
            if kind not in reports:
                plain, _, pruned = kind.partition(",")
                folder = out / f"export-{plain}{'-pruned' if pruned else ''}"
                reports[kind] = export(out / "best", folder, ["--kind", plain, *more])
                write_result(store, results)
    if not results["memory"]:
        results["memory"] = export_large(options.work, options.data, tokenizer)
        write_result(store, results)
    page = table(results["reports"], results["memory"])
    (options.output / "table.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
