"""Local model folders with damaged, missing or absurd files are refused in one line each."""

import json
import os
import pathlib
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from scaleup.errors import ConfigError
from scaleup.settings import schema
from scaleup.training.preflight import CHECKS
from tests.utils.workspace import make_workspace, overrides

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1629437147\n"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(params=["bert"])
def model(request, workspace, tmp_path) -> pathlib.Path:
    shutil.copytree(workspace / request.param, tmp_path / "model")
    return tmp_path / "model"


def problems(workspace, model, *more: str) -> list[str]:
    """Return what is refused, with FOLDER for the folder; it must take less than 20 seconds."""
    words = [o for o in overrides(workspace, model.parent / "out", *more) if "model.name" not in o]
    begin = time.process_time()
    try:
        schema.load(None, [*words, f"model.name={model}"], checks=CHECKS)
        found = []
    except ConfigError as error:
        found = error.problems
    assert time.process_time() - begin < 20 and not (model.parent / "out").exists()
    assert all("\n" not in problem and len(problem) < 600 for problem in found)
    return [problem.replace(str(model), "FOLDER") for problem in found]


def change_json(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_complete_folder_is_accepted(workspace, model):
    assert problems(workspace, model) == []


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_named_with_the_command_that_helps(workspace, model, name):
    (model / name).write_text(POINTER)
    assert problems(workspace, model) == [
        f"model.name: {name} in FOLDER is a Git LFS pointer instead of the file itself; run `git "
        "lfs pull` in that folder"
    ]


def test_pointers_in_files_that_nothing_reads_do_no_harm(workspace, model):
    (model / "tf_model.h5").write_text(POINTER)
    (model / "flax_model.msgpack").write_text(POINTER)
    assert problems(workspace, model) == []


def test_a_pointer_in_place_of_data_is_named_too(workspace, model, tmp_path):
    (tmp_path / "t.csv").write_text(POINTER)
    found = problems(workspace, model, f"data.train_file={tmp_path / 't.csv'}")
    assert found == [
        f"data.train_file: {tmp_path / 't.csv'} is a Git LFS pointer instead of the file itself; "
        "run `git lfs pull`"
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(workspace, model, name):
    (model / name).unlink()
    os.mkfifo(model / name)
    found = problems(workspace, model)
    words = f"FOLDER/{name} cannot be read: it is a pipe"
    words = "FOLDER has no config.json" if name == "config.json" else words
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize("kind", ["cut", "text", "empty", "header"])
def test_damaged_safetensors_are_refused(workspace, model, kind):
    path = model / "model.safetensors"
    content = path.read_bytes()
    damaged = {
        "cut": content[:-100],
        "text": b"<html>404 Not Found</html>",
        "empty": b"",
        "header": (2**40).to_bytes(8, "little") + content[8:],
    }
    path.write_bytes(damaged[kind])
    (found,) = problems(workspace, model)
    assert found.startswith("model.name: FOLDER/model.safetensors is damaged or incomplete: ")


@pytest.mark.parametrize("kind", ["cut", "text", "empty", "pickle", "a list"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_bin_is_refused(workspace, model, kind, legacy):
    state, path = load_file(model / "model.safetensors"), model / "pytorch_model.bin"
    (model / "model.safetensors").unlink()
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    assert problems(workspace, model) == []
    content = path.read_bytes()
    damaged = {
        "cut": content[: len(content) // 2],
        "text": b"<html>404 Not Found</html>",
        "empty": b"",
        "pickle": b"cos\nsystem\n(S'touch hacked'\ntR.",
        "a list": content[:2] + bytes(100) + content[102:],
    }
    path.write_bytes(damaged[kind])
    (found,) = problems(workspace, model)
    assert found.startswith("model.name: FOLDER/pytorch_model.bin is damaged")
    assert not os.path.exists("hacked")


def test_a_missing_part_of_the_weights_is_named(workspace, model):
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors").rename(model / names["a"])
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert problems(workspace, model) == [
        "model.name: model.safetensors.index.json names model-00002-of-00002.safetensors, which "
        "is not in FOLDER; copy all 2 files of weights there"
    ]
    for content in ("{", "[]", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', "{}"):
        index.write_text(content)
        assert problems(workspace, model) == [
            "model.name: FOLDER/model.safetensors.index.json is not a valid index of weights"
        ]


@pytest.mark.parametrize("name", ["../other.safetensors", "x" * 300])
def test_weights_outside_the_folder_are_refused(workspace, model, name):
    """They would not be part of the backbone's fingerprint."""
    shutil.copy(model / "model.safetensors", model.parent / "other.safetensors")
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"a": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (found,) = problems(workspace, model)
    assert f"model.safetensors.index.json names {name[:80]}, which is not in FOLDER" in found


@pytest.mark.parametrize("index", [{"weight_map": {}}, {"metadata": 5}, {}])
def test_an_index_that_transformers_cannot_read_is_refused(workspace, model, index):
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    content = {"weight_map": {"a": "model-00001-of-00001.safetensors"}} | index
    (model / "model.safetensors.index.json").write_text(json.dumps(content))
    assert problems(workspace, model) == [
        "model.name: FOLDER/model.safetensors.index.json is not a valid index of weights"
    ]


def test_a_name_that_is_too_long_is_no_folder(workspace, model):
    (found,) = problems(workspace, model.parent / ("a" * 300))
    assert found.startswith("model.name: no folder")


def test_a_bin_that_holds_no_tensors_by_name_is_refused(workspace, model):
    (model / "model.safetensors").unlink()
    torch.save([torch.ones(2)], model / "pytorch_model.bin")
    (found,) = problems(workspace, model)
    assert "pytorch_model.bin is damaged, or no file of weights: it holds a list" in found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "768"}, "expected int, got str"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 0}, "describes no model"),
        ({"hidden_size": -5}, "describes no model"),
        ({"hidden_size": 10**15}, "hidden_size is 1e+15; it should be at most 2,147,483,648"),
        ({"vocab_size": 10**12}, "vocab_size is 1e+12"),
        ({"vocab_size": 10**30}, "vocab_size is 1e+30"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings is 1e+30"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1e+06; it should be at most 1,024"),
        ({"num_labels": 10**9}, "num_labels is 1e+09; it should be at most 1,000,000"),
        ({"hidden_size": 10**400}, "hidden_size is a very long number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_attention_heads": 0}, "describes no model"),
        ({"num_attention_heads": 7}, "not a multiple of the number of attention heads"),
        ({"hidden_act": "foo"}, "describes no model"),
        ({"pad_token_id": 10**6}, "describes no model"),
        ({"hidden_dropout_prob": 5}, "hidden_dropout_prob is 5; it should be a probability"),
        ({"attention_probs_dropout_prob": -0.1}, "it should be a probability"),
        ({"model_type": 5}, "is not a usable model config"),
        ({"model_type": "nope"}, "is not a usable model config"),
        ({"id2label": {"a": "b"}}, "is not a usable model config"),
        ({"dtype": "foo"}, "is not a usable model config"),
        ({"auto_map": 5}, "is not a usable model config"),
    ],
    ids=str,
)
def test_wrong_types_and_absurd_sizes_in_the_config_are_refused(workspace, model, changes, words):
    change_json(model / "config.json", **changes)
    (found,) = problems(workspace, model)
    assert found.startswith("model.name: FOLDER/config.json") and words in found


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "5", "null", '"x"', "[" * 10**6, b"\xff\xfe", " " * (65 * 2**20)]
)
def test_a_config_that_is_no_json_object_is_refused(workspace, model, content):
    content = content.encode() if isinstance(content, str) else content
    (model / "config.json").write_bytes(content)
    (found,) = problems(workspace, model)
    assert found.startswith("model.name: FOLDER/config.json ")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", "5", '{"model": {"type": "Nope"}}', "[" * 10**5]
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_refused(workspace, model, name, content):
    (model / name).write_text(content)
    found = problems(workspace, model)
    if (name, content) == ("tokenizer_config.json", "{}"):
        return  # the file has only hints
    assert len(found) == 1 and found[0].startswith("model.name: FOLDER"), found


@pytest.mark.parametrize("model", ["bart"], indirect=True)
def test_an_encoder_decoder_classifier_needs_an_end_of_sequence_token(workspace, model):
    assert problems(workspace, model) == []
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    assert problems(workspace, model) == [
        "model.name: the tokenizer of FOLDER has no end-of-sequence token, which a bart model "
        "needs; set its eos_token and save it"
    ]
    tokenizer.eos_token = "<mask>"
    tokenizer.save_pretrained(model)
    assert problems(workspace, model) == [
        "model.name: the tokenizer of FOLDER ends no text with its end-of-sequence token <mask>, "
        "which a bart model needs; set its eos_token and save it"
    ]


@pytest.mark.parametrize("model", ["bart"], indirect=True)
@pytest.mark.parametrize(
    ("start", "words"),
    [
        (None, "set decoder_start_token_id in its config.json"),
        (99, "config.json: decoder_start_token_id 99 is none of the"),
        (-4, "config.json: decoder_start_token_id -4 is none of the"),
    ],
)
@pytest.mark.parametrize("task", ["sequence_classification", "seq2seq"])
def test_a_decoder_needs_a_token_to_begin_with(workspace, model, start, words, task):
    change_json(model / "config.json", decoder_start_token_id=start)
    task = [f"data.task={task}", "data.target_column=label"] if task == "seq2seq" else []
    (found,) = problems(workspace, model, *task)
    assert found.startswith("model.name: ") and words in found
