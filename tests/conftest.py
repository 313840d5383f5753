"""Shared by all tests: the environment, set before torch is imported, and folders of real data."""

import fcntl
import os
import pathlib
import signal
import tempfile
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# No test may reach a hub, and forks after a tokenizer has started threads would warn. One thread is
# enough for tiny models, and test processes with two threads each would wait for each other.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

# Prepared data of tests goes into a folder that is removed at the end.
_CACHE = tempfile.TemporaryDirectory(prefix="scaleup-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name


def pytest_configure(config: pytest.Config) -> None:
    # Only `-m gpu` leaves the GPU visible, so that other tests do not depend on it.
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")


# The tests that families in LATER take by default.
ALWAYS = (
    "test_logits_equal_the_plain_reference",
    "test_gradients_equal_those_of_the_plain_path",
    "test_a_folder_with_learned_gates_gives_the_logits_of_the_model",
    "test_with_and_without_the_cache_the_same_tokens_and_logits",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from tests.utils.tiny import LATER  # imports torch, which needs the environment from above

    for item in items:
        family = getattr(item, "callspec", None) and item.callspec.params.get("family")
        if family in LATER and item.originalname not in ALWAYS:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    # Tests with several processes run one at a time: four processes on two cores are much slower
    # than two and then two.
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
    """Return the folder with glue/ and seq2seq/, $SCALEUP_DATA or ../shared/data, or skip."""
    folder = pathlib.Path(os.environ.get("SCALEUP_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "glue").is_dir():
        pytest.skip(f"no GLUE data in {folder}; set SCALEUP_DATA to the folder that has glue/")
    return folder


@pytest.fixture(scope="session")
def quickstart_dir() -> pathlib.Path:
    """Return quickstart/ with its model and data, or skip if `make quickstart` has not run."""
    folder = ROOT / "quickstart"
    if not all((folder / part / "SHA256SUMS").is_file() for part in ("model", "data")):
        pytest.skip("no quickstart/; benchmarks/quickstart_assets.py makes it")
    return folder


@pytest.fixture(params=["few keys", "many keys"])
def keys(request, monkeypatch) -> str:
    """Run a test with both implementations of sdpa attention with a prefix on a CPU.

    Tiny models have few keys, so torch's kernels would not be tested otherwise.
    """
    if request.param == "many keys":
        for limit in ("MOST_KEYS", "MOST_KEYS_PER_QUERY", "MOST_KEYS_WITHOUT_FUSED"):
            monkeypatch.setattr(f"scaleup.unipelt.kernels.short_attention.{limit}", 0)
    return request.param


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """Restore the handlers that a run in this process replaces."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
