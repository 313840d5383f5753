"""Runs the contract and the generation tests and writes which check holds for which family.

python -m tests.families --output docs/families.md
"""

import argparse
import collections
import pathlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

from tests.utils.tiny import FAMILIES
from tests.utils.workspace import ROOT, environment

FILES = ("tests/test_contract.py", "tests/test_generation.py")


def family_of(name: str) -> str | None:
    """The family among a test's parameters, e.g. `test_x[adapter+lora-gpt_neox-sdpa]`."""
    found = re.search(r"\[(.*)\]", name)
    parameters = found[1] if found else ""
    inside = [
        family for family in FAMILIES if re.search(rf"(^|-){re.escape(family)}(-|$)", parameters)
    ]
    return max(inside, key=len, default=None)


def table(report: pathlib.Path) -> str:
    """Markdown: a row per check, a column per family; how many cases passed, or failed."""
    counts: dict[tuple[str, str], collections.Counter] = collections.defaultdict(
        collections.Counter
    )
    checks: dict[str, None] = {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        family, check = (
            family_of(case.get("name")),
            case.get("name").partition("[")[0].removeprefix("test_").replace("_", " "),
        )
        if family is not None:
            kinds = {child.tag for child in case}
            counts[check, family][
                "failed"
                if kinds & {"failure", "error"}
                else "skipped"
                if "skipped" in kinds
                else "passed"
            ] += 1
            checks[check] = None

    def cell(check: str, family: str) -> str:
        found = counts.get((check, family), {})
        if found.get("failed"):
            return f"**{found['failed']} failed**"
        return str(found["passed"]) if found.get("passed") else "–"

    lines = [
        "# Families",
        "",
        "Made by `python -m tests.families`: cases that passed (sdpa and eager, subsets of submodules, kinds of generation). –: does not apply.",
        "",
        "| family | " + " | ".join(checks) + " |",
        "|---|" + "---|" * len(checks),
    ]
    lines += [
        f"| {family} | " + " | ".join(cell(check, family) for check in checks) + " |"
        for family in FAMILIES
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", f"--junitxml={report}", *FILES]
        code = subprocess.run(command, cwd=ROOT, env=environment()).returncode
        options.output.write_text(table(report), encoding="utf-8")
    sys.exit(code)


if __name__ == "__main__":
    main()
