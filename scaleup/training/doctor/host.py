"""Look at one host: its packages, its output folder, and its access to the model and the data."""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from typing import Any

import datasets
import huggingface_hub
import torch
from huggingface_hub import constants

from scaleup import machine
from scaleup.backbone import loading, weights
from scaleup.backbone.folder import folder_problems
from scaleup.backbone.precision import backbone_dtype, device_half_dtype
from scaleup.data.glue import HUB_ID
from scaleup.errors import ConfigError, one_line
from scaleup.memory.requirements import unmet_requirements
from scaleup.settings.schema import Settings
from scaleup.training import distributed
from scaleup.training.build_locks import QUIET_LOCAL_S
from scaleup.training.distributed import World

CHUNK = 4 * 2**20
MOST_WRITTEN, MOST_READ = 64 * 2**20, 256 * 2**20
ENOUGH_S = 2.0  # of reading or writing
COMPUTE_S = 1.0


def device_of(local_rank: int) -> torch.device:
    """Return the device that a run would use in this process.

    Raises:
        ConfigError: there are fewer GPUs than processes.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank} needs a GPU of its own, but sees {count}; start one process"
            " per GPU, and let each see all of its host (srun --gpu-bind=none)"
        )
    return torch.device("cuda", local_rank)


def packages() -> dict[str, str | None]:
    """Return the versions that have to be the same on every host.

    Raises:
        ConfigError: a package is missing here or has the wrong version.
    """
    if unmet := unmet_requirements():
        raise ConfigError([f"packages: {problem}" for problem in unmet])
    cuda = {"cuda": torch.version.cuda} if torch.version.cuda else {}
    return {"python": platform.python_version(), **machine.versions(), **cuda}


def _computing_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """Return the type of most matrix products: that of mixed precision, or of the backbone."""
    half = device_half_dtype(settings, device)
    return half or backbone_dtype(settings, half)


def precision(settings: Settings, device: torch.device) -> str:
    """Return what a run computes in on this device."""
    return str(_computing_dtype(settings, device)).removeprefix("torch.")


@contextlib.contextmanager
def _probe(folder: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
    """Give a file in a folder, and remove it and the folders that were made for it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds something by now
            for made in missing:
                made.rmdir()


def output_folder(settings: Settings, world: World) -> dict[str, Any]:
    """Write, lock and read a file in the output folder. All processes must call this.

    Returns:
        shared: whether all hosts see one folder. Processes that write the folder also return write
        and check (bytes per second, as a checkpoint is written and read back with its hash), free
        (bytes), clock (seconds by which files of this host's are newer than its own clock), and
        locks (whether a lock holds against other processes).
    """
    folder = pathlib.Path(settings.train.output_dir)
    name = f".probe-{secrets.token_hex(8)}"  # a run removes such a file, should it be left
    name = distributed.gather(world, name)[0]
    with (
        _probe(folder, name) if world.local_main else contextlib.nullcontext(folder / name) as path
    ):
        distributed.gather(world, None)
        shared = distributed.shares_folder(world, folder)
        with path.open("ab") as locked:
            found: dict[str, Any] = {"shared": shared, "writes": world.writes(shared)}
            if found["writes"]:
                with contextlib.suppress(OSError):  # no locks here, as the others will see
                    fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            distributed.gather(world, None)
            # Every process tries it, also the one that holds the lock, with another descriptor.
            found["locks"] = all(distributed.gather(world, _is_locked(path)))
        if found["writes"]:
            found |= _disk(path)
        distributed.gather(world, None)  # nobody removes the folder before all are done
    return found


def _is_locked(path: pathlib.Path) -> bool:
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # the file system has no locks
            return False
    return False


def _disk(path: pathlib.Path) -> dict[str, Any]:
    block, begin, written = os.urandom(CHUNK), time.perf_counter(), 0
    before = time.time()
    with path.open("wb") as file:
        while written < MOST_WRITTEN and time.perf_counter() - begin < ENOUGH_S:
            written += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    write_s = time.perf_counter() - begin
    after = time.time()
    modified = path.stat().st_mtime
    begin = time.perf_counter()
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")
    return {
        "write": written / write_s,
        "check": written / (time.perf_counter() - begin),
        "free": shutil.disk_usage(path.parent).free,
        # Zero if the time lies between the two that this host has read.
        "clock": min(modified - before, 0.0) + max(modified - after, 0.0),
    }


def check_folder(found: dict[str, Any], folder: str) -> list[str]:
    """Return the problems with an output folder."""
    problems = []
    if not found["locks"]:
        problems.append(
            f"train.output_dir: locks in {folder} do not hold, so two runs could write there at"
            " once; use a file system with locks that all hosts see, or make sure that every run"
            " has a folder of its own"
        )
    if abs(found.get("clock", 0.0)) > QUIET_LOCAL_S:
        problems.append(
            f"train.output_dir: the clock of the file system of {folder} differs from this host's"
            f" by {found['clock']:.0f} s, and a run takes locks for abandoned that seem"
            f" {QUIET_LOCAL_S:.0f} s old; synchronise both (NTP)"
        )
    return problems


def backbone(settings: Settings) -> dict[str, Any]:
    """Find the files of the backbone, or the hub.

    Returns:
        place: where the backbone comes from. identity: what must be the same on every host.
        files: the weight files that are on this host.

    Raises:
        ConfigError: it can be reached neither here nor on the hub.
    """
    model = settings.model
    folder = pathlib.Path(model.name)
    if folder.is_dir():
        if problems := folder_problems(folder):
            raise ConfigError(problems)
        identity = weights.fingerprint(model.name, None)
        return {"place": f"folder {folder}", "identity": identity, "files": _files(folder)}
    config = loading.load_config(model)  # from the cache, else from the hub
    identity = loading.fingerprint(model, config)
    cached = huggingface_hub.try_to_load_from_cache(
        model.name, "config.json", revision=model.revision
    )
    snapshot = pathlib.Path(cached).parent if isinstance(cached, str) else None
    files = _files(snapshot) if snapshot else []
    if files and snapshot and not folder_problems(snapshot):
        return {"place": "the cache of the hub", "identity": identity, "files": files}
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"model.name: the weights of {model.name} are not in {constants.HF_HUB_CACHE}, and"
            f" HF_HUB_OFFLINE is set; run `hf download {model.name}` where the hub can be reached,"
            " with this cache, or give a local folder"
        )
    url = huggingface_hub.hf_hub_url(model.name, "config.json", revision=model.revision)
    try:
        huggingface_hub.get_hf_file_metadata(url)
    except OSError as error:
        raise ConfigError(f"model.name: {model.name}: {one_line(error, 200)}") from error
    return {"place": "the hub, still to be downloaded", "identity": identity, "files": []}


def _files(folder: pathlib.Path) -> list[str]:
    return [str(path) for path in weights.weight_files(folder)]


def read_speed(files: list[str], local_rank: int, local_size: int) -> float:
    """Return the bytes per second at which this process reads weight files.

    All processes of a host read at the same time, each another part. The system is asked to forget
    what it has cached of that part, which it may decline.
    """
    path = max(files, key=os.path.getsize)
    size = os.path.getsize(path)
    begin_at = size * local_rank // local_size
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), begin_at, MOST_READ, os.POSIX_FADV_DONTNEED)
        file.seek(begin_at)
        begin, count = time.perf_counter(), 0
        while count < MOST_READ and time.perf_counter() - begin < ENOUGH_S:
            if not (part := file.read(CHUNK)):
                break
            count += len(part)
        return count / (time.perf_counter() - begin)


def compute_speed(settings: Settings, width: int, device: torch.device) -> float:
    """Return floating-point operations per second of the backbone's typical matrix product.

    It has the tokens of a batch as rows, and the hidden size as both other dimensions.
    """
    rows = settings.train.per_device_train_batch_size * settings.data.max_length
    dtype = _computing_dtype(settings, device)
    x, weight = (torch.ones(size, width, dtype=dtype, device=device) for size in (rows, width))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    x @ weight
    wait(device)
    begin, count = time.perf_counter(), 0
    while (passed_s := time.perf_counter() - begin) < COMPUTE_S:
        x @ weight
        wait(device)
        count += 1
    return count * 2 * rows * width * width / passed_s


def data(settings: Settings) -> str | None:
    """Return where data of the hub comes from; None for files, which the checks have read.

    Raises:
        ConfigError: it is not in the cache and the hub cannot be reached.
    """
    chosen = settings.data
    if chosen.name is None or (chosen.path is not None and os.path.exists(chosen.path)):
        return None
    hub_id = chosen.path or HUB_ID
    if os.path.isdir(os.path.join(datasets.config.HF_DATASETS_CACHE, hub_id.replace("/", "___"))):
        return f"{hub_id} in the cache of datasets"
    try:
        huggingface_hub.HfApi().dataset_info(hub_id)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ConfigError(
            f"data.path: {hub_id} is not in {datasets.config.HF_DATASETS_CACHE}, and the hub does"
            f" not answer ({one_line(error, 150)}); give data.path as a local folder with"
            f" {chosen.name}/train.parquet"
        ) from error
    return f"{hub_id} on the hub, still to be downloaded"
