"""Read what a finished run left, and notice that its data has changed since."""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

from scaleup.errors import CheckpointError, ConfigError
from scaleup.io import file_hash, read_json
from scaleup.settings.schema import Settings, stored
from scaleup.training.console import finished_note, summary


def results_of(settings: Settings, out: pathlib.Path) -> dict[str, Any] | None:
    """Return the results of this very run if it has ended, so that a restarted job does nothing.

    Raises:
        CheckpointError: results.json is damaged.
        ConfigError: a file of the run's data has changed since.
    """
    path, config = out / "results.json", out / "config.yaml"
    if settings.train.resume == "never" or not path.is_file() or not config.is_file():
        return None
    try:
        then, now = stored(str(config)), settings.dump()
    except ConfigError:
        return None
    now["train"]["resume"] = then["train"]["resume"]
    if now != then:
        return None
    try:
        results = read_json(path)
        finished_note(settings, results)  # these read what a finished run must have
        summary(results, out, None)
    except (ValueError, KeyError, TypeError, AttributeError):
        advice = "remove it to score the run's checkpoints again"
        raise CheckpointError(f"{path} is damaged; {advice}") from None
    for file in changed_files(results):
        problem = f"the run in {out} is finished, and {file} has changed since"
        raise ConfigError(f"train.resume: {problem}; use a new train.output_dir")
    return results


def changed_files(results: dict[str, Any]) -> list[pathlib.Path]:
    """Return the files of a finished run's data that have changed since; missing ones do not count.

    Args:
        results: the content of its results.json.
    """
    hashes = dict(_files(results))
    return [file for file in hashes if _hash(file, file.stat().st_mtime_ns) != hashes[file]]


@functools.cache
def _hash(file: pathlib.Path, modified_ns: int) -> str:
    """Return the hash of a file, which many runs of a sweep share."""
    return file_hash(file)


def _files(results: dict[str, Any]) -> Iterator[tuple[pathlib.Path, str]]:
    """Yield the files of a run's data that are still there, with the hash that they had."""
    sources = results.get("sources")
    for source in sources if isinstance(sources, list) else ():
        if isinstance(source, dict) and {"file", "sha256"} <= source.keys():
            file = pathlib.Path(str(source["file"]))
            if file.is_file():
                yield file, source["sha256"]


def seconds(out: pathlib.Path) -> float | None:
    """Return how long a finished run took; None if its timing.json is missing or damaged."""
    try:
        return float(read_json(out / "timing.json")["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
