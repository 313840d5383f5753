"""Every Triton kernel equals its formula, without a GPU."""

import os
import re
import subprocess
import sys

from tests.conftest import ROOT


def test_every_kernel_equals_its_formula_in_the_interpreter():
    """Run interpreted.py, because Triton decides at its import whether it interprets."""
    path = "tests/unit/unipelt/kernels/interpreted.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", path, "-q", "--noconftest", "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 40, done.stdout
