"""What plain words mean in a config: numbers, truth values, texts, and texts that never end."""

import os
import time

import pytest
import yaml

from scaleup.errors import ConfigError
from scaleup.settings import loading
from scaleup.settings import schema as config
from scaleup.settings.schema import load
from tests.utils.configs import GLUE, problems, write

SEVEN_LEVELS = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 8)
]
BOMBS = {
    "lists": "\n".join(SEVEN_LEVELS),
    "a setting": "train:\n  report_to:\n  - &a [x, x]\n"
    + "\n".join(f"  - &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]" for i in range(24)),
    "merged mappings": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 9)),
    "keys": "? ["
    + ", ".join(
        [
            "&a [x, x]",
            *(
                f"&{b} [*{a}, *{a}]"
                for a, b in zip("abcdefghijklmnopqrstuvwxy", "bcdefghijklmnopqrstuvwxyz")
            ),
        ]
    )
    + "]\n: 1",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_aliases_that_multiply_are_refused_at_once(tmp_path, bomb):
    path, begin = write(tmp_path, BOMBS[bomb]), time.process_time()
    assert problems(path=path) == [
        f"{path}: not valid YAML: its aliases (*name) stand for more than 100,000 values"
    ]
    assert time.process_time() - begin < 2


def test_an_override_can_be_such_a_text_too():
    (problem,) = problems(
        GLUE,
        "train.run_name="
        + "[&a [x,x,x]"
        + "".join(f",&{b} [*{a},*{a},*{a}]" for a, b in zip("abcdefghijkl", "bcdefghijklm"))
        + "]",
    )
    assert problem.startswith("train.run_name: not valid YAML: its aliases")


def test_a_few_aliases_are_no_bomb():
    assert loading.parse("{a: &a [1, 2], b: *a, c: [*a, *a]}", "x")["c"] == [[1, 2], [1, 2]]


@pytest.mark.parametrize("place", ["fifo", "/dev/zero", "socket"])
def test_what_is_no_regular_file_is_refused_without_reading(tmp_path, place, monkeypatch):
    if place == "fifo":
        os.mkfifo(place := str(tmp_path / "fifo"))
    elif place == "socket":
        import socket

        monkeypatch.chdir(tmp_path)
        socket.socket(socket.AF_UNIX).bind("socket")
    assert problems(path=place) == [
        f"{place}: cannot be read: it is a pipe, a socket or a device, not a file"
    ]


def test_a_huge_config_is_refused_without_parsing(tmp_path):
    path = write(tmp_path, "# a comment\n" * 30_000)
    assert problems(path=path) == [f"{path}: cannot be read: it is larger than 256 KiB"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100", 100),
        ("0", 0),
        ("-0", 0),
        ("+7", 7),
        ("0x1F", 31),
        ("1.5", 1.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("1e3", 1000.0),
        ("1.5E-3", 0.0015),
        (".inf", float("inf")),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        # YAML 1.1 takes each of these for a number, a truth value or a date.
        ("0100", "0100"),
        ("08", "08"),
        ("0o17", "0o17"),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1_0.5", "1_0.5"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("OFF", "OFF"),
        ("y", "y"),
        ("2020-01-01", "2020-01-01"),
        ("=", "="),
    ],
)
def test_plain_words_mean_what_they_look_like(text, value):
    parsed = loading.parse(text, "x")
    assert parsed == value and type(parsed) is type(value)
    assert loading.parse(yaml.dump(value, Dumper=loading.Dumper), "x") == value


@pytest.mark.parametrize("text", ["0100", "100", "1_00", "'100'"])
def test_a_number_with_leading_zeros_is_no_octal_number(text):
    assert load(None, [GLUE, f"data.k={text}"]).data.k == 100


@pytest.mark.parametrize("text", ["0o17", "1:30", "0b11", "yes", "!!int 0o100", "2020-01-01"])
def test_other_spellings_of_numbers_are_refused(text):
    (problem,) = problems(GLUE, f"data.k={text}")
    assert problem.startswith("data.k: ")


@pytest.mark.parametrize("text", ["!!int 0100", "!!int 1_000", "!!int 1:30"])
def test_a_tag_does_not_bring_octal_numbers_back(text):
    (problem,) = problems(GLUE, f"data.k={text}")
    assert problem.startswith("data.k: not valid YAML: ") and "integer" in problem


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "0100", "1_000", "1:30", "2020-01-01"])
def test_where_text_is_expected_every_word_is_text(word):
    run = load(
        None, ["data.train_file=a.csv", f"data.label_column={word}", f"model.revision={word}"]
    )
    assert (run.data.label_column, run.model.revision) == (word, word)
    assert load(None, ["data.name=rte", "train.save_strategy=no"]).train.save_strategy == "no"


@pytest.mark.parametrize(
    ("word", "value"), [("yes", True), ("no", False), ("on", True), ("off", False)]
)
def test_where_a_truth_value_is_expected_yes_and_no_are_understood(word, value):
    run = load(None, [GLUE, f"train.fp16={word}", f"data.pad_to_max_length={word}"])
    assert (run.train.fp16, run.data.pad_to_max_length) == (value, value)


@pytest.mark.parametrize("word", ["no", "Yes", "0100", "1_000", "1:30"])
def test_in_arguments_of_libraries_such_words_are_refused(word):
    # The library would get a text, and the text "no" counts as true.
    (problem,) = problems(
        GLUE,
        "train.gradient_checkpointing=true",
        f"train.gradient_checkpointing_kwargs={{a: [{{b: {word}}}]}}",
    )
    assert problem.startswith("train.gradient_checkpointing_kwargs: ") and repr(word) in problem


@pytest.mark.parametrize("key", ["model.name", "data.train_file", "train.output_dir"])
def test_the_home_of_an_unknown_user_is_refused(key):
    data = [] if key == "data.train_file" else ["data.train_file=a.csv"]
    assert problems(*data, f"{key}=~nobody-of-this-name/x.csv") == [
        f"{key}: ~nobody-of-this-name has no home folder here; write the full path"
        " (got '~nobody-of-this-name/x.csv')"
    ]


def test_a_written_config_quotes_what_other_readers_would_misread():
    run = load(None, ["data.train_file=a.csv", "data.label_column='0100'", "model.revision='yes'"])
    text = config.to_yaml(run)
    assert "'0100'" in text and "'yes'" in text


def test_nothing_but_a_config_error_comes_from_a_text(tmp_path):
    with pytest.raises(ConfigError):
        loading.parse("{a: !!python/object:os.system x}", "x")


@pytest.mark.parametrize("number", ["0x" + "F" * 4000, "1" * 4000, "!!int " + "1" * 4000])
def test_a_number_that_python_cannot_write_out_is_refused(number):
    with pytest.raises(ConfigError, match="a number has more than 3,000 digits"):
        loading.parse(f"data: {{k: {number}}}", "file")


def test_surrogate_pairs_that_json_spells_are_one_character():
    assert loading.parse(r'{"a": "\ud83d\ude42.csv"}', "file") == {"a": "🙂.csv"}
    for text in (r'"\ud83d"', r'{"\udcff": 1}'):
        with pytest.raises(ConfigError, match="half of a surrogate pair"):
            loading.parse(text, "file")
