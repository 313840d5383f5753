"""Values and mutations that break readers of files and arguments."""

import copy
import json
import math
import os
import pathlib
import random
from typing import Any

GARBAGE = [
    None,
    True,
    False,
    0,
    -1,
    10**30,
    10**400,
    2**63,
    0.0,
    -0.0,
    1e-320,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
    "",
    " ",
    "\n",
    "auto",
    "all",
    "none",
    "1e-4",
    "0x10",
    "\u202e\u200b",
    "ß🙂\u0301",
    "\x00",
    "\ud800",
    "a" * 10_000,
    "../../..",
    "/",
    "/root/x",
    "~",
    b"bytes",
    [],
    [[]],
    {},
    {"": None},
    {"a": {"b": {"c": []}}},
    [None],
    ["lora", 5],
    [{}],
    {1: 2},
    {None: None},
    [[[[[[[1]]]]]]],
    "!!python/object:os.system",
]
WORDS = [
    "",
    "x",
    "-1",
    "0",
    "1e999",
    "nan",
    "1" * 5000,
    "/",
    "/dev/zero",
    "/dev/null",
    "fifo",
    "folder",
    "empty",
    "pointer",
    "binary",
    "~nobody-of-this-name/x",
    "a" * 300,
    "../" * 2000,
    "a\nb",
    "\u202e\u200b",
    "\udcff",
    "x\0y",
    "=",
    "a=b",
    "data.k",
    "data.k=0100",
    "model.name=folder",
    "--",
    "-",
    "*",
    "[",
    "{{",
    "24GiB",
    "1/0",
]


def make_odd_files(folder: pathlib.Path) -> None:
    """Make the files that `WORDS` name."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "empty").touch()
    (folder / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    (folder / "binary").write_bytes(bytes(range(256)) * 40)


def mutated_json(rng: random.Random, tree: Any) -> str:
    """Return a JSON text in which some values, at any depth, are replaced or removed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
                node = node[key]
                continue
            if rng.random() < 0.2:
                del node[key]
            else:
                value = copy.deepcopy(rng.choice(GARBAGE))
                node[key] = "bytes" if isinstance(value, bytes) or value == 10**400 else value
            break
    return json.dumps(tree, default=str, skipkeys=True)


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    """Return content that is cut, or in which some bytes are changed, inserted or removed."""
    if rng.random() < 0.25:
        return content[: rng.randrange(len(content) + 1)]
    changed = bytearray(content)
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(changed) + 1)
        if changed and rng.random() < 0.6:
            changed[min(at, len(changed) - 1)] = rng.randrange(256)
        else:
            piece = bytes(rng.randrange(256) for _ in range(rng.randrange(4)))
            changed[at : at + rng.randrange(8)] = piece
    return bytes(changed)
