"""Runs every cell of the support matrix on tiny models, on two processes, and writes docs/support-matrix.md.

    python -m tests.matrix --output docs/support-matrix.md

ZeRO stage × precision × quantisation × gradient checkpointing × backbone family. A cell trains two steps, is scored, saved,
restored to its best checkpoint and resumed for a third step. What a cell cannot do it refuses at start; the table then has the refusal.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import tempfile

from benchmarks.cases import start_cases
from tests.utils.workspace import environment, make_workspace, overrides

STAGES = {
    "DDP": [],
    "ZeRO-1": ["train.deepspeed=zero1"],
    "ZeRO-2": ["train.deepspeed=zero2"],
    "ZeRO-3": ["train.deepspeed=zero3"],
    "ZeRO-3 offload": ["train.deepspeed=zero3_offload"],
}
PRECISIONS = {"fp32": ["train.bf16=false"], "bf16": ["train.bf16=true"]}
QUANTISATION = {"none": [], "8bit": ["model.quantization=8bit"], "nf4": ["model.quantization=nf4"]}
CHECKPOINTING = {"no": [], "yes": ["train.gradient_checkpointing=true"]}
FAMILIES = ("bert", "bart")


def cells(workspace: pathlib.Path, folder: pathlib.Path) -> dict[str, list[str]]:
    """name → overrides, of every cell and of its continuation."""
    found = {}
    for parts in itertools.product(
        STAGES.items(), PRECISIONS.items(), QUANTISATION.items(), CHECKPOINTING.items(), FAMILIES
    ):
        *options, family = parts
        name = "/".join([*(key for key, _ in options), family])
        more = [word for _, words in options for word in words]
        # Dropout off and few examples: the cell is about what works, not about what is learnt.
        shared = [
            "data.k=16",
            "data.dev_size=8",
            "train.per_device_train_batch_size=4",
            "train.eval_strategy=steps",
            "train.eval_steps=1",
            "train.disable_tqdm=true",
            "train.lr_scheduler_type=constant",
        ]
        out = folder / name.replace("/", "-").replace(" ", "-")
        for suffix, steps in (
            ("", ["train.max_steps=2"]),
            ("+", ["train.max_steps=3", "train.resume=auto"]),
        ):
            found[name + suffix] = overrides(workspace, out, *more, *shared, *steps, family=family)
    return found


def table(results: dict[str, str | None], processes: int) -> str:
    """Markdown: a row per stage, precision and quantisation; a column per family and checkpointing."""
    columns = [(family, key) for family in FAMILIES for key in CHECKPOINTING]
    notes: list[str] = []

    def cell(*parts: str) -> str:
        said = [
            results[name] for name in ("/".join(parts), "/".join(parts) + "+") if name in results
        ]
        wrong = next((words for words in said if words is not None), None)
        if wrong is None:
            return "works"
        if wrong not in notes:
            notes.append(wrong)
        return f"refused [{notes.index(wrong) + 1}]"

    lines = [
        "# Support matrix",
        "",
        f"Made by `python -m tests.matrix`: every cell trained two steps on {processes} CPU processes, was scored, saved, restored and resumed.",
        "",
        "| stage | precision | quantisation | "
        + " | ".join(f"{f}{', checkpointing' if key == 'yes' else ''}" for f, key in columns)
        + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for stage, precision, quantisation in itertools.product(STAGES, PRECISIONS, QUANTISATION):
        row = [cell(stage, precision, quantisation, key, family) for family, key in columns]
        lines.append(f"| {stage} | {precision} | {quantisation} | " + " | ".join(row) + " |")
    lines += [""] + [f"[{i + 1}] {words}\n" for i, words in enumerate(notes)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--only", default="", help="cells whose name contains this, e.g. ZeRO-3/bf16"
    )
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="matrix-") as name:
        folder = pathlib.Path(name)
        chosen = {
            key: words
            for key, words in cells(make_workspace(folder), folder).items()
            if options.only in key
        }
        results = {}
        for (
            stage
        ) in STAGES:  # anew for each: what DeepSpeed engines leave behind slows the next ones down
            share = {key: words for key, words in chosen.items() if key.startswith(f"{stage}/")}
            results |= start_cases(
                share,
                folder / f"{stage}.json",
                options.processes,
                env=environment(),
                stdout=subprocess.DEVNULL,
            )
    if options.only:
        print(json.dumps(results, indent=1))
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(table(results, options.processes), encoding="utf-8")
    print(table(results, options.processes))


if __name__ == "__main__":
    main()
