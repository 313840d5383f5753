"""Prepared data: mapped instead of read, found again, and made anew when something changes."""

import os
import pathlib
import shutil
import signal

import pyarrow as pa
import pytest

from scaleup.data import classification, generation, prepared
from scaleup.errors import ConfigError, RunError
from scaleup.settings.data import DataSettings
from tests.utils.examples import settings, write_csv, write_jsonl

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant {% endif %}"


def folders(kind: str) -> list[str]:
    return sorted(name for name in os.listdir("cache") if name.startswith(kind))


def data(rows=20, **fields) -> DataSettings:
    pairs = [(f"good film {'abcd'[i % 4]}", "xy"[i % 2]) for i in range(rows)]
    if not os.path.exists("t.csv"):
        write_csv("t.csv", pairs)
    return settings(**({"train_file": "t.csv", "dev_size": 4, "cache_dir": "cache"} | fields))


def tokens(fields: DataSettings, tokenizer):
    prepared._texts.cache_clear()
    return classification.tokenize(classification.load(fields), tokenizer, fields)


def test_texts_and_tokens_take_no_memory_of_their_own(in_tmp, tokenizer):
    rows = [{"text": "good film " * 200, "target": "bad " * 50, "n": i} for i in range(3000)]
    fields = DataSettings(
        train_file=write_jsonl("t.jsonl", rows), task="causal_lm", dev_size=10, cache_dir="cache"
    )
    tokenizer.eos_token = "[SEP]"
    generation.tokenize(generation.load(fields), tokenizer, fields)
    prepared._texts.cache_clear()
    before = pa.total_allocated_bytes()
    texts = generation.load(fields)
    found = generation.tokenize(texts, tokenizer, fields)
    count = sum(len(row["input_ids"]) for row in found.train)
    size = sum(part["target"].count("bad") for part in texts.train)
    assert (count, size) == (2990 * 128, 2990 * 50)
    assert pa.total_allocated_bytes() - before < 1e6 < 5e6 < texts.train.data.nbytes
    files = [file["filename"] for part in (texts, found) for file in part.train.cache_files]
    assert len(files) >= 2 and all("/cache/" in os.path.abspath(file) for file in files)


def test_what_is_prepared_is_neither_read_nor_tokenized_again(in_tmp, tokenizer, monkeypatch):
    first = tokens(data(), tokenizer)
    monkeypatch.setattr(prepared, "write", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(prepared, "encode", lambda *_, **__: pytest.fail("tokenized again"))
    again = tokens(data(num_beams=3, pad_to_max_length=True, workers=7), tokenizer)
    assert again.train[:] == first.train[:] and again.sources == first.sources


def test_a_file_with_the_same_content_elsewhere_has_the_same_tokens(in_tmp, tokenizer, monkeypatch):
    tokens(data(), tokenizer)
    shutil.copy("t.csv", "copy.csv")
    monkeypatch.setattr(prepared, "encode", lambda *_, **__: pytest.fail("tokenized again"))
    tokens(data(train_file="copy.csv"), tokenizer)
    assert (len(folders("texts")), len(folders("tokens"))) == (2, 1)


@pytest.mark.parametrize("change", ["content", "max_length", "seed", "tokenizer", "code"])
def test_a_change_of_anything_that_matters_is_noticed(in_tmp, tokenizer, monkeypatch, change):
    before = tokens(data(), tokenizer).train[:]
    fields = {}
    if change == "content":
        state = os.stat("t.csv")
        text = pathlib.Path("t.csv").read_text().replace("good", "fine")
        pathlib.Path("t.csv").write_text(text)
        os.utime("t.csv", ns=(state.st_atime_ns, state.st_mtime_ns))
        assert os.stat("t.csv").st_mtime_ns == state.st_mtime_ns
    elif change == "tokenizer":
        monkeypatch.setattr(tokenizer, "truncation_side", "left")
        fields = {"max_length": 4}
    elif change == "code":
        monkeypatch.setattr(prepared, "_code", lambda: "other")
    else:
        fields = {change: 4}
    after = tokens(data(**fields), tokenizer).train[:]
    assert len(folders("tokens")) == 2
    assert (after == before) == (change == "code")


def test_several_processes_give_what_one_gives(in_tmp, tokenizer, monkeypatch):
    monkeypatch.setattr(prepared, "ROWS_PER_WORKER", 10)
    alone = tokens(data(50, workers=1, cache_dir="one"), tokenizer)
    several = tokens(data(50, workers=3), tokenizer)
    assert several.train[:] == alone.train[:] and several.dev[:] == alone.dev[:]
    assert len(several.train.cache_files) == 3 and len(alone.train.cache_files) == 1


def test_what_a_process_refuses_is_reported_as_it_is(in_tmp, tokenizer, monkeypatch):
    monkeypatch.setattr(prepared, "ROWS_PER_WORKER", 2)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    fields = DataSettings(
        train_file=write_jsonl("t.jsonl", [{"m": chat}] * 9),
        task="causal_lm",
        messages_column="m",
        dev_size=1,
        workers=2,
        cache_dir="cache",
    )
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no chats') }}")
    tokenizer.eos_token = "[SEP]"
    with pytest.raises(ConfigError, match="data.messages_column: .*refuses a chat: no chats"):
        generation.tokenize(generation.load(fields), tokenizer, fields)
    assert folders("tokens") == [] and not [n for n in os.listdir("cache") if "part" in n]


def test_a_process_that_is_killed_is_one_line(in_tmp, tokenizer):
    texts = classification.load(data())

    def die(batch):
        os.kill(os.getpid(), signal.SIGKILL)

    # The others get SIGTERM, which a handler of an earlier test would keep from ending them.
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(RunError, match="a process that tokenizes was killed; .*data.workers"):
            prepared.encode(die, texts.train, in_tmp / "x.arrow", 2)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_examples_that_were_made_by_hand_have_no_name_in_the_cache(in_tmp, tokenizer):
    fields = data()
    texts = classification.load(fields)
    with pytest.raises(ValueError, match="only examples that `load` returns"):
        prepared.tokens(
            prepared.dataclasses.replace(texts, content=""), tokenizer, fields, lambda *_: None
        )
