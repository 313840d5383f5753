"""Fixtures of the tests with several processes."""

import contextlib

import pytest

from benchmarks.two_hosts import TwoHosts


@pytest.fixture
def both(tmp_path):
    """Two hosts. Skips where this machine does not let us make them."""
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(TwoHosts(tmp_path))
        except OSError as error:
            pytest.skip(f"no network namespaces here (root and iproute2 are needed): {error}")
        yield hosts
