import pytest

from tests.utils.package_index import PackageIndex


@pytest.fixture
def index(monkeypatch):
    """Start a package index and make it the only one that pip is told about."""
    with PackageIndex() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server
        server.shutdown()
