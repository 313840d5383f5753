"""Copy a transformers folder, with its weights in safetensors files of limited size.

    python -m benchmarks.model_parts models/mpnet models/mpnet-parts [--max-size 60MB]
        [--dtype bfloat16]

from_pretrained reads the copy like the original. Use it where the size of a file is limited. A
tensor is never divided: the word embeddings of mpnet take 94 MB in float32 and 47 MB in bfloat16.
"""

import argparse
import json
import pathlib
import shutil
import sys

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from scaleup.errors import ConfigError
from scaleup.io import parse_bytes, write_json

DTYPES = ("float32", "bfloat16", "float16")


def write_parts(
    source: pathlib.Path, folder: pathlib.Path, max_size: int, dtype: str | None = None
) -> list[pathlib.Path]:
    """Copy the files of a model folder, with the weights in parts; return the paths of the parts.

    Args:
        source: folder with config.json and safetensors files.
        folder: new folder, which appears when it is complete.
        max_size: bytes of weights in a part; a header of some kilobytes comes on top.
        dtype: what floating-point weights are cast to; None keeps them.

    Raises:
        ConfigError: there are no weights, the folder exists, or a tensor is larger than `max_size`.
    """
    shards = sorted(source.glob("model*.safetensors"))
    if not shards:
        raise ConfigError(f"{source}: has no model.safetensors")
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; delete it or choose another folder")
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if dtype is not None:
        cast = getattr(torch, dtype)
        tensors = {n: t.to(cast) if t.is_floating_point() else t for n, t in tensors.items()}
        config["dtype"] = dtype
    largest = max(tensors, key=lambda name: tensors[name].nbytes)
    if tensors[largest].nbytes > max_size:
        raise ConfigError(
            f"--max-size: the tensor {largest} alone has {tensors[largest].nbytes / 1e6:.1f} MB; "
            "choose a larger size or --dtype bfloat16"
        )
    staging = folder.with_name(f"{folder.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    others = shutil.ignore_patterns("model*.safetensors*", "SHA256SUMS")
    shutil.copytree(source, staging, ignore=others)
    save_torch_state_dict(tensors, staging, max_shard_size=max_size)
    write_json(staging / "config.json", config)
    staging.rename(folder)
    return sorted(folder.glob("model*.safetensors"))


def main() -> int:
    """Return the exit code: 0 done, 2 failed with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--max-size", default="60MB")
    parser.add_argument("--dtype", choices=DTYPES)
    arguments = parser.parse_args()
    try:
        parts = write_parts(
            arguments.source,
            arguments.folder,
            parse_bytes(arguments.max_size, "--max-size"),
            arguments.dtype,
        )
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sizes = [part.stat().st_size / 1e6 for part in parts]
    print(f"{arguments.folder}: {len(parts)} parts, the largest has {max(sizes):.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
