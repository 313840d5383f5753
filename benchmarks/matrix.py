"""Try every combination of the support matrix with tiny models on two processes.

    python -m benchmarks.matrix --output docs/support-matrix.md

Engine × precision × quantisation × gradient checkpointing × backbone family. Each combination
trains two steps, is scored and saved, restores its best checkpoint, and resumes for a third step. A
combination that scaleup does not support is refused at the start; the table then has the message.
"""

import itertools
import json
import pathlib
import subprocess
import tempfile

from benchmarks.cases import argument_parser, start_cases
from tests.utils.workspace import environment, make_workspace, overrides

STAGES = {
    "DDP": [],
    "FSDP": ["train.fsdp=full"],
    "ZeRO-1": ["train.deepspeed=zero1"],
    "ZeRO-2": ["train.deepspeed=zero2"],
    "ZeRO-3": ["train.deepspeed=zero3"],
    "ZeRO-3 hpZ": ["train.deepspeed=zero3_hpz"],
    "ZeRO-3 offload": ["train.deepspeed=zero3_offload"],
}
PRECISIONS = {"fp32": ["train.bf16=false"], "bf16": ["train.bf16=true"]}
QUANTISATION = {"none": [], "8bit": ["model.quantization=8bit"], "nf4": ["model.quantization=nf4"]}
CHECKPOINTING = {"no": [], "yes": ["train.gradient_checkpointing=true"]}
FAMILIES = ("bert", "bart")
SETTINGS = [
    "data.k=16",
    "data.dev_size=8",
    "train.per_device_train_batch_size=4",
    "train.eval_strategy=steps",
    "train.eval_steps=1",
    "train.disable_tqdm=true",
    "train.lr_scheduler_type=constant",
]
RESUMED = "+"  # suffix of the case that resumes a combination


def combinations(workspace: pathlib.Path, folder: pathlib.Path) -> dict[str, list[str]]:
    """Return the overrides of every combination and of the case that resumes it."""
    cases = {}
    axes = (STAGES, PRECISIONS, QUANTISATION, CHECKPOINTING)
    for *keys, family in itertools.product(*axes, FAMILIES):
        name = "/".join([*keys, family])
        words = [word for axis, key in zip(axes, keys) for word in axis[key]]
        out = folder / name.replace("/", "-").replace(" ", "-")
        for suffix, steps in (
            ("", ["train.max_steps=2"]),
            (RESUMED, ["train.max_steps=3", "train.resume=auto"]),
        ):
            words_of_case = [*words, *SETTINGS, *steps]
            cases[name + suffix] = overrides(workspace, out, *words_of_case, family=family)
    return cases


def table(results: dict[str, str | None], processes: int) -> str:
    """Make the Markdown page: a row per stage, precision and quantisation."""
    columns = [(family, key) for family in FAMILIES for key in CHECKPOINTING]
    heads = [f"{family}{', checkpointing' if key == 'yes' else ''}" for family, key in columns]
    refusals: list[str] = []

    def cell(*keys: str) -> str:
        name = "/".join(keys)
        messages = [results.get(name), results.get(name + RESUMED)]
        message = next((message for message in messages if message is not None), None)
        if message is None:
            return "works"
        if message not in refusals:
            refusals.append(message)
        return f"refused [{refusals.index(message) + 1}]"

    lines = [
        "# Support matrix",
        "",
        'Written by `python -m benchmarks.matrix`. "works" means that a model was trained for two '
        f"steps on {processes} CPU processes, scored, saved, loaded\nand resumed.",
        "",
        "| stage | precision | quantisation | " + " | ".join(heads) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for stage, precision, quantisation in itertools.product(STAGES, PRECISIONS, QUANTISATION):
        row = [cell(stage, precision, quantisation, key, family) for family, key in columns]
        lines.append(f"| {stage} | {precision} | {quantisation} | " + " | ".join(row) + " |")
    lines += ["", *(f"[{number}] {text}\n" for number, text in enumerate(refusals, 1))]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Run the combinations and write the page."""
    parser = argument_parser(__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--only", default="", help="only print combinations whose name has this: ZeRO-3/bf16"
    )
    options = parser.parse_args()
    results: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory(prefix="matrix-") as name:
        folder = pathlib.Path(name)
        cases = combinations(make_workspace(folder), folder)
        # New processes for each stage, because remains of DeepSpeed's engines slow the next ones.
        for stage in STAGES:
            selected = {
                key: words
                for key, words in cases.items()
                if key.startswith(f"{stage}/") and options.only in key
            }
            if not selected:
                continue
            results |= start_cases(
                selected,
                folder / f"{stage}.json",
                options.processes,
                env=environment(),
                stdout=subprocess.DEVNULL,
            )
    if options.only:
        print(json.dumps(results, indent=1))
        return
    page = table(results, options.processes)
    options.output.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
