"""SIGKILL to a whole run while it saves, then `train.resume=auto`.

`python -m benchmarks.kill` does this twenty times, also on one process and under ZeRO-2.
"""

import pytest

from benchmarks.kill import kill_test
from tests.utils.workspace import make_workspace


@pytest.mark.distributed
def test_a_run_that_was_killed_in_a_save_ends_like_one_that_was_not(tmp_path):
    row = kill_test(make_workspace(tmp_path), tmp_path, "ZeRO-3 on two", kills=1, seed=0, epochs=6)
    assert row["killed"] == {"in a save": 1} and row["passed"], row
