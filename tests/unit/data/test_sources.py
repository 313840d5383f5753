"""Data sets of the hub by id, and several sources of training data with weights."""

import collections
import json

import datasets
import pytest

from scaleup.data import classification, generation, prepared, tasks
from scaleup.errors import ConfigError
from scaleup.io import SAMPLES, sample_hash
from scaleup.settings.data import DataSettings
from scaleup.settings.schema import load
from tests.utils.examples import problems, settings, write_csv, write_jsonl

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
COMMIT = "0123456789012345678901234567890123456789"


@pytest.fixture
def hub(monkeypatch):
    """A hub with data sets id → split → columns; `asked` lists what was loaded."""
    sets: dict[str, dict[str, dict]] = {}
    asked = []

    def load_dataset(path, subset, split, revision, streaming):
        asked.append((path, subset, split, revision))
        if path not in sets:
            raise datasets.exceptions.DatasetNotFoundError(f"no {path}")
        rows = datasets.Dataset.from_dict(sets[path][split])
        rows.info.download_checksums = {f"hf://datasets/{path}@{COMMIT}/a.parquet": {}}
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sets["asked"] = asked
    return sets


def texts(*names: str) -> dict:
    return {"body": list(names), "kind": ["ab"[i % 2] for i in range(len(names))]}


def test_a_hub_data_set_is_read_by_id_with_its_splits_and_columns(hub, in_tmp):
    hub["me/reviews"] = {
        "fit": texts("one", "two", "three"),
        "dev[:50%]": texts("x", "y"),
        "held": texts("z", "w"),
    }
    data = settings(
        path="me/reviews",
        subset="en",
        revision="v2",
        train_split="fit",
        validation_split="dev[:50%]",
        test_split="held",
        text_column="body",
        label_column="kind",
        cache_dir="cache",
    )
    assert problems(**data.model_dump(exclude_defaults=True)) == [] and hub["asked"] == []
    examples = classification.load(data)
    assert [s[1:] for s in hub["asked"]] == [
        ("en", split, "v2") for split in ("fit", "dev[:50%]", "held")
    ]
    assert [examples.train["text"][:], examples.dev["text"][:], examples.test["text"][:]] == [
        ["one", "two", "three"],
        ["x", "y"],
        ["z", "w"],
    ]
    assert examples.labels == ["a", "b"]
    assert examples.sources[0] == {
        "split": "train",
        "rows": 3,
        "hub_id": "me/reviews",
        "name": "en",
        "revision": COMMIT,
    }
    prepared._texts.cache_clear()
    classification.load(data)
    assert len(hub["asked"]) == 3, "what is prepared needs no hub"


def test_chats_of_the_hub_become_training_data(hub, in_tmp):
    hub["me/chats"] = {"train_sft": {"chat": [CHAT] * 5}}
    data = DataSettings(
        path="me/chats",
        task="causal_lm",
        messages_column="chat",
        train_split="train_sft",
        dev_size=1,
        cache_dir="cache",
    )
    examples = generation.load(data)
    assert len(examples.train) == 4 and examples.train[0]["target"] == "b"


def test_a_hub_that_has_no_such_data_set_is_one_line(hub, in_tmp):
    with pytest.raises(ConfigError) as caught:
        classification.load(settings(path="me/nothing", dev_size=1, cache_dir="cache"))
    assert caught.value.problems == [
        "data.path: there is no folder me/nothing here, and it cannot be loaded from the hub (no "
        "me/nothing); "
        "correct it, or give files with data.train_file"
    ]


def count(rows) -> dict[str, int]:
    return dict(collections.Counter(text[0] for text in rows))


def test_each_source_is_seen_as_often_as_its_weight_says(hub, in_tmp):
    hub["me/b"] = {"part": texts(*(f"b{i}" for i in range(10)))}
    write_csv("a.csv", [(f"a{i}", "ab"[i % 2]) for i in range(8)])
    write_jsonl("c.jsonl", [{"text": f"c{i}", "label": "a"} for i in range(6)])
    sources = [
        {"file": "a.csv", "weight": 0.5},
        {
            "path": "me/b",
            "split": "part",
            "weight": 2.5,
            "text_column": "body",
            "label_column": "kind",
        },
        {"file": "c.jsonl"},
    ]
    dev = write_csv("dev.csv", [("x", "a"), ("y", "b")])
    data = settings(sources=sources, validation_file=dev, cache_dir="cache")
    examples = classification.load(data)
    assert count(examples.train["text"]) == {"a": 4, "b": 25, "c": 6}
    of_b = collections.Counter(text for text in examples.train["text"] if text[0] == "b")
    assert sorted(of_b.values()) == [2] * 5 + [3] * 5
    described = [(s["split"], s["rows"]) for s in examples.sources]
    assert described == [("train", 8), ("train", 10), ("train", 6), ("validation", 2)]
    other = classification.load(data.model_copy(update={"seed": 1}))
    assert set(other.train["text"]) != set(examples.train["text"]), "the half is drawn by the seed"


def test_rows_for_development_are_not_trained_on_whatever_the_weight(in_tmp):
    rows = [{"text": f"t{i}", "target": "x"} for i in range(20)]
    write_jsonl("a.jsonl", rows[:10])
    write_jsonl("b.jsonl", rows[10:])
    sources = [{"file": "a.jsonl", "weight": 3}, {"file": "b.jsonl"}]
    data = DataSettings(sources=sources, task="seq2seq", dev_size=6, cache_dir="cache")
    examples = generation.load(data)
    train, dev = set(examples.train["text"]), set(examples.dev["text"])
    assert (len(train), len(dev), len(train & dev)) == (14, 6, 0)


def test_every_problem_of_every_source_is_reported(in_tmp):
    write_csv("a.csv", [("x", "1"), ("y", "0")])
    write_csv("b.csv", [("x", "")])
    found = problems(sources=[{"file": "a.csv"}, {"file": "b.csv"}, {"file": "c.csv"}], dev_size=1)
    assert found == [
        "data.sources[1]: b.csv, row 1 (line 2), column label: is missing",
        "data.sources[2]: c.csv cannot be read: No such file or directory",
    ]


def test_a_class_has_one_spelling_in_all_sources(in_tmp):
    write_csv("a.csv", [("x", "1"), ("y", "0")])
    write_csv("b.csv", [("z", "1.0"), ("w", "0")])
    found = problems(sources=[{"file": "a.csv"}, {"file": "b.csv"}], dev_size=1)
    assert found == ["data.sources: one class has several spellings (1, 1.0); write it in one way"]


def test_a_source_that_is_also_the_test_is_refused(in_tmp):
    file = write_csv("a.csv")
    (found,) = problems(sources=[{"file": file}], test_file=file, dev_size=1)
    assert found.startswith("data.test_file: a.csv has the same content as a.csv, which is trained")


@pytest.mark.parametrize(
    "words, message",
    [
        (["data.task=seq2seq"], "data: set data.name (a GLUE task), data.train_file"),
        (
            ["data.path=me/x", "data.train_file=a.csv"],
            "data.path: data.train_file is set, too; leave one of them out",
        ),
        (
            ["data.path=me/x", "data.validation_split=dev", "data.validation_file=a.csv"],
            "data.validation_split: data.validation_file is set, too",
        ),
        (["data.sources=[{weight: 2}]"], "data.sources: "),
        (["data.sources=[{file: a.csv, weight: 0}]"], "data.sources: "),
        (["data.sources=[{file: a.csv, color: 0}]"], "data.sources: "),
        (
            ["data.train_file=a.csv", "data.train_split=x"],
            "data.train_split: has no effect here (data.path is not set); remove it",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_named(words, message):
    with pytest.raises(ConfigError) as caught:
        load(None, words)
    assert any(problem.startswith(message) for problem in caught.value.problems), caught.value


def test_a_local_folder_that_changed_is_read_anew(in_tmp):
    (in_tmp / "texts").mkdir()
    data = settings(path="texts", dev_size=2, cache_dir="cache")
    found = []
    for word in ("one", "two"):
        rows = [{"text": f"{word} {i}", "label": "ab"[i % 2]} for i in range(6)]
        write_jsonl("texts/train.jsonl", rows)
        found.append(classification.load(data))
    assert all(text.startswith("two") for text in found[1].train["text"])
    assert found[0].content != found[1].content
    assert classification.provenance(found[0]) != classification.provenance(found[1])


def write_parquet(name: str, columns: dict, features: dict) -> str:
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    rows.to_parquet(name)
    return name


NAMES = datasets.ClassLabel(names=["neg", "pos"])
LISTS = datasets.List(NAMES)
TAGS = datasets.List(datasets.ClassLabel(names=["O", "B-x"]))
TEXT = datasets.Value("string")


@pytest.mark.parametrize(
    ("task", "column", "feature", "cells"),
    [
        ("sequence_classification", "label", NAMES, [0, 1]),
        ("multi_label_classification", "labels", LISTS, [[0], [0, 1]]),
        ("token_classification", "tags", TAGS, [[0], [1]]),
    ],
)
@pytest.mark.parametrize("other_first", [False, True])
def test_ids_are_names_in_a_source_with_its_own_column(
    in_tmp, task, column, feature, cells, other_first
):
    words = task == "token_classification"
    role, kind = ("tokens", datasets.List(TEXT)) if words else ("text", TEXT)
    files = []
    for name in ("a", "b"):
        texts = [[f"{name}{i}"] if words else f"{name}{i}" for i in range(6)]
        place = column if name == "a" else "other"
        columns = {role: texts, place: cells * 3}
        files.append(write_parquet(f"{name}.parquet", columns, {role: kind, place: feature}))
    sources = [{"file": files[0]}, {"file": files[1], f"{column}_column": "other"}]
    data = settings(
        sources=sources[::-1] if other_first else sources, task=task, dev_size=2, cache_dir="cache"
    )
    names = ["O", "B-x"] if words else ["neg", "pos"]
    assert tasks.of(data).module.load(data).labels == names


def test_sources_that_declare_different_classes_have_all_of_them(in_tmp):
    three = datasets.ClassLabel(names=["neg", "pos", "neu"])
    rows = {"text": [f"a{i}" for i in range(6)], "label": [0, 1, 2] * 2}
    wide = write_parquet("wide.parquet", rows, {"text": TEXT, "label": three})
    rows = {"text": [f"b{i}" for i in range(6)], "label": [0, 1] * 3}
    narrow = write_parquet("narrow.parquet", rows, {"text": TEXT, "label": NAMES})
    named = write_csv("named.csv", [(f"c{i}", ["new", "pos"][i % 2]) for i in range(6)])
    for files, labels in (
        ((wide, narrow), ["neg", "pos", "neu"]),
        ((named, narrow), ["neg", "new", "pos"]),
    ):
        parts = [{"file": file} for file in files]
        examples = classification.load(settings(sources=parts, dev_size=2, cache_dir="cache"))
        assert examples.labels == labels


def test_a_source_that_is_missing_does_not_hide_the_others(in_tmp):
    write_csv("t.csv", [(f"a{i}", "xy"[i % 2]) for i in range(6)])
    parts = [{"file": "none.csv", "label_column": "kind"}, {"file": "t.csv"}]
    with pytest.raises(ConfigError) as caught:
        classification.load(settings(sources=parts, dev_size=2, cache_dir="cache"))
    assert len(caught.value.problems) == 1 and "none.csv" in caught.value.problems[0]


def test_weights_that_leave_nothing_of_a_source_are_refused(in_tmp):
    write_csv("a.csv", [(f"a{i}", "xy"[i % 2]) for i in range(8)])
    write_csv("b.csv", [(f"b{i}", "xy"[i % 2]) for i in range(8)])
    parts = [{"file": "a.csv"}, {"file": "b.csv", "weight": 0.02}]
    with pytest.raises(ConfigError, match=r"data.sources\[1\].weight: 0.02 of \d rows is less"):
        classification.load(settings(sources=parts, dev_size=2, cache_dir="cache"))
    parts[0]["weight"] = 0.02
    with pytest.raises(ConfigError, match="the weights leave no row to train on"):
        classification.load(settings(sources=parts, k=4, dev_size=2, cache_dir="cache"))


@pytest.mark.parametrize(
    ("words", "part", "problem"),
    [
        ([], {"text_pair_column": "b"}, "text_pair_column: has no effect here (data.text_pair_col"),
        ([], {"target_column": "b"}, "target_column: has no effect here (data.task is sequence_"),
        ([], {"split": "test"}, "split: has no effect here (the source is a file)"),
        (["data.task=causal_lm"], {"messages_column": "b"}, "messages_column: has no effect here"),
        (
            ["data.task=causal_lm", "data.messages_column=m"],
            {"text_column": "b"},
            "text_column: has no effect here (data.messages_column is set)",
        ),
    ],
)
def test_settings_of_a_source_without_effect_are_refused(words, part, problem):
    sources = json.dumps([{"file": "a.csv"}, {"file": "b.csv"} | part])
    with pytest.raises(ConfigError) as caught:
        load(None, [f"data.sources={sources}", *words])
    assert any(p.startswith(f"data.sources[1].{problem}") for p in caught.value.problems)


def test_an_edit_between_the_samples_of_a_local_folder_is_tokenised(in_tmp, tokenizer):
    """The file keeps its size, and the pieces that `sample_hash` reads stay as they are."""
    (in_tmp / "texts").mkdir()
    path = in_tmp / "texts" / "train.csv"
    lines = [f"good{' film' * 60},{'xy'[i % 2]}\n" for i in range(2000)]
    path.write_text("text,label\n" + "".join(lines))
    whole, before = bytearray(path.read_bytes()), sample_hash(path)
    for number in range(SAMPLES):
        start = len(whole) * number // SAMPLES + 1024
        end = len(whole) * (number + 1) // SAMPLES
        whole[start:end] = whole[start:end].replace(b"film", b"good")
    data = settings(path="texts", dev_size=2, max_length=64, cache_dir="cache", workers=1)
    known = tokenizer.convert_tokens_to_ids("good")

    def count() -> int:
        prepared._texts.cache_clear()
        rows = classification.tokenize(classification.load(data), tokenizer, data).train
        return sum(ids.count(known) for ids in rows["input_ids"])

    first = count()
    path.write_bytes(whole)
    assert sample_hash(path) == before and count() > first
