"""Compares UniPELT with its submodules alone and with NoGate: runs what is missing, then writes a table.

    python launch/compare.py --model quickstart/model --data ../shared/data/glue --tasks cola rte --seeds 0 1 --k 500 \\
        --output results/glue_minilm

Each run is one call of launch/train.py with the method's defaults; its results.json is kept as OUTPUT/<task>-<method>-<seed>.json.
A run that fails stops the comparison and leaves its log. OUTPUT/table.md is written from the files that are there.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
METHODS = {
    "adapter": ["method.submodules=[adapter]"],
    "prefix": ["method.submodules=[prefix]"],
    "lora": ["method.submodules=[lora]"],
    "nogate": ["method.gates=none"],
    "unipelt": [],
}


def run_one(options: argparse.Namespace, task: str, method: str, seed: int, target: pathlib.Path) -> None:
    """One training run; its results.json becomes `target`."""
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        command = [
            sys.executable, str(ROOT / "launch" / "train.py"), f"model.name={options.model}", f"data.name={task}",
            f"data.path={options.data}", f"data.k={options.k}", f"data.seed={seed}", f"train.seed={seed}",
            f"train.output_dir={folder}/run", "train.disable_tqdm=true", *METHODS[method], *options.overrides,
        ]  # fmt: skip
        log = target.with_suffix(".log")
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT).returncode
        if code:
            sys.exit(f"error: {task} {method} seed {seed} failed with exit code {code}; see {log}")
        target.write_text(pathlib.Path(folder, "run", "results.json").read_text(encoding="utf-8"), encoding="utf-8")
        log.unlink()


def table(folder: pathlib.Path) -> str:
    """Markdown: method × task, mean of the test metric in points over data seeds, each seed's score in brackets."""
    runs: dict[tuple[str, str], list[tuple[int, float]]] = {}
    metrics, stored = {}, {}
    for path in sorted(folder.glob("*.json")):
        task, method, seed = path.stem.rsplit("-", 2)
        results = json.loads(path.read_text(encoding="utf-8"))
        runs.setdefault((method, task), []).append((int(seed), 100 * results["test"][results["metric"]]))
        metrics[task] = results["metric"]
        stored[method] = results["parameters"]["stored"]
    lines = [
        "| method | stored parameters | " + " | ".join(f"{task} ({metrics[task]})" for task in metrics) + " |",
        "|---|---|" + "---|" * len(metrics),
    ]
    for method in (m for m in METHODS if m in stored):
        cells = []
        for task in metrics:
            scores = [score for _, score in sorted(runs.get((method, task), []))]
            shown = ", ".join(f"{score:.1f}" for score in scores)
            cells.append(f"{statistics.mean(scores):.1f} ({shown})" if scores else "missing")
        lines.append(f"| {method} | {stored[method]:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line: runs, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="local folder or hub id of the backbone")
    parser.add_argument("--data", required=True, help="folder with <task>/{train,validation}.parquet")
    parser.add_argument("--tasks", nargs="+", required=True, help="GLUE tasks")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="data seeds; the training seed is the same number")
    parser.add_argument("--k", type=int, default=500, help="training examples")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder for the results files and the table")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="passed to every run")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for task in options.tasks:
            for method in METHODS:
                target = options.output / f"{task}-{method}-{seed}.json"
                if not target.exists():
                    run_one(options, task, method, seed, target)
                    print(target, flush=True)
    (options.output / "table.md").write_text(table(options.output), encoding="utf-8")
    print(table(options.output), end="")


if __name__ == "__main__":
    main()
