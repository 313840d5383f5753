"""Files of examples for tests of `scaleup.data`, written into the current folder."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq

from scaleup.data import classification as data
from scaleup.data import tasks
from scaleup.settings.data import DataSettings

ROWS = [
    ("good film", "pos"),
    ("bad film", "neg"),
    ("fine film", "pos"),
    ("dull film", "neg"),
    ("great film", "pos"),
    ("poor film", "neg"),
]


def settings(**fields) -> DataSettings:
    return DataSettings(**fields)


def problems(**fields) -> list[str]:
    """Return what the checks of a config report about its data."""
    return tasks.check({"data": settings(**fields)})


def write(name: str, content: str | bytes, folder=".") -> str:
    with open(os.path.join(folder, name), "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
    return name


def write_csv(name: str, rows=ROWS, header=("text", "label")) -> str:
    return write(name, "\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")


def write_jsonl(name: str, rows: list[dict]) -> str:
    return write(name, "".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(name: str, columns: dict) -> str:
    pq.write_table(pa.table(columns), name)
    return name


def quoted(value: str) -> str:
    """Return a CSV field in quotes."""
    return '"' + value.replace('"', '""') + '"'


def own(rows=ROWS, **fields) -> data.Examples:
    """Return examples with `rows` as training and development set, complete and in file order."""
    fields = {
        "train_file": write_csv("own.csv", rows),
        "validation_file": write_csv("own_dev.csv", rows),
        **fields,
    }
    return data.load(settings(**fields))
