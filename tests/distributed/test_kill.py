"""SIGKILL to a whole job, in the middle of a save, and `train.resume=auto`. `python -m tests.kill` does it twenty times, also to one process and
under ZeRO-2."""

import pytest

from benchmarks.kill import kill_test
from tests.utils.workspace import make_workspace


@pytest.mark.distributed
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path):
    row = kill_test(make_workspace(tmp_path), tmp_path, "ZeRO-3 on two", kills=1, seed=0, epochs=6)
    assert row["killed"] == {"in a save": 1} and row["passed"], row
