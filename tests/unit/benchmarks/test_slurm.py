"""What the Slurm test cluster says on a machine on which it cannot run."""

import os
import shutil

import pytest

from benchmarks import slurm


@pytest.mark.parametrize(
    "user, said",
    [
        (1000, "error: a test cluster needs root, "),
        (0, "error: not found: munged, slurmctld, slurmd, ip, unshare (Debian packages "),
    ],
    ids=["not root", "no apt"],
)
def test_a_machine_without_root_or_apt_is_told_in_one_line_what_is_missing(monkeypatch, user, said):
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(slurm.subprocess, "run", lambda *_, **__: pytest.fail("a program started"))
    with pytest.raises(SystemExit) as refused:
        slurm.install()
    message = str(refused.value)
    assert message.startswith(said) and "\n" not in message
