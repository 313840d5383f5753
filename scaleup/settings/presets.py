"""The DeepSpeed config of a run: a preset of this package, or the user's own JSON file."""

import difflib
import json
from importlib import resources
from typing import Any

from scaleup.errors import ConfigError, one_line
from scaleup.io import read_bytes
from scaleup.settings.rules import ZERO_PRESETS

MOST_BYTES = 256 * 1024
# What Trainer knows. DeepSpeed refuses a file without the sizes of a batch.
AUTOMATIC: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}

# What Trainer knows of the sections that a file may have: section → type → parameters. Without
# them, DeepSpeed would replace the run's settings with its own defaults, and not say so.
PARAMETERS: dict[str, dict[str, tuple[str, ...]]] = {
    "optimizer": {
        "adam": ("lr", "weight_decay", "betas", "eps"),
        "adamw": ("lr", "weight_decay", "betas", "eps"),
        "lion": ("lr", "weight_decay"),
        "sgd": ("lr", "weight_decay"),
        "rmsprop": ("lr", "weight_decay"),
    },
    "scheduler": {
        "warmuplr": ("warmup_max_lr", "warmup_num_steps"),
        "warmupdecaylr": ("warmup_max_lr", "warmup_num_steps", "total_num_steps"),
        "warmupcosinelr": ("warmup_num_steps", "total_num_steps"),
    },
}

HPZ = "zero_hpz_partition_size"  # processes of a host that share a second copy of the weights


def deepspeed_file(name: str | None) -> str | None:
    """Return the JSON file that `train.deepspeed` names: a preset of this package, or a path."""
    if name not in ZERO_PRESETS:
        return name
    return str(resources.files("scaleup.settings").joinpath("deepspeed", f"{name}.json"))


def read_deepspeed(name: str, per_host: int = 1) -> dict[str, Any]:
    """Return the DeepSpeed config that `train.deepspeed` names.

    What the file leaves out and a run needs is filled in: batch sizes, data types, and parameters
    of its optimizer and its scheduler, as Trainer has them.

    Args:
        per_host: processes on each host, which "auto" stands for in `zero_hpz_partition_size`.

    Raises:
        ConfigError: the file cannot be read or is not a DeepSpeed config.
    """
    path = deepspeed_file(name)
    problem = f"train.deepspeed: {path} is not a DeepSpeed config"
    try:
        config = json.loads(read_bytes(str(path), MOST_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"train.deepspeed: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{problem}: it is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{problem}: {one_line(error, 200)}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{problem}: it holds a {type(config).__name__}, not an object")
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3) or type(stage) is not int:
        example = '{"zero_optimization": {"stage": 2}}'
        raise ConfigError(f"{problem}: its ZeRO stage must be 0, 1, 2 or 3, as in {example}")
    for key in config:
        meant = difflib.get_close_matches(key, ["zero_optimization", *AUTOMATIC], n=1, cutoff=0.8)
        if meant and key not in ("zero_optimization", *AUTOMATIC):
            raise ConfigError(f"{problem}: unknown key {key[:40]}; did you mean {meant[0]}?")
    config = AUTOMATIC | config | _completed_sections(config)
    if not {"bf16", "bfloat16", "fp16"} & config.keys():
        config |= {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    if isinstance(zero, dict) and zero.get(HPZ) == "auto":  # Trainer does not fill it in
        config["zero_optimization"] = zero | {HPZ: per_host}
    return config


def _completed_sections(config: dict[str, Any]) -> dict[str, Any]:
    """Return the sections `optimizer` and `scheduler` with the parameters that Trainer knows."""
    completed = {}
    for section, types in PARAMETERS.items():
        part = config.get(section)
        if isinstance(part, dict) and isinstance(given := part.get("params") or {}, dict):
            known = types.get(str(part.get("type")).lower(), ())
            completed[section] = part | {"params": dict.fromkeys(known, "auto") | given}
    return completed


def zero_stage(name: str | None) -> int:
    """Return the ZeRO stage of a DeepSpeed config, 0 without one."""
    if name is None:
        return 0
    stage: int = read_deepspeed(name).get("zero_optimization", {}).get("stage", 0)
    return stage
