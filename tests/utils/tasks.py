"""Data and runs of the tasks with words, label lists and answers, which tiny models can learn."""

import json
import pathlib
import random

from tests.utils.workspace import WORDS

FILLER = WORDS["other"]


def _tagged(draw: random.Random) -> dict:
    """Words of one kind are entities of that type; a bad word continues the entity before it."""
    words, tags = [], []
    for _ in range(draw.randint(3, 8)):
        kind = draw.choice(["good", "other", "other"])
        words.append(draw.choice(WORDS[kind]))
        tags.append("B-GOOD" if kind == "good" else "O")
        if kind == "good" and draw.random() < 0.5:
            words.append(draw.choice(WORDS["bad"]))
            tags.append("I-GOOD")
    return {"tokens": words, "tags": tags}


def _labelled(draw: random.Random) -> dict:
    """The labels are the kinds of words that a text has."""
    kinds = [kind for kind in ("good", "bad") if draw.random() < 0.5]
    words = [draw.choice(WORDS[kind]) for kind in kinds] + draw.choices(FILLER, k=3)
    draw.shuffle(words)
    return {"text": " ".join(words), "labels": kinds}


def _answered(draw: random.Random, filler: int = 12) -> dict:
    """The answer is the good word of the context; a context without one has no answer."""
    words = draw.choices(FILLER, k=draw.randint(4, filler))
    answer = draw.choice(WORDS["good"])
    answers: dict[str, list] = {"text": [], "answer_start": []}
    if draw.random() < 0.8:
        place = draw.randint(0, len(words))
        words.insert(place, answer)
        before = " ".join(words[:place])
        answers = {"text": [answer], "answer_start": [len(before) + (place > 0)]}
    return {"question": "the film", "context": " ".join(words), "answers": answers}


MAKERS = {
    "token_classification": _tagged,
    "multi_label_classification": _labelled,
    "question_answering": _answered,
}


def write_task(folder: pathlib.Path, task: str, train: int = 160, test: int = 40) -> None:
    """Write <task>.jsonl and <task>_test.jsonl."""
    draw = random.Random(0)
    for name, count in ((task, train), (f"{task}_test", test)):
        lines = [json.dumps(MAKERS[task](draw)) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def task_overrides(
    folder: pathlib.Path, out: pathlib.Path, task: str, *more: str, family: str = "bert"
) -> list[str]:
    """Overrides of a run."""
    return [
        f"model.name={folder / family}",
        f"data.task={task}",
        f"data.train_file={folder / task}.jsonl",
        f"data.test_file={folder / task}_test.jsonl",
        "data.dev_size=40",
        "data.max_length=24",
        f"train.output_dir={out}",
        "train.logging_steps=1",
        "train.disable_tqdm=true",
        "method.prefix_hidden_size=16",
        *more,
    ]
