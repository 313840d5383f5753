"""Export models that were trained on real data as `plain` and `lora`, and tabulate what is lost.

    python -m benchmarks.absorbed --output results/export/absorbed

Each source is one run of launch/train.py on two cores or fewer, and each export is one call of
`scaleup export`, scored on test data. OUTPUT/exports.json keeps their export.json, and
OUTPUT/table.md has one row per export. Only what is missing is run: about three hours of one core.
It needs `make quickstart` and `make models`.
"""

import argparse
import json
import pathlib

from benchmarks.cases import ROOT, argument_parser, write_result
from benchmarks.exports import export, train

MPNET = ["--config", "configs/mpnet.yaml", "data.k=100", "data.seed=0"]
SOURCES = {
    "MiniLM, film reviews": ["--config", "configs/quickstart.yaml"],
    "MPNet, QQP, 100 examples": [*MPNET, "data.name=qqp"],
    "MPNet, STS-B, 100 examples": [*MPNET, "data.name=stsb"],
    "SmolLM2, E2E, 500 examples": ["--config", "configs/smollm2.yaml"],
}
KINDS = {
    "plain, least squares only": ["--kind", "plain", "--epochs", "0"],
    "plain": ["--kind", "plain"],
    "lora": ["--kind", "lora"],
}
# The larger models have one kind, and two of the sources fewer examples, to save time.
SHORTER = ("MPNet, STS-B, 100 examples", "SmolLM2, E2E, 500 examples")
FEWER = {"MPNet": ("plain",), "SmolLM2": ("plain",)}
MEASURED = ["--calibrate", "test", "--max-metric-drop", "100"]


def row(source: str, kind: str, report: dict) -> str:
    """Return one row of the table."""
    proof, absorption = report["proof"], report["absorption"]
    metric, shares = proof["metric"], absorption["unexplained"].values()
    same = "" if proof["agreement"] is None else f"{100 * proof['agreement']:.1f}%"
    cells = [
        source,
        kind,
        str(absorption["rank"]),
        f"{absorption['examples']:,} ({absorption['unused']:,})",
        f"{100 * sum(shares) / len(shares):.1f}%",
        f"{metric['before']:.2f} ({metric['name']})",
        f"{metric['after']:.2f}",
        same,
        f"{proof['examples']:,}",
        f"{report['bytes']['weights'] / 1e6:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(reports: dict[str, dict[str, dict]]) -> str:
    """Make the Markdown page of all exports."""
    lines = [
        "# Exports without code",
        "",
        "Written by `python -m benchmarks.absorbed`. Each export was loaded in a new process where "
        "scaleup cannot be imported. Least squares left: the mean share of the squared change of "
        "a block's output.",
        "",
        "| source | kind | rank | fitted to examples (not trained on) | least squares left "
        "| metric before | after | same predictions | of test examples | MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        row(source, kind, report)
        for source, kinds in reports.items()
        for kind, report in kinds.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the page."""
    parser: argparse.ArgumentParser = argument_parser(__doc__)
    work_help = "folder in which runs and exports stay (default: runs/absorbed)"
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs/absorbed", help=work_help)
    parser.add_argument("--only", default="", help="sources whose name contains this")
    options = parser.parse_args()
    options.work = options.work.resolve()
    store = options.output / "exports.json"
    reports: dict[str, dict] = json.loads(store.read_text()) if store.exists() else {}
    for name, words in SOURCES.items():
        if options.only not in name:
            continue
        kinds = FEWER.get(name.split(",")[0], tuple(KINDS))
        missing = [kind for kind in kinds if kind not in reports.get(name, {})]
        out = train(name, 1, words, options.work) if missing else options.work
        for kind in missing:
            folder = out / f"export-{kind.replace(',', '').replace(' ', '-')}"
            fewer = ["--examples", "500"] if name in SHORTER else []
            words = [*KINDS[kind], *MEASURED, *fewer]
            found = export(out / "best", folder, words)
            reports.setdefault(name, {})[kind] = found
            write_result(store, reports)
    page = table(reports)
    (options.output / "table.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
