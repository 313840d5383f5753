"""Exported folders of every family give the logits and texts of the trained model."""

import functools
import json
import pathlib
import sys

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from scaleup import unipelt
from scaleup.backbone import loading as backbones
from scaleup.export import calibrate, fold
from scaleup.export.folder import FolderWriter
from scaleup.unipelt.sites import find_sites
from scaleup.unipelt.submodules import SUBMODULES
from tests.utils.threads import run_together
from tests.utils.tiny import (
    FAMILIES,
    PAD,
    adapt,
    backbone,
    batch,
    implementation,
    logits,
    same,
    task_type,
)

AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
}
families = pytest.mark.parametrize("family", FAMILIES)


class Exported:
    """A tiny model with UniPELT, and the folder of its backbone."""

    def __init__(self, family: str, folder: pathlib.Path, **config):
        self.family, self.folder = family, folder
        base = backbone(family)
        self.auto = getattr(transformers, AUTO[task_type(base)])
        base.save_pretrained(folder / "base")
        self.model = adapt(base, **config)
        self.model.save_pretrained(str(folder / "checkpoint"))
        self.empty = backbones.empty_model(
            transformers.AutoConfig.from_pretrained(folder / "base"),
            implementation(family),
            torch.float32,
            self.auto,
        )
        self.attentions, self.blocks = find_sites(self.empty)

    def load(
        self,
        gates: fold.Gates | None,
        dropped=frozenset(),
        shard_bytes: int = 10**9,
        dtype: torch.dtype = torch.float32,
    ):
        """Write the folder and load it, without missing or unexpected tensors."""
        config, tensors = fold.read_checkpoint(self.folder / "checkpoint")
        folded = fold.fold(config, tensors, self.attentions, self.blocks, gates, dropped)
        out = self.folder / "out"
        out.mkdir()
        writer = FolderWriter(self.empty, folded, dtype, out)
        writer.write_config(self.auto.__name__)
        writer.write_weights(self.folder / "base", shard_bytes)
        more = {"attn_implementation": implementation(self.family), "output_loading_info": True}
        model, info = self.auto.from_pretrained(
            out, trust_remote_code=folded.specification is not None, **more
        )
        assert not any(info.values()), info
        return model.eval()

    def random_gates(self) -> fold.Gates:
        draw = torch.Generator().manual_seed(0)
        places = [
            (site.name, part) for site in self.attentions for part in ("prefix", "lora", "value")
        ] + [(path, "adapter") for path in SUBMODULES["adapter"].paths(None, [], self.blocks)]
        return {key: torch.rand((), generator=draw).item() for key in places}


@families
def test_a_folder_with_learned_gates_gives_the_logits_of_the_model(family, tmp_path):
    exported = Exported(family, tmp_path)
    expected = logits(exported.model)
    assert same(logits(exported.load(None)), expected)


@pytest.mark.parametrize(
    "family",
    [
        "bert",
        "albert",
        "deberta-v2",
        "mpnet",
        "modernbert",
        "bart",
        "mbart",
        "t5",
        "gpt2",
        "gpt_neox",
        "gemma2",
        "qwen3",
        "phi3",
        "mixtral",
        "gpt_oss",
        "qwen3_next",
        "falcon_h1",
    ],
)
def test_constants_folded_into_weights_equal_constants_in_the_gates(family, tmp_path):
    exported = Exported(family, tmp_path)
    gates, before = exported.random_gates(), logits(exported.model)
    dropped = {
        (exported.attentions[0].name, "prefix"),
        (SUBMODULES["adapter"].paths(None, [], exported.blocks)[-1], "adapter"),
    }
    calibrate.freeze(exported.model, gates, dropped)
    expected = logits(exported.model)
    assert (expected - before).abs().max() > 1e-3  # the constants matter
    assert (logits(exported.load(gates, dropped)) - expected).abs().max() < 1e-5 * max(
        1, expected.abs().max()
    )


@pytest.mark.parametrize(
    "family", ["bert", "mpnet", "bart", "t5", "gpt2", "gpt_neox", "mixtral", "qwen3_next"]
)
def test_lora_alone_becomes_plain_weights_without_code(family, tmp_path):
    exported = Exported(family, tmp_path, submodules=["lora"])
    expected = logits(exported.model)
    loaded = exported.load(
        fold.constant_gates(
            exported.model.peft_config["default"], exported.attentions, exported.blocks
        )
    )
    assert (
        not (tmp_path / "out" / "modeling_unipelt.py").exists() and type(loaded) in FAMILIES[family]
    )
    assert (logits(loaded) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart"])
def test_a_folder_keeps_the_scale_of_lora_that_its_gate_multiplies(family, tmp_path):
    exported = Exported(family, tmp_path, lora_gate="scale", lora_alpha=24, gate_bias=1.0)
    assert same(logits(exported.load(None)), logits(exported.model))


VARIANTS = {
    "bert": {"lora_gate_scope": "projection"},
    "bart": {"lora_gate_scope": "projection"},
    "t5": {"lora_gate_scope": "projection", "adapter_input": "raw", "prefix_positions": "counted"},
}


@pytest.mark.parametrize("family", VARIANTS)
def test_a_folder_keeps_the_settings_of_submodules(family, tmp_path):
    exported = Exported(family, tmp_path, **VARIANTS[family])
    assert same(logits(exported.load(None)), logits(exported.model))


@pytest.mark.parametrize("family", VARIANTS)
def test_a_value_projection_absorbs_the_constant_of_its_own_gate(family, tmp_path):
    exported = Exported(family, tmp_path, **VARIANTS[family])
    gates = exported.random_gates()
    for i, site in enumerate(exported.attentions):
        gates[site.value, "lora"] = 0.1 * i
        gates.pop((site.name, "value"))
    dropped = {(exported.attentions[0].name, "prefix")}
    calibrate.freeze(exported.model, gates, dropped)
    expected = logits(exported.model)
    assert (logits(exported.load(gates, dropped)) - expected).abs().max() < 1e-5


def test_dropping_everything_but_lora_leaves_plain_weights(tmp_path):
    exported = Exported("bert", tmp_path)
    gates = exported.random_gates()
    exported.load(gates, {key for key in gates if key[1] in ("prefix", "adapter")})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "bert"


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "pegasus", "gpt_oss", "qwen3_next"])
def test_an_exported_model_writes_the_same_text(family, tmp_path):
    exported = Exported(family, tmp_path)
    prompt = {
        "input_ids": torch.tensor([[5, 9, 14], [7, 30, 8]]),
        "attention_mask": torch.ones(2, 3, dtype=torch.long),
    }
    arguments = dict(max_new_tokens=8, do_sample=False, num_beams=2, pad_token_id=1)
    assert torch.equal(
        exported.load(None).generate(**prompt, **arguments),
        exported.model.generate(**prompt, **arguments),
    )


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_threads_that_share_an_exported_model_do_not_disturb_each_other(family, tmp_path):
    """As a server with a pool of threads uses it: prompts of other lengths at the same time."""
    model = Exported(family, tmp_path, gates="learned").load(None)
    batches = [batch((11, 7, 9), seed=3), batch((6, 13, 8), seed=8)]
    if family == "llama":
        options = {"max_new_tokens": 4, "pad_token_id": PAD}
        answers = [model.generate(**given, **options) for given in batches]
    else:
        answers = [logits(model, given) for given in batches]

    def serve(given, expected):
        for _ in range(8):
            if family == "llama":
                assert torch.equal(model.generate(**given, **options), expected)
            else:
                assert same(logits(model, given), expected)

    run_together(*[functools.partial(serve, *work) for work in zip(batches, answers)])


def test_shards_are_not_larger_than_allowed_and_load_together(tmp_path):
    exported = Exported("bart", tmp_path)
    expected = logits(exported.model)
    assert same(logits(exported.load(None, shard_bytes=40_000)), expected)
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 3
    sizes = [[t.numel() * t.itemsize for t in load_file(path).values()] for path in files]
    assert all(sum(size) <= 40_000 or len(size) == 1 for size in sizes)


def test_learned_gates_stay_float32_in_a_half_precision_folder(tmp_path):
    loaded = Exported("bert", tmp_path).load(None, dtype=torch.bfloat16)
    kinds = {("unipelt" in name): set() for name, _ in loaded.named_parameters()}
    for name, parameter in loaded.named_parameters():
        kinds["unipelt" in name].add(parameter.dtype)
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_a_collapsed_prefix_gives_the_same_logits_under_peft(family, tmp_path):
    exported = Exported(family, tmp_path)
    expected = logits(exported.model)
    config, tensors = fold.read_checkpoint(tmp_path / "checkpoint")
    assert not any(".transform." in name for name in tensors)
    save_file(
        {fold.PEFT_PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()},
        tmp_path / "checkpoint" / "adapter_model.safetensors",
    )
    config.save_pretrained(str(tmp_path / "checkpoint"))
    again = PeftModel.from_pretrained(
        exported.auto.from_pretrained(tmp_path / "base", attn_implementation="sdpa"),
        tmp_path / "checkpoint",
    ).eval()
    assert (logits(again) - expected).abs().max() < 1e-6


def test_the_folders_code_is_a_copy_of_the_package_that_needs_neither_scaleup_nor_peft(tmp_path):
    exported = Exported("bert", tmp_path)
    exported.load(None)
    package = pathlib.Path(unipelt.__file__).parent
    sources = {path.read_bytes() for path in package.rglob("*.py")}
    files = [p for p in (tmp_path / "out").glob("*.py") if p.name != "modeling_unipelt.py"]
    assert {"exported.py", "adapter.py", "kernels.py", "narrow.py"} <= {p.name for p in files}
    for path in [*files, tmp_path / "out" / "modeling_unipelt.py"]:
        assert path in files and path.read_bytes() in sources or path.name == "modeling_unipelt.py"
        needed = set(dynamic_module_utils.get_imports(path))
        assert needed <= {"torch", "transformers", *sys.stdlib_module_names}, path
