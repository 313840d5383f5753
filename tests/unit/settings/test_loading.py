"""Config files and overrides: YAML with numbers such as 5e-4, duplicate keys, broken files."""

import pytest

from scaleup.settings import loading
from scaleup.settings.schema import load
from tests.utils.configs import GLUE, problems, write


def test_overrides_win_over_the_file_and_are_yaml(tmp_path):
    path = write(tmp_path, "data: {name: rte, k: 100}\ntrain: {seed: 1}\n")
    run = load(
        path,
        ["data.k=all", "data.dev_size=1000", "method.submodules=[lora, prefix]", "train.seed=7"],
    )
    assert (run.data.name, run.data.k, run.train.seed, run.method.submodules) == (
        "rte",
        "all",
        7,
        ["prefix", "lora"],
    )


def test_the_last_of_several_overrides_wins():
    assert load(None, [GLUE, "train.seed=1", "train.seed=2"]).train.seed == 2


@pytest.mark.parametrize("number", ["5e-4", "5E-4", "+5e-4", "0.5e-3", "0.0005"])
def test_numbers_with_an_exponent_are_numbers(tmp_path, number):
    parsed = loading.parse(f"rate: {number}", "here")["rate"]
    assert isinstance(parsed, float) and parsed == 5e-4
    assert load(None, [GLUE, f"train.learning_rate={number}"]).learning_rate == 5e-4


def test_text_that_only_looks_like_a_number_stays_text():
    assert loading.parse("[5e, e5, 1e-4b, 0x1e-4]", "here") == ["5e", "e5", "1e-4b", "0x1e-4"]


def test_a_method_may_be_named_in_short(tmp_path):
    assert load(write(tmp_path, "method: bitfit\ndata: {name: rte}\n")).method.name == "bitfit"
    assert load(None, [GLUE, "method=full"]).method.name == "full"


@pytest.mark.parametrize(
    "text", ["data: {name: rte}\ndata: {k: 5}\n", "data:\n  name: rte\n  k: 5\n  k: 6\n"]
)
def test_a_key_given_twice_is_refused(tmp_path, text):
    (problem,) = problems(path=write(tmp_path, text))
    assert "appears twice" in problem and "line" in problem


def test_anchors_and_merge_keys_work(tmp_path):
    text = (
        "model: {name: org/model}\n"
        "train:\n  <<: {seed: 3, max_steps: 5}\n  seed: 4\n"
        "data: &d {name: rte}\n"
    )
    run = load(write(tmp_path, text))
    assert (run.train.seed, run.train.max_steps) == (4, 5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "found list"),
        ("just text", "found str"),
        ("data: 5", "data: expected settings, found 5"),
        ("\x07", "not valid YAML"),
    ],
)
def test_a_file_of_another_shape_is_one_plain_problem(tmp_path, text, said):
    assert any(said in problem for problem in problems(path=write(tmp_path, text)))


def test_an_unreadable_file_is_one_plain_problem(tmp_path):
    assert problems(path=str(tmp_path / "none.yaml")) == [
        f"{tmp_path}/none.yaml: cannot be read: No such file or directory"
    ]
    assert "cannot be read" in problems(path=str(tmp_path))[0]
    (tmp_path / "latin.yaml").write_bytes(b"model: {name: caf\xe9}")
    assert "not UTF-8 text" in problems(path=str(tmp_path / "latin.yaml"))[0]


def test_an_empty_section_means_its_defaults(tmp_path):
    assert load(write(tmp_path, "model:\ndata: {name: rte}\ntrain:\n")).train.seed == 42


@pytest.mark.parametrize("text", ["{text} :", "{text}"])
def test_a_text_that_begins_with_a_brace_is_asked_to_be_quoted(text):
    (problem,) = problems(GLUE, f"model.name={text}")
    assert "a text that begins with { needs quotes" in problem
    assert load(None, [GLUE, f"model.name='{text}'"]).model.name == text
