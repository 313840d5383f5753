"""A folder with a tiny backbone and data, in which the examples of docs/clients.md run."""

import csv
import json
import pathlib
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.optim import optimizer as optimizers
from transformers import AutoModel, AutoModelForCausalLM

from tests.utils.workspace import WORDS, add_writer, make_workspace

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "clients.md"


def example(section: str, number: int = 0, language: str = "python") -> str:
    """Return a code block of the page, by the heading above it."""
    text = PAGE.read_text(encoding="utf-8")
    body = re.split(r"^#+ ", text.partition(f"# {section}\n")[2], flags=re.MULTILINE)[0]
    blocks = re.findall(rf"^```{language}\n(.*?)^```", body, re.MULTILINE | re.DOTALL)
    assert len(blocks) > number, f"no example {number} of {section}"
    return blocks[number]


class Training:
    """What an optimizer trains, as it was before the first step."""

    def __init__(self) -> None:
        self.initial: dict[torch.nn.Parameter, torch.Tensor] = {}

    def before_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self.initial.setdefault(parameter, parameter.detach().clone())

    def check(self, model: torch.nn.Module, backbone: torch.nn.Module) -> None:
        """Check that all of UniPELT has changed, with its gates, and nothing of the backbone."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for part in ("unipelt_gate", "unipelt_prefix", "unipelt_adapter", "lora_A", "lora_B"):
            assert any(part in name for name in trained), part
        unchanged = [n for n, p in trained.items() if torch.equal(p, self.initial[p])]
        assert not unchanged
        weights = {
            name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad and "original_module" not in name
        }
        expected = dict(backbone.named_parameters())
        compared = weights.keys() & expected.keys()
        assert len(compared) >= 25  # the three layers of the tiny models
        changed = [name for name in compared if not torch.equal(weights[name], expected[name])]
        assert not changed


@pytest.fixture
def training() -> Iterator[Training]:
    """Watch every optimizer of the test."""
    watched = Training()
    handle = optimizers.register_optimizer_step_pre_hook(watched.before_step)
    yield watched
    handle.remove()


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[..., dict[str, Any]]:
    """Return a function that runs an example of the page in the folder and returns its variables.

    Its arguments are those of `example`, and what to replace in the code.
    """
    monkeypatch.chdir(tmp_path)

    def run_example(
        section: str, number: int = 0, replace: dict[str, str] | None = None
    ) -> dict[str, Any]:
        code = example(section, number)
        for old, new in (replace or {}).items():
            assert old in code
            code = code.replace(old, new)
        variables: dict[str, Any] = {"__name__": "__main__"}
        torch.manual_seed(0)
        exec(compile(code, f"{PAGE.name}: {section}", "exec"), variables)
        return variables

    return run_example


@pytest.fixture
def encoder(tmp_path) -> pathlib.Path:
    """Make backbone/ (BERT), reviews.csv and pairs.jsonl, and return the folder."""
    make_workspace(tmp_path)
    (tmp_path / "bert").rename(tmp_path / "backbone")
    strengthen(tmp_path / "backbone", AutoModel)
    with (tmp_path / "train.csv").open(newline="") as file:
        rows = [(row["text"], int(row["label"] == "good")) for row in csv.DictReader(file)]
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "labels"), *rows])
    draw = random.Random(0)
    pairs = [
        {"anchor": f"{word} {draw.choice(WORDS['other'])}", "positive": word}
        for word in [*WORDS["good"], *WORDS["bad"]] * 6
    ]
    write_lines(tmp_path / "pairs.jsonl", pairs)
    return tmp_path


@pytest.fixture
def decoder(tmp_path) -> pathlib.Path:
    """Make backbone/ (Llama), texts.jsonl and preferences.jsonl, and return the folder."""
    add_writer(tmp_path, "llama")
    (tmp_path / "llama").rename(tmp_path / "backbone")
    strengthen(tmp_path / "backbone", AutoModelForCausalLM)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()][:48]
    write_lines(tmp_path / "texts.jsonl", [{"text": row["text"]} for row in rows])
    draw = random.Random(0)
    preferences = [
        {
            "prompt": row["text"],
            "chosen": f" {draw.choice(WORDS['good'])}",
            "rejected": f" {draw.choice(WORDS['bad'])} {draw.choice(WORDS['other'])}",
        }
        for row in rows
    ]
    write_lines(tmp_path / "preferences.jsonl", preferences)
    return tmp_path


def strengthen(folder: pathlib.Path, cls: Any) -> None:
    """Multiply the matrices of a model, whose random values are too small to learn from quickly."""
    model = cls.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    model.save_pretrained(folder)


def write_lines(path: pathlib.Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
