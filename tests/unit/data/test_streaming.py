"""Training data that is read while training: its order, its content, and its mistakes."""

import collections
import itertools
import pathlib
import threading
import time

import datasets
import huggingface_hub
import pytest

from scaleup.data import streaming
from scaleup.data.classification import provenance
from scaleup.data.examples import Examples
from scaleup.data.generation import load, tokenize
from scaleup.errors import ConfigError, RunError
from scaleup.settings.data import DataSettings
from scaleup.settings.schema import load as load_settings
from tests.utils.examples import problems, write, write_jsonl

LETTERS = "abcd"
COMMIT = "0123456789012345678901234567890123456789"


@pytest.fixture
def rows(in_tmp) -> list[dict]:
    """Rows whose text is unique, in train.jsonl, and a development set in dev.jsonl."""
    made = [
        {"text": " ".join(letters), "target": letters[0]}
        for letters in itertools.product(LETTERS, repeat=3)
    ]
    write_jsonl("train.jsonl", made)
    write_jsonl("dev.jsonl", made[:4])
    return made


@pytest.fixture
def writer(tokenizer):
    tokenizer.add_special_tokens({"eos_token": "[SEP]", "bos_token": "[CLS]"})
    return tokenizer


def settings(**values) -> DataSettings:
    places = {"train_file": "train.jsonl", "validation_file": "dev.jsonl", "cache_dir": "cache"}
    if "sources" in values or "path" in values:
        del places["train_file"]
    values = {"task": "causal_lm", "streaming": True, "shuffle_buffer": 16, **places, **values}
    return DataSettings(**values)


def opened(data: DataSettings, tokenizer) -> Examples:
    return tokenize(load(data), tokenizer, data)


def texts(data: DataSettings, tokenizer, count: int) -> list[str]:
    """The first texts of a stream, with their targets."""
    stream = itertools.islice(opened(data, tokenizer).train, count)
    return [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in stream]


def complete(rows: list[dict]) -> list[str]:
    return sorted(f"{row['text']} {row['target']}" for row in rows)


def test_each_pass_has_every_row_once_in_an_order_of_its_own(rows, writer):
    found = texts(settings(), writer, 2 * len(rows))
    first, second = found[: len(rows)], found[len(rows) :]
    assert sorted(first) == sorted(second) == complete(rows)
    assert len({tuple(first), tuple(second), tuple(complete(rows))}) == 3


def test_the_order_depends_on_the_seed_alone(rows, writer):
    found = texts(settings(), writer, 40)
    assert texts(settings(), writer, 40) == found
    assert texts(settings(seed=1), writer, 40) != found


def test_a_buffer_of_one_row_keeps_the_order_of_the_file(rows, writer):
    found = texts(settings(shuffle_buffer=1), writer, len(rows))
    assert found == [f"{row['text']} {row['target']}" for row in rows]


def test_the_rows_are_those_that_a_run_without_streaming_trains_on(rows, writer):
    stream = list(itertools.islice(opened(settings(), writer).train, len(rows)))
    stored = list(opened(settings(streaming=False), writer).train)

    def content(found: list[dict]) -> list[tuple]:
        return sorted((row["input_ids"], row["labels"], row["length"]) for row in found)

    assert content(stream) == content(stored)


def test_a_stream_is_packed_across_its_passes(rows, writer):
    data = settings(packing=True, max_length=20)
    packs = list(itertools.islice(opened(data, writer).train, 40))
    plain = itertools.chain.from_iterable(
        row["input_ids"] for row in opened(settings(), writer).train
    )
    tokens = [token for pack in packs for token in pack["input_ids"]]
    assert tokens == list(itertools.islice(plain, len(tokens))) and len(tokens) > 6 * len(rows)
    assert {len(pack["input_ids"]) for pack in packs} == {18}  # three texts of six tokens


def test_sources_are_mixed_by_weight_and_begin_again(rows, writer):
    write_jsonl("few.jsonl", [{"prompt": "film", "target": "good"}])
    sources = [
        {"file": "train.jsonl", "weight": 3},
        {"file": "few.jsonl", "weight": 1, "text_column": "prompt"},
    ]
    counts = collections.Counter(texts(settings(sources=sources), writer, 400))
    assert 70 <= counts.pop("film good") <= 130
    assert set(counts) == set(complete(rows))


def test_all_rows_of_a_source_are_seen_equally_often(rows, writer):
    write_jsonl("more.jsonl", [{"text": "film", "target": "good"}] * 100)
    sources = [{"file": "train.jsonl"}, {"file": "more.jsonl"}]
    counts = collections.Counter(texts(settings(sources=sources), writer, 1500))
    del counts["film good"]
    assert set(counts) == set(complete(rows))
    assert max(counts.values()) - min(counts.values()) <= 2  # the buffer holds some back


def test_a_mistake_in_the_first_rows_is_reported_before_training(rows):
    assert problems(**settings(text_column="txt").model_dump()) == [
        "data.text_column: train.jsonl has no column 'txt'; its columns are text, target;"
        " did you mean text",
        "data.text_column: dev.jsonl has no column 'txt'; its columns are text, target;"
        " did you mean text",
    ]
    write_jsonl("train.jsonl", [*rows, {"text": "a", "target": " "}])
    (problem,) = problems(**settings().model_dump())
    assert "train.jsonl, row 65 (line 65), column target: is empty" in problem


def test_a_mistake_further_on_is_reported_with_its_row(in_tmp, writer):
    good = [{"text": "a", "target": "b"}] * 1500
    write_jsonl("train.jsonl", [*good, {"text": None, "target": "b"}, *good])
    write_jsonl("dev.jsonl", good[:1])
    data = settings()
    examples = opened(data, writer)
    message = r"train.jsonl, row 1501 \(line 1501\), column text: is missing"
    with pytest.raises(ConfigError, match=message):
        collections.deque(itertools.islice(examples.train, 4000), maxlen=0)
    with pytest.raises(ConfigError, match=message):
        streaming.check(data, examples.sources)
    write_jsonl("train.jsonl", good)
    assert streaming.check(data, load(data).sources) == 1500


def test_an_empty_source_is_refused(rows):
    write("train.jsonl", "\n")
    assert problems(**settings().model_dump()) == ["data.train_file: train.jsonl is empty"]


def test_a_stream_without_development_data_is_no_problem_of_the_folder(rows):
    """The rules refuse it; reading adds nothing about data.cache_dir."""
    assert load(settings(validation_file=None)).dev is not None


def test_nothing_of_the_training_data_is_stored(rows, writer):
    opened(settings(), writer)
    assert sorted({path.stem for path in pathlib.Path("cache").rglob("*.arrow")}) == [
        "dev",
        "references",
    ]


def test_a_thread_reads_a_few_items_ahead_and_ends_with_the_stream():
    read = []

    def items():
        for number in itertools.count():
            read.append(number)
            yield number

    stream = streaming._read_ahead(items(), 3)
    assert list(itertools.islice(stream, 10)) == list(range(10))
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "stream")
    deadline = time.monotonic() + 10
    while len(read) < 14 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(read) == 14  # ten used, three ready, and one that waits for its place
    stream.close()
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def hub(monkeypatch, rows):
    """A hub with the rows in four files; `asked` lists the revisions that were loaded."""
    asked = []

    def batches(shard):
        for number in shard:
            yield from rows[number * 16 : number * 16 + 16]

    def load_dataset(path, subset, split, revision, streaming):
        assert (path, split, streaming) == ("me/texts", "train", True)
        asked.append(revision)
        return datasets.IterableDataset.from_generator(batches, gen_kwargs={"shard": [0, 1, 2, 3]})

    class Api:
        def dataset_info(self, path, revision):
            return huggingface_hub.DatasetInfo(id=path, sha=COMMIT)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return asked


def test_a_data_set_of_the_hub_is_streamed_at_the_commit_it_has_at_the_start(hub, rows, writer):
    data = settings(path="me/texts", shuffle_buffer=1)
    found = texts(data, writer, len(rows))
    assert sorted(found) == complete(rows)
    assert found != [f"{row['text']} {row['target']}" for row in rows]  # its files are shuffled
    assert set(hub) == {COMMIT}
    assert load(data).sources[0] == {
        "split": "train",
        "hub_id": "me/texts",
        "name": None,
        "revision": COMMIT,
    }


def test_a_hub_that_fails_while_training_ends_the_run_with_advice(hub, writer, monkeypatch):
    data = settings(path="me/texts")
    examples = opened(data, writer)

    def fails(self, *_, **__):
        raise ConnectionError("connection reset")

    monkeypatch.setattr(datasets.IterableDataset, "iter", fails)
    source = streaming._parts(data, examples.sources)[0]
    with pytest.raises(RunError, match=r"data\.path: .*connection reset.*train\.resume=auto"):
        list(streaming._rows(source, data))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"task": None}, "data.streaming: reads texts for data.task seq2seq and causal_lm only"),
        ({"validation_file": None}, "data.streaming: nothing can be cut from a stream"),
        ({"k": 100}, "data.k: 100 rows cannot be drawn from a stream"),
        ({"max_steps": -1}, "data.streaming: a stream has no end; set train.max_steps"),
        ({"eval_strategy": "epoch"}, "data.streaming: a stream has no epochs"),
        ({"dataloader_num_workers": 2}, "train.dataloader_num_workers: the run itself reads"),
        ({"group_by_length": True}, None),
        ({"num_train_epochs": 3}, "train.num_train_epochs: has no effect here"),
    ],
)
def test_settings_that_do_not_fit_a_stream_are_refused(changes, problem):
    values = {
        "data.task": "causal_lm",
        "data.train_file": "a.jsonl",
        "data.validation_file": "b.jsonl",
        "data.streaming": "true",
        "train.max_steps": 5,
        "train.eval_strategy": "steps",
    }
    sections = {key.rpartition(".")[2]: key for key in values}
    for key, value in changes.items():
        train = key in ("num_train_epochs", "dataloader_num_workers", "group_by_length")
        name = sections.get(key, f"train.{key}" if train else f"data.{key}")
        values[name] = "null" if value is None else str(value).lower()
    words = [f"{key}={value}" for key, value in values.items()]
    if problem is None:
        assert load_settings(None, words).data.streaming
        return
    with pytest.raises(ConfigError) as error:
        load_settings(None, words)
    assert any(found.startswith(problem) for found in error.value.problems), error.value.problems


def test_a_file_with_other_rows_of_the_same_size_is_another_stream(rows, writer):
    def identity() -> list[dict]:
        return provenance(load(settings()))

    first = identity()
    assert identity() == first
    write_jsonl("train.jsonl", rows[::-1])
    assert identity() != first
