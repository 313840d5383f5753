"""Alter checkpoints as an attacker does, who also makes the manifest fit."""

import json
import pathlib

from scaleup.backbone.weights import tensor_files
from scaleup.training import checkpoint


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: pathlib.Path):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


def rehash(folder: pathlib.Path, **changes) -> None:
    """Write the hashes of the files that are in a checkpoint now into its manifest.

    Args:
        changes: entries of the manifest to replace.
    """
    path = folder / "manifest.json"
    tensors = tensor_files(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p not in tensors)
    content = json.loads(path.read_text()) | changes
    content["tensors"] = checkpoint._describe_tensors(folder)
    content["files"] = {
        str(p.relative_to(folder)): checkpoint.describe_file(p) for p in files if p != path
    }
    path.write_text(json.dumps(content))
