"""A sweep file of tiny runs."""

import json
import pathlib


def sweep_file(workspace: pathlib.Path, folder: pathlib.Path, **changes) -> pathlib.Path:
    """Write a sweep file of tiny runs. JSON is also YAML."""
    content = {
        "output": str(folder / "runs"),
        "base": {
            "model": {"name": str(workspace / "bert")},
            "data": {
                "train_file": str(workspace / "train.csv"),
                "test_file": str(workspace / "test.csv"),
                "dev_size": 32,
            },
            "train": {"num_train_epochs": 8, "logging_steps": 1},
        },
        "methods": {"lora": ["method.submodules=[lora]"], "apl": ["method.prefix_hidden_size=16"]},
        "tasks": {"films": []},
        "k": [64],
        "seeds": [0],
    }
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(content | changes))
    return path
