"""The paper's tables and figures from finished runs, with the paper's numbers beside ours; and what a run's gates do.

    python launch/report.py table1 --runs results/minilm
    python launch/report.py gates --run runs/one --run runs/other --data dev

Prints, and writes Markdown, CSV and PNG. Exit codes: 0 done; 2 something must change (one message with everything); 130 interrupted.
"""

import argparse
import os
import pathlib
import sys
import warnings


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from scaleup import errors  # noqa: E402
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings(
    "ignore", category=FutureWarning, module="torch.distributed"
)  # between torch and DeepSpeed
NAMES = ("table1", "table2", "table3", "table4", "table5", "table6", "figure2", "figure3", "gates")


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", choices=NAMES, help="what to make")
    parser.add_argument(
        "--runs",
        action="append",
        metavar="FOLDER",
        help="of a sweep or a run (repeatable; default: that of configs/sweeps/)",
    )
    parser.add_argument(
        "--run",
        action="append",
        metavar="FOLDER",
        help="gates: of one finished run (repeatable: to compare)",
    )
    parser.add_argument(
        "--data",
        metavar="SET",
        help="gates: train, dev, test, or a file with the run's columns (default: dev, if best/ is there)",
    )
    parser.add_argument(
        "--bench",
        action="append",
        metavar="PATH",
        help="table4: files of launch/bench.py, or a folder (default: results/bench)",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="FOLDER",
        help="where to write (default: report/ in the first folder)",
    )
    options = parser.parse_args()
    try:
        return _report(options)
    except KeyboardInterrupt:
        return 130


def _report(options: argparse.Namespace) -> int:
    import datasets
    from transformers.utils import logging

    from scaleup.experiments import gates as gatereport
    from scaleup.experiments import report

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    of_gates = options.name == "gates"
    takes = {
        "--runs": not of_gates,
        "--run": of_gates,
        "--data": of_gates,
        "--bench": options.name == "table4",
    }
    try:
        given = {
            "--runs": options.runs,
            "--run": options.run,
            "--data": options.data,
            "--bench": options.bench,
        }
        problems = [
            f"{key}: has no effect on {options.name}; leave it out"
            for key, value in given.items()
            if value is not None and not takes[key]
        ]
        problems += ["--run: which run? give its folder"] * (of_gates and not options.run)
        if problems:
            raise errors.ConfigError(problems)
        folders = options.run if of_gates else options.runs or [report.RUNS[options.name]]
        output = options.output or pathlib.Path(folders[0], "report")
        if of_gates:
            lines = gatereport.report(folders, options.data, output)
        else:
            lines = report.report(options.name, folders, output, options.bench or [report.BENCH])
    except errors.ConfigError as error:
        count = len(error.problems)
        print(
            f"error: {count} problem{'s' * (count > 1)}:"
            + "".join(f"\n  - {p}" for p in error.problems),
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        print(
            f"error: {error.strerror or error}{': ' + str(error.filename) if error.filename else ''}",
            file=sys.stderr,
        )
        return 2
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
