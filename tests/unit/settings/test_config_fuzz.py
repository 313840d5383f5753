"""No broken config raises anything but ConfigError.

Tried with 1,200 mutated configs and with texts that are known to break YAML parsers.
"""

import copy
import json
import random

import pytest
import yaml

from scaleup.errors import ConfigError
from scaleup.settings import schema as config
from scaleup.settings.schema import load
from tests.utils.mutations import GARBAGE

SEED_CONFIG = {
    "model": {"name": "facebook/bart-large", "dtype": "auto", "quantization": "none"},
    "method": {
        "name": "unipelt",
        "submodules": ["adapter", "lora"],
        "gates": "learned",
        "adapter_size": 16,
        "r": 4,
    },
    "data": {"name": "rte", "k": 100, "dev_size": 50, "seed": 1, "max_length": 64},
    "train": {
        "output_dir": "runs/x",
        "seed": 1,
        "bf16": "auto",
        "max_steps": 10,
        "deepspeed": "zero2",
        "report_to": ["none"],
        "lr_scheduler_type": "linear",
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"a": 1},
    },
}
KEYS = ["", 5, None, "\u202e", "\ud800", "a" * 300, "use_cpu", "do_eval"]
SHARDS = [
    "{",
    "]",
    ": ",
    "\t",
    "&a ",
    "*a ",
    "!!int ",
    "'",
    "\n---\n",
    "<<: ",
    "? ",
    "0x" + "f" * 5000,
    "%",
    "=",
    "\x07",
    "é",
]
OVERRIDDEN = [
    f"{s}.{k}"
    for s in [*config.SECTIONS, "x"]
    for k in ("name", "seed", "k", "", "output_dir", "deepspeed")
]
# Values as text; Python writes no integer of thousands of digits.
OVERRIDES = [str(value) for value in GARBAGE if value != 10**400] + [
    "0x" + "f" * 5000,
    "!!int",
    "[",
    ": :",
]


def _mutate(rng: random.Random, tree: dict) -> None:
    section = rng.choice(list(tree))
    inner = (
        tree[section]
        if isinstance(tree[section], dict) and tree[section] and rng.random() < 0.9
        else tree
    )
    key = rng.choice(list(inner))
    kind = rng.randrange(6)
    if kind == 0:
        del inner[key]
    elif kind == 1:
        inner[rng.choice([str(key)[:-1], f"{key}s", *KEYS])] = inner.pop(key)
    elif kind == 2:
        inner[key] = [inner[key]]
    elif kind == 3:
        inner[rng.choice(list(config.TrainSettings.model_fields))] = rng.choice(GARBAGE)
    else:
        inner[key] = rng.choice(GARBAGE)


def _mutated_text(rng: random.Random) -> str:
    tree = copy.deepcopy(SEED_CONFIG)
    for _ in range(rng.randint(1, 4)):
        if tree:
            _mutate(rng, tree)
    text = yaml.dump(tree, sort_keys=False, allow_unicode=rng.random() < 0.5)
    if rng.random() < 0.3:  # broken text
        for _ in range(rng.randint(1, 5)):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(SHARDS) + text[at + rng.randint(0, 3) :]
    return text


@pytest.mark.parametrize("seed", range(30))
def test_no_config_whatever_raises_anything_but_config_error(tmp_path, seed):
    rng = random.Random(seed)
    path = tmp_path / "run.yaml"
    for _ in range(40):
        path.write_bytes(_mutated_text(rng).encode("utf-8", "surrogatepass"))
        overrides = [f"{rng.choice(OVERRIDDEN)}={rng.choice(OVERRIDES)}"] * rng.randrange(2)
        try:
            run = load(str(path), overrides)
        except ConfigError as error:
            assert error.problems and all(isinstance(p, str) and p.strip() for p in error.problems)
        else:
            written = [
                f"{s}.{key}={json.dumps(value)}"
                for s, values in run.dump().items()
                for key, value in values.items()
            ]
            assert load(None, written).dump() == run.dump()


def test_mutated_configs_are_both_accepted_and_refused(tmp_path):
    # Else the test above would look at one side only.
    outcomes = set()
    for seed in range(60):
        path = tmp_path / "run.yaml"
        path.write_bytes(_mutated_text(random.Random(seed)).encode("utf-8", "surrogatepass"))
        try:
            load(str(path))
            outcomes.add("accepted")
        except ConfigError:
            outcomes.add("refused")
    assert outcomes == {"accepted", "refused"}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "{b: " * 3000,
        "&a [*a]",
        "!!set {[a]}",
        "1" * 5000,
        "!!float 1" + ":59" * 300 + ".5",
        "!!timestamp 2020-99-99",
    ]
    + ["!!int ''", "!!bool x", "!!timestamp x", "!!float x"],
    ids=lambda text: text[:15],
)
def test_yaml_that_breaks_the_parser_is_refused_plainly(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {text}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(str(path))
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: not valid YAML: ") and "\n" not in problem


@pytest.mark.parametrize(
    "key",
    ["train.seed", "train.learning_rate", "train.logging_steps", "model.name", "train.report_to"],
)
def test_an_integer_too_long_to_print_is_refused_plainly(key):
    with pytest.raises(ConfigError) as caught:
        load(None, ["data.name=rte", f"{key}=0x{'f' * 5000}"])
    (problem,) = caught.value.problems
    assert problem.startswith(f"{key}: ") and len(problem) < 300
