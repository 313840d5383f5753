"""Run the contract and generation tests; write which check passes for which model family.

python -m benchmarks.families --output docs/families.md
"""

import collections
import pathlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

from benchmarks.cases import ROOT, argument_parser
from tests.utils.tiny import FAMILIES
from tests.utils.workspace import environment

TESTS = ROOT / "tests" / "unit" / "unipelt"
NAMES = ("contract", "generation")  # every file named test_*NAME*.py


def family_of(test: str) -> str | None:
    """Return the family among a test's parameters, as in `test_x[adapter+lora-gpt_neox-sdpa]`."""
    parameters = test.partition("[")[2].rstrip("]")
    families = [
        family for family in FAMILIES if re.search(rf"(^|-){re.escape(family)}(-|$)", parameters)
    ]
    return max(families, key=len, default=None)


def table(report: pathlib.Path) -> str:
    """Make a Markdown table of a JUnit report: one row per family, one column per check."""
    counts: dict[tuple[str, str], collections.Counter] = collections.defaultdict(
        collections.Counter
    )
    checks: dict[str, None] = {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "")
        if (family := family_of(name)) is None:
            continue
        check = name.partition("[")[0].removeprefix("test_").replace("_", " ")
        checks[check] = None
        tags = {child.tag for child in case}
        outcome = "skipped" if "skipped" in tags else "passed"
        counts[check, family]["failed" if tags & {"failure", "error"} else outcome] += 1

    def cell(check: str, family: str) -> str:
        outcomes = counts[check, family]
        if outcomes["failed"]:
            return f"**{outcomes['failed']} failed**"
        return str(outcomes["passed"] or "–")

    lines = [
        "# Model families",
        "",
        "Written by `python -m benchmarks.families`. Each number counts the passing cases (sdpa "
        "and eager, subsets of submodules, kinds of\n"
        'generation) of one contract test; "–" means that the test does not apply to the family.',
        "",
        "| family | " + " | ".join(checks) + " |",
        "|---|" + "---|" * len(checks),
    ]
    for family in FAMILIES:
        lines.append(f"| {family} | " + " | ".join(cell(c, family) for c in checks) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the tests and write the table; return pytest's exit code."""
    options = argument_parser(__doc__).parse_args()
    files = [str(path) for name in NAMES for path in sorted(TESTS.glob(f"test_*{name}*.py"))]
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", f"--junitxml={report}", *files]
        code = subprocess.run(command, cwd=ROOT, env=environment()).returncode
        options.output.write_text(table(report), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
