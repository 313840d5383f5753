"""Read the rows of generation from files and data sets: a text with its target, or a chat."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from scaleup.data import columns as cells
from scaleup.data.sources import Reading
from scaleup.settings.data import DataSettings

ROLES = ("system", "user", "assistant", "tool")
TEXTS = {"text": pa.string(), "target": pa.string()}


def _is_turn(turn: Any) -> bool:
    valid = isinstance(turn, dict) and turn.get("role") in ROLES
    return valid and isinstance(turn.get("content"), str)


def _clean_chat(cell: Any) -> tuple[str | None, str | None]:
    """Return a chat as JSON, and the problem with the cell or None."""
    try:
        turns = json.loads(cell) if isinstance(cell, str) else cell
    except ValueError:
        return None, "is not JSON"
    valid = isinstance(turns, list) and len(turns) >= 2 and all(map(_is_turn, turns))
    if not valid or turns[-1]["role"] != "assistant":
        return None, "is not a list of {role, content} that ends with the assistant"
    turns = [turn | {"content": cells.replace_surrogates(turn["content"])} for turn in turns]
    return json.dumps(turns), None


def _clean_cell(cell: Any, role: str) -> tuple[str | None, str | None]:
    """Return a text, or a chat (role "messages") as JSON, and the problem with the cell or None."""
    if cell is None or cell != cell:
        return None, "is missing"
    if role == "messages":
        return _clean_chat(cell)
    if not isinstance(cell, str | int | float):
        return None, f"holds a {type(cell).__name__}, not text"
    if role == "target" and not str(cell).strip():
        return None, "is empty; there would be nothing to learn"
    return cells.replace_surrogates(str(cell)), None


def read_pairs(reading: Reading, data: DataSettings) -> Iterator[dict[str, list]]:
    """Yield the columns text and target of every row, in batches.

    The text of a chat is the JSON of all turns before the last; the target is the last one.
    """
    if not data.messages_column:
        columns = {"text": data.text_column, "target": data.target_column}
        for cleaned in reading.read(columns, lambda table: _clean_cell):
            yield cleaned.values
        return
    columns = {"messages": data.messages_column}
    for cleaned in reading.read(columns, lambda table: _clean_cell):
        chats = list(map(json.loads, cleaned.values["messages"]))
        texts = [json.dumps(turns[:-1]) for turns in chats]
        yield {"text": texts, "target": [turns[-1]["content"] for turns in chats]}
