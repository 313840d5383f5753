"""Make the paper's tables and figures from finished runs, and show what the gates of a run do.

    scaleup report table1 --runs results/minilm.csv
    scaleup report differences --runs results/minilm.csv
    scaleup report gates --run runs/one --run runs/other --data dev

The paper's numbers stand beside those of the runs. The command prints a table and writes Markdown
and CSV, and PNG for figures, differences and gates. Exit codes: 0 done; 2 an argument must
change; 130 interrupted.
"""

import argparse
from pathlib import Path

from scaleup.cli.config import add_trust_argument
from scaleup.cli.exit_codes import DONE
from scaleup.errors import ConfigError

TABLES = ("table1", "table2", "table3", "table4", "table5", "table6", "differences")
NAMES = (*TABLES, "figure2", "figure3", "gates")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add = parser.add_argument
    add("name", choices=NAMES, help="what to make")
    runs = (
        "folder of a sweep or a run, or a table of runs such as a sweep's results.csv "
        "(repeatable; default: the output of the sweep of that name in configs/sweeps/)"
    )
    add("--runs", action="append", metavar="PATH", help=runs)
    of_gates = "gates: folder of a finished run, or TABLE.csv/TRIAL (repeatable, to compare runs)"
    add("--run", action="append", metavar="PATH", help=of_gates)
    data = (
        "gates: train, dev, test, or a file with the columns of the run's data "
        "(default: dev, if best/ exists)"
    )
    add("--data", metavar="SET", help=data)
    add_trust_argument(parser)
    bench = "table4: files of `scaleup bench`, or their folder (default: results/bench)"
    add("--bench", action="append", metavar="PATH", help=bench)
    output = "folder to write to (default: report/ in the first folder, or TABLE/report/)"
    add("--output", type=Path, metavar="FOLDER", help=output)


def run(options: argparse.Namespace) -> int:
    """Make the report and print it. Returns the exit code."""
    from scaleup.cli.entry import hide_progress_bars
    from scaleup.experiments import gates, report

    hide_progress_bars()
    of_gates = options.name == "gates"
    idle = {"runs": of_gates, "run": not of_gates, "data": not of_gates}
    idle["trust_remote_code"] = not of_gates
    idle["bench"] = options.name != "table4"
    problems = [
        f"--{key.replace('_', '-')}: has no effect on {options.name}; leave it out"
        for key, has_no_effect in idle.items()
        if getattr(options, key) not in (None, False) and has_no_effect
    ]
    if of_gates and not options.run:
        problems.append("--run: which run? give its folder")
    if problems:
        raise ConfigError(problems)
    folders = options.run if of_gates else options.runs or [report.RUNS[options.name]]
    output = options.output or report.default_output(folders[0])
    if of_gates:
        lines = gates.report(folders, options.data, output, options.trust_remote_code)
    else:
        lines = report.report(options.name, folders, output, options.bench or [report.BENCH])
    print(*lines, sep="\n")
    return DONE
