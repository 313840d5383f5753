"""Check the files of a local model folder before a model is made of them."""

import functools
import json
import pathlib
import re
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from scaleup.backbone.weights import weight_files
from scaleup.errors import ConfigError, one_line
from scaleup.io import check_regular_file, is_lfs_pointer, read_bytes

MOST_BYTES = 64 * 2**20  # of a JSON file; the largest tokenizers have 35 MB
MOST_LAYERS = 1024
MOST_SIZE = 2**31
MOST_LABELS = 10**6  # transformers makes a name for each
TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "merges.txt")


def has_tokenizer(folder: pathlib.Path) -> bool:
    """Return whether a folder has any file of a tokenizer."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def state(folder: pathlib.Path) -> tuple[Any, ...]:
    """Return names, modification times and sizes, which tell whether a check is still valid."""
    entries = sorted(folder.iterdir())
    states = [(path.name, path.stat()) for path in entries if path.exists()]
    return tuple((name, status.st_mtime_ns, status.st_size) for name, status in states)


def folder_problems(folder: pathlib.Path) -> list[str]:
    """Return which files of a model folder are pipes, Git LFS pointers, or damaged.

    Other files than those that transformers reads are ignored.
    """
    try:
        return list(_folder_problems(folder, state(folder)))
    except OSError as error:
        return [f"model.name: {folder} cannot be read: {error.strerror}"]


@functools.lru_cache(maxsize=64)  # a sweep checks the same folder for every trial
def _folder_problems(folder: pathlib.Path, _state: tuple[Any, ...]) -> tuple[str, ...]:
    weights = weight_files(folder)
    texts = sorted({path for pattern in TEXT_FILES for path in folder.glob(pattern)})
    problems, pointers = [], []
    for path in (*texts, *weights):
        try:
            check_regular_file(path)
            if is_lfs_pointer(path):
                pointers.append(path.name)
            elif path in weights:
                problem = _weights_problem(path)
                problems += [f"model.name: {path} {problem}"] if problem else []
        except IsADirectoryError:
            continue
        except OSError as error:
            problems.append(f"model.name: {path} cannot be read: {error.strerror}")
    if pointers:
        more = f" and {len(pointers) - 3} more" if len(pointers) > 3 else ""
        names = ", ".join(pointers[:3]) + more
        kind = "is a Git LFS pointer" if len(pointers) == 1 else "are Git LFS pointers"
        problems.append(
            f"model.name: {names} in {folder} {kind} instead of the file itself; run "
            f"`git lfs pull` in that folder"
        )
    return tuple(problems[:5] + _index_problems(folder))


def _weights_problem(path: pathlib.Path) -> str | None:
    """Return what is wrong with the layout of a weight file. The values are not read."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                file.keys()
        else:
            content = torch.load(path, map_location="meta", weights_only=True)
            if not isinstance(content, dict):
                raise TypeError(f"it holds a {type(content).__name__}")
    except (SafetensorError, OSError) as error:
        return f"is damaged or incomplete: {one_line(error, 150)}"
    except Exception as error:  # torch raises all kinds for a damaged file
        reason = one_line(error).partition(". ")[0][:150]
        return f"is damaged, or no file of weights: {reason or type(error).__name__}"
    return None


def _index_problems(folder: pathlib.Path) -> list[str]:
    """Check that every file that an index of weights names is there."""
    problems = []
    for path in folder.glob("*.index.json"):
        try:
            content = json.loads(read_bytes(path, MOST_BYTES))
            names = content["weight_map"].values()
            # The weights of a model are in its own folder.
            present = {file.name for file in folder.iterdir() if file.is_file()}
            missing = sorted(set(names) - present, key=len)
            if not missing and not (names and isinstance(content["metadata"], dict)):
                raise ValueError
        except OSError:  # a pipe, which is reported already
            continue
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            problems.append(f"model.name: {path} is not a valid index of weights")
            continue
        if missing:
            problems.append(
                f"model.name: {path.name} names {missing[0][:80]}, which is not in {folder}; copy "
                f"all {len(set(names))} files of weights there"
            )
    return problems


def size_problems(folder: pathlib.Path, values: dict[str, Any]) -> list[str]:
    """Return which numbers of a model's config are beyond reason.

    Args:
        values: the config as a dict.
    """
    problems = []
    for key, value in values.items():
        if isinstance(value, dict) and key.endswith("_config"):
            problems += size_problems(folder, value)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and "drop" in key and not 0 <= value <= 1:
            problem = f"{key} is {value}; it should be a probability"
            problems.append(f"model.name: {folder}/config.json: {problem}")
            continue
        if isinstance(value, float) or not is_number:
            continue
        is_depth = re.search(r"(^|_)(layers?|blocks?|depth)$", key) is not None
        most = MOST_LAYERS if is_depth else MOST_LABELS if key == "num_labels" else MOST_SIZE
        if value > most or (is_depth and value < 0):
            amount = f"{value:.3g}" if value < 10**300 else "a very long number"
            problems.append(
                f"model.name: {folder}/config.json: {key} is {amount}; it should be at most "
                f"{most:,} and not negative"
            )
    return problems


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Return config.json; raise ConfigError unless it is a JSON object of a reasonable size."""
    path = folder / "config.json"
    try:
        content = json.loads(read_bytes(path, MOST_BYTES))
    except OSError as error:
        raise ConfigError(f"model.name: {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        reason = one_line(error, 100)
        raise ConfigError(f"model.name: {path} is not a usable model config: {reason}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ConfigError(f"model.name: {path} is not a usable model config: it holds a {kind}")
    return content
