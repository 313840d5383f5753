"""The prepared data of runs: Arrow files that every process maps into its memory.

    <data.cache_dir>/texts-<hash>/     the chosen rows of every set as texts, checked
    <data.cache_dir>/tokens-<hash>/    the same rows as tokens

The hash of texts covers the settings that choose them and the state of the files (path, size, times
and inode), or data.revision on the hub. The hash of tokens covers the texts, the settings and the
tokenizer. Both cover the code of this package, so a new version prepares anew.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import datasets
import pyarrow as pa
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from scaleup.data.examples import Examples
from scaleup.data.once import fill_once
from scaleup.data.sources import Source
from scaleup.data.sources import files as source_files
from scaleup.errors import RunError
from scaleup.io import file_hash, read_json, write_json
from scaleup.settings.data import DataSettings

SETS = ("train", "dev", "test")
# Settings that change neither texts nor tokens.
IDLE = {"cache_dir", "workers", "num_beams", "pad_to_max_length", "metric"}
# Settings that only change tokens.
OF_TOKENS = {"prompt_template", "train_on", "max_length", "max_target_length", "packing"}
OF_TOKENS |= {"window_overlap"}
FILES = {"train_file", "validation_file", "test_file", "path"}
ROWS_PER_WORKER = 2000  # for fewer rows, a process more costs more than it saves

Make = Callable[[DataSettings, pathlib.Path], dict[str, Any]]


def cache_dir(data: DataSettings) -> pathlib.Path:
    """Return the folder of prepared data: data.cache_dir, or one in the cache of `datasets`."""
    return pathlib.Path(
        data.cache_dir or os.path.join(datasets.config.HF_DATASETS_CACHE, "scaleup")
    )


def hashed(*values: Any) -> str:
    """Return a hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


@functools.lru_cache(maxsize=1)
def _code() -> str:
    """Return a hash of the code that prepares data, and the versions of what it calls."""
    files = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashed(hashes, transformers.__version__, tokenizers.__version__)


def file_states(files: Iterable[str]) -> tuple:
    """Return what changes whenever a file is changed or replaced: size, times and inode."""
    states = [(os.path.abspath(file), os.stat(file)) for file in files if os.path.isfile(file)]
    return tuple((path, s.st_mtime_ns, s.st_ctime_ns, s.st_size, s.st_ino) for path, s in states)


def write(path: pathlib.Path, schema: dict[str, Any], batches: Iterable[dict[str, list]]) -> int:
    """Write batches of columns into an Arrow file that `read` maps. Return the number of rows.

    Args:
        schema: name of the column → type of its cells.
    """
    rows, types = 0, pa.schema(schema)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, types) as writer:
        for columns in batches:
            table = pa.Table.from_pydict(columns, types)
            writer.write_table(table)
            rows += len(table)
    return rows


def read(path: pathlib.Path) -> datasets.Dataset:
    """Map an Arrow file into memory."""
    return datasets.Dataset.from_file(str(path))


def rows_of(part: datasets.Dataset, rows: Sequence[int] | None = None) -> Iterator[dict[str, list]]:
    """Yield the chosen rows of a set, or all of them, as batches of columns."""
    yield from (part if rows is None else part.select(rows)).iter(batch_size=1000)


def load(data: DataSettings, make: Make, splits: dict[str, list[Source]]) -> Examples:
    """Return the examples of a run as texts. One process reads them if they are not prepared.

    Args:
        make: writes <set>.arrow for every set, and perhaps references.arrow, into a folder.
            It returns the other fields of `Examples`.
        splits: the sources that `make` reads. If a file of them has changed, all are read anew.
    """
    return _texts(make, data.model_dump_json(), file_states(source_files(splits)))


@functools.lru_cache(maxsize=1)  # preflight checks and the run share one reading
def _texts(make: Make, resolved: str, state: tuple) -> Examples:
    data = DataSettings.model_validate_json(resolved)
    settings = data.model_dump(mode="json", exclude=IDLE | OF_TOKENS)
    folder = cache_dir(data) / f"texts-{hashed(_code(), settings, state)}"

    def fill(part: pathlib.Path) -> None:
        fields = make(data, part)
        # Of a folder of files, `sources` has samples only, and an edit may lie between them.
        hashes = {path.name: file_hash(path) for path in sorted(part.glob("*.arrow"))}
        write_json(part / "examples.json", fields | {"hashes": hashes})

    fill_once(folder, fill)
    content = read_json(folder / "examples.json")
    sets = {name: _set(folder, name) for name in SETS}
    sources = [{k: v for k, v in source.items() if k != "file"} for source in content["sources"]]
    references = folder / "references.arrow"
    answers = read(references) if references.exists() else None
    return Examples(
        train=sets["train"],
        dev=sets["dev"],
        test=sets["dev"] if content["test_is_dev"] else sets["test"],
        labels=content["labels"],
        metric=data.metric or content["metric"],
        task=content["task"],
        test_is_dev=content["test_is_dev"],
        sources=content["sources"],
        references=None if answers is None else answers["references"],
        prompts=None if answers is None else answers["text"],
        shared={(name, other): count for name, other, count in content["shared"]},
        unanswerable=content.get("unanswerable", False),
        content=hashed(_without_files(settings), sources, content["hashes"]),
    )


def _without_files(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without the names of files, whose content counts instead."""
    kept = {key: value for key, value in settings.items() if key not in FILES}
    parts = settings["sources"] or []
    return kept | {"sources": [{k: v for k, v in part.items() if k != "file"} for part in parts]}


def _set(folder: pathlib.Path, name: str) -> Any:
    """Return a set, which several processes may have written, or None."""
    files = sorted(folder.glob(f"{name}*.arrow"))
    return datasets.concatenate_datasets([read(file) for file in files]) if files else None


def workers(data: DataSettings, rows: int) -> int | None:
    """Return the number of processes that tokenize; None: this one alone."""
    most = data.workers or len(os.sched_getaffinity(0))
    count = min(most, rows // ROWS_PER_WORKER)
    return count if count > 1 else None


def tokens(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    data: DataSettings,
    make: Callable[[str, datasets.Dataset, pathlib.Path], None],
) -> Examples:
    """Return the examples as tokens, which one process makes if they are not prepared.

    Args:
        make: (name of the set, its texts, folder) → write <set>.arrow, perhaps in several parts.
    """
    if not examples.content:
        raise ValueError("only examples that `load` returns can be tokenized")
    settings = _without_files(data.model_dump(mode="json", exclude=IDLE))
    key = hashed(_code(), settings, examples.content, _tokenizer_hash(tokenizer))
    folder = cache_dir(data) / f"tokens-{key}"

    def fill(part: pathlib.Path) -> None:
        for name in SETS:
            rows = getattr(examples, name)
            if rows is not None and not (name == "test" and examples.test_is_dev):
                make(name, rows, part)

    fill_once(folder, fill)
    sets = {name: _set(folder, name) for name in SETS}
    if examples.test_is_dev:
        sets["test"] = sets["dev"]
    return dataclasses.replace(examples, **sets)


def encode(
    function: Callable[[dict[str, list]], dict[str, list]],
    rows: datasets.Dataset,
    path: pathlib.Path,
    count: int | None,
    **options: Any,
) -> datasets.Dataset:
    """Apply a function to batches of rows, in `count` processes, and write the result.

    Raises:
        RunError: a process was killed.
    """
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return rows.map(
            function,
            batched=True,
            num_proc=count,
            cache_file_name=str(path),
            load_from_cache_file=False,
            new_fingerprint="ids",  # otherwise `map` would pickle the tokenizer to compute one
            **options,
        )
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        advice = "perhaps memory ran out; lower data.workers"
        raise RunError(f"data: a process that tokenizes was killed; {advice}") from error
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what a tokenizer does, wherever it comes from."""
    traits = [
        type(tokenizer).__qualname__,
        tokenizer.chat_template,
        tokenizer.truncation_side,
        tokenizer.model_input_names,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        getattr(tokenizer, "add_bos_token", None),
        getattr(tokenizer, "add_eos_token", None),
        None if tokenizer.is_fast else tokenizer.get_added_vocab(),
    ]
    if tokenizer.is_fast:
        # Before the added tokens it says how the last call truncated and padded.
        return hashed(traits, tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')[2])
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(map(pathlib.Path, tokenizer.save_vocabulary(folder)))
        return hashed(traits, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
