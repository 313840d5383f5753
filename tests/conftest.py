"""What every test shares: a fixed environment, set before torch is imported, and the folder of real data."""

import fcntl
import os
import pathlib
import tempfile
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# No test may reach a hub, and forks after a tokenizer has started threads would warn. One thread: the models are tiny, and two
# test processes with two threads each would only wait for each other.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")


def pytest_configure(config: pytest.Config) -> None:
    # `-m gpu` alone leaves the GPU visible: everywhere else results are to be those of a machine without one.
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    # A test of several processes waits for the other worker's: four processes at once on two cores are much slower than two after two.
    if not item.get_closest_marker("distributed") or not hasattr(item.config, "workerinput"):
        return (yield)
    with open(
        pathlib.Path(
            tempfile.gettempdir(), f"scaleup-{item.config.workerinput['testrunuid']}.lock"
        ),
        "w",
    ) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return (yield)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """Folder with glue/ and seq2seq/: $SCALEUP_DATA, else ../shared/data. Skips the test where there is none."""
    folder = pathlib.Path(os.environ.get("SCALEUP_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "glue").is_dir():
        pytest.skip(f"no GLUE data in {folder}; set SCALEUP_DATA to the folder that has glue/")
    return folder


@pytest.fixture(scope="session")
def quickstart_dir() -> pathlib.Path:
    """quickstart/ with its model and data. Skips the test where `make quickstart` has not made them."""
    folder = ROOT / "quickstart"
    if not all((folder / part / "SHA256SUMS").is_file() for part in ("model", "data")):
        pytest.skip("no quickstart/; benchmarks/quickstart_assets.py makes it")
    return folder


@pytest.fixture(params=["few keys", "many keys"])
def keys(request, monkeypatch) -> str:
    """Both ways of the sdpa attention with a prefix on a CPU: tiny models have few keys, which torch's kernels do not see."""
    if request.param == "many keys":
        monkeypatch.setattr("scaleup.unipelt.kernels.short_attention.MOST_KEYS", 0)
        monkeypatch.setattr("scaleup.unipelt.kernels.short_attention.MOST_KEYS_WITHOUT_FUSED", 0)
    return request.param
