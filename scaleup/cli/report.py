"""Make the paper's tables and figures from finished runs, and show what the gates of a run do.

    scaleup report table1 --runs results/minilm.csv
    scaleup report gates --run runs/one --run runs/other --data dev

The paper's numbers stand beside those of the runs. The command prints a table and writes Markdown
and CSV, and PNG for figures and gates. Exit codes: 0 done; 2 an argument must change; 130
interrupted.
"""

import argparse
import pathlib

from scaleup.cli.exit_codes import DONE
from scaleup.errors import ConfigError

NAMES = ("table1", "table2", "table3", "table4", "table5", "table6", "figure2", "figure3", "gates")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("name", choices=NAMES, help="what to make")
    parser.add_argument(
        "--runs",
        action="append",
        metavar="PATH",
        help="folder of a sweep or a run, or a table of runs such as a sweep's results.csv "
        "(repeatable; default: the output of the sweep of that name in configs/sweeps/)",
    )
    parser.add_argument(
        "--run",
        action="append",
        metavar="PATH",
        help="gates: folder of a finished run, or TABLE.csv/TRIAL (repeatable, to compare runs)",
    )
    parser.add_argument(
        "--data",
        metavar="SET",
        help="gates: train, dev, test, or a file with the columns of the run's data "
        "(default: dev, if best/ exists)",
    )
    parser.add_argument(
        "--bench",
        action="append",
        metavar="PATH",
        help="table4: files of `scaleup bench`, or their folder (default: results/bench)",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="FOLDER",
        help="folder to write to (default: report/ in the first folder, or TABLE/report/)",
    )


def run(options: argparse.Namespace) -> int:
    """Make the report and print it. Returns the exit code."""
    from scaleup.cli.entry import hide_progress_bars
    from scaleup.experiments import gates, report

    hide_progress_bars()
    of_gates = options.name == "gates"
    has_effect = {
        "runs": not of_gates,
        "run": of_gates,
        "data": of_gates,
        "bench": options.name == "table4",
    }
    problems = [
        f"--{key}: has no effect on {options.name}; leave it out"
        for key, effect in has_effect.items()
        if getattr(options, key) is not None and not effect
    ]
    if of_gates and not options.run:
        problems.append("--run: which run? give its folder")
    if problems:
        raise ConfigError(problems)
    folders = options.run if of_gates else options.runs or [report.RUNS[options.name]]
    output = options.output or report.default_output(folders[0])
    if of_gates:
        lines = gates.report(folders, options.data, output)
    else:
        lines = report.report(options.name, folders, output, options.bench or [report.BENCH])
    print(*lines, sep="\n")
    return DONE
