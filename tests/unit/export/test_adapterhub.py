"""Checkpoints of the library `adapters` give its logits, or are refused with the reasons."""

import json
import pathlib
import shutil

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from scaleup.cli.entry import main
from scaleup.errors import ConfigError
from scaleup.export.adapterhub.convert import import_adapter
from scaleup.unipelt.model import parameter_counts

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures" / "adapters_1_3"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.json"))


def backbone_of(case: str) -> str:
    about = json.loads((FIXTURES / case / "expected.json").read_text())
    return str(FIXTURES / "backbones" / about["backbone"])


def convert(case: str, folder: pathlib.Path, output: pathlib.Path):
    return import_adapter(folder, output, backbone_of(case), "eager")


def load(case: str, imported) -> PeftModel:
    """Load a converted adapter as the command says."""
    named = imported.labels is not None
    config = (
        {
            "config": transformers.AutoConfig.from_pretrained(
                imported.output / "backbone_config.json"
            )
        }
        if named
        else {}
    )
    auto = getattr(transformers, imported.auto)
    base = auto.from_pretrained(backbone_of(case), **config)
    return PeftModel.from_pretrained(base, str(imported.output)).eval()


def outputs(model: PeftModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**inputs)
    names = ("logits", "start_logits", "last_hidden_state")
    return result[next(name for name in names if name in result)]


@pytest.fixture
def copied(tmp_path):
    """Return a function that copies a fixture and changes its config."""

    def copy(case: str, method: int | None = None, **changes) -> pathlib.Path:
        shutil.copytree(FIXTURES / case, tmp_path / "DIR", dirs_exist_ok=True)
        path = tmp_path / "DIR" / "adapter_config.json"
        config = json.loads(path.read_text())
        part = config["config"]
        part = part["configs"][method] if method is not None else part
        target = config if changes.keys() <= config.keys() else part
        target.update(changes)
        path.write_text(json.dumps(config))
        return tmp_path / "DIR"

    return copy


def reasons(case: str, folder: pathlib.Path, tmp_path: pathlib.Path) -> str:
    """Return the message of a refused conversion, which must leave nothing behind."""
    with pytest.raises(ValueError) as refused:
        convert(case, folder, tmp_path / "OUT")
    assert {path.name for path in tmp_path.iterdir()} <= {"DIR"}
    return str(refused.value)


@pytest.mark.parametrize("case", CASES)
def test_a_converted_adapter_gives_the_logits_of_the_library(case, tmp_path):
    inputs = load_file(FIXTURES / case / "expected.safetensors")
    expected = inputs.pop("logits")
    model = load(case, convert(case, FIXTURES / case, tmp_path / "OUT"))
    assert (outputs(model, inputs) - expected).abs().max() < 1e-5
    with model.disable_adapter():
        assert (outputs(model, inputs) - expected).abs().max() > 0.05


def test_sizes_and_gates_are_those_of_the_checkpoint(tmp_path):
    imported = convert("bert-unipelt", FIXTURES / "bert-unipelt", tmp_path / "OUT")
    config = imported.config
    assert config.adapter_input == "normalised"  # which has no effect behind a layer norm
    assert config.submodules == ["adapter", "prefix", "lora"]
    assert (config.adapter_size, config.prefix_length, config.r, config.lora_alpha) == (4, 3, 2, 2)
    assert (config.gates, config.gate_pooling) == ("learned", "paper")
    counts = parameter_counts(load("bert-unipelt", imported))["submodules"]
    assert counts == {
        "adapter": 2 * (16 * 4 + 4 + 4 * 16 + 16),
        "prefix": 2 * 2 * 3 * 16,
        "lora": 2 * 2 * 2 * (16 * 2),
        "gates": 2 * 4 * (16 + 1),
    }


def test_an_adapter_without_gates_has_none_afterwards(tmp_path):
    convert("bert-mam", FIXTURES / "bert-mam", tmp_path / "OUT")
    names = load_file(tmp_path / "OUT" / "adapter_model.safetensors").keys()
    assert not any("gate" in name for name in names)


@pytest.mark.parametrize("case", ["bart-lora-flex-generation", "t5-prefix"])
def test_an_imported_decoder_without_gates_generates_with_a_cache(case, tmp_path):
    model = load(case, convert(case, FIXTURES / case, tmp_path / "OUT"))
    inputs = load_file(FIXTURES / case / "expected.safetensors")
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    written = [model.generate(**prompt, **options, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*written)


def test_an_adapter_without_its_head_keeps_that_of_the_backbone(copied, tmp_path):
    case = "bert-unipelt"
    folder = copied(case)
    (folder / "head_config.json").unlink()
    (folder / "pytorch_model_head.bin").unlink()
    imported = convert(case, folder, tmp_path / "OUT")
    assert imported.labels is None and not (tmp_path / "OUT" / "backbone_config.json").exists()
    names = load_file(tmp_path / "OUT" / "adapter_model.safetensors").keys()
    assert names and not any("classifier" in name for name in names)


@pytest.mark.parametrize("case", ["bert-lora", "bert-unipelt-flex", "bart-lora"])
def test_a_model_has_the_labels_of_the_head(case, copied, tmp_path):
    folder = copied(case)
    path = folder / "head_config.json"
    content = json.loads(path.read_text())
    named = {"c": 2, "a": 0, "b": 1}
    for i, (ids, names) in enumerate(
        [(named, list("abc")), (None, [f"LABEL_{i}" for i in (0, 1, 2)])]
    ):
        (content["config"] or content)["label2id"] = ids
        path.write_text(json.dumps(content))
        imported = convert(case, folder, tmp_path / f"OUT{i}")
        config = load(case, imported).config
        assert imported.labels == [config.id2label[i] for i in range(3)] == names
        assert config.label2id == {name: i for i, name in enumerate(names)}


@pytest.mark.parametrize(
    "case, method, changes, problem",
    [
        ("bert-bottleneck", None, {"mh_adapter": True}, "mh_adapter=True: there is a bottleneck"),
        ("bert-unipelt", 1, {"output_adapter": False}, "output_adapter=False: there is no"),
        ("bart-bottleneck", None, {"cross_adapter": True}, "cross_adapter=True: "),
        ("bert-unipelt", 1, {"phm_layer": True}, "phm_layer=True: the bottleneck is a Compacter"),
        ("bert-bottleneck", None, {"inv_adapter": "nice"}, "inv_adapter=nice: "),
        ("bert-bottleneck", None, {"ln_after": True}, "ln_after=True: the bottleneck has a layer"),
        ("bert-bottleneck", None, {"original_ln_before": False}, "original_ln_before=False: "),
        ("bert-bottleneck", None, {"residual_before_ln": "post_add"}, "residual_before_ln=post_"),
        ("bert-bottleneck", None, {"original_ln_after": False}, "original_ln_after=False: no "),
        ("bert-bottleneck", None, {"leave_out": [1]}, "leave_out=[1]: layers are left out"),
        ("bert-bottleneck", None, {"non_linearity": "new"}, "non_linearity=new: transformers"),
        ("t5-bottleneck", None, {"is_parallel": True}, "is_parallel=True: in T5 this bottleneck"),
        ("bert-lora", None, {"attn_matrices": ["q", "k"]}, "attn_matrices=['q', 'k']: LoRA has to"),
        ("bert-lora", None, {"output_lora": True}, "output_lora=True: there is LoRA in the feed"),
        ("bert-lora", None, {"composition_mode": "scale"}, "composition_mode=scale: (IA)³"),
        ("bert-lora", None, {"use_dora": True}, "use_dora=True: DoRA has no counterpart"),
        ("bert-lora", None, {"vera_d": 0.1}, "vera_d=0.1: VeRA has no counterpart"),
        ("bert-lora", None, {"architecture": "reft"}, "reft has no counterpart in scaleup"),
        ("bert-unipelt", 0, {"shared_gating": False}, "shared_gating=False: keys and values"),
        ("bart-unipelt", 0, {"encoder_prefix": False}, "encoder_prefix=False: the encoder has no"),
        ("bert-unipelt", 2, {"use_gating": False}, "use_gating: only some of the methods"),
        ("bert-unipelt", 0, {"non_linearity": "zz"}, "non_linearity=zz: transformers has no"),
        (
            "bert-unipelt",
            0,
            {"prefix_length": None},
            "prefix_length=None is not a valid value of this field",
        ),
        (
            "bert-unipelt",
            0,
            {"prefix_length": 0},
            "prefix_length=0 is not a valid value of this field",
        ),
        ("bert-bottleneck", None, {"is_parallel": "zz"}, "is_parallel='zz' is not a valid value"),
        ("bert-lora", None, {"r": True}, "r=True is not a valid value of this field"),
        ("bert-lora", None, {"architecture": [1]}, "[1] has no counterpart in scaleup"),
        ("bert-lora", None, {"version": "adapters.1.0.1"}, "not written by adapters 1.1 to 1.3"),
        ("bert-lora", None, {"model_type": "gpt2"}, "--model: "),
        (
            "bert-lora",
            None,
            {"model_class": "BertForMaskedLM"},
            "models of the class BertForMasked",
        ),
        ("bert-lora", None, {"name": "other"}, "which has no counterpart in scaleup"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_has_no_counterpart_is_refused(case, method, changes, problem, copied, tmp_path):
    assert problem in reasons(case, copied(case, method, **changes), tmp_path)


@pytest.mark.parametrize(
    "case, changes",
    [
        ("bert-bottleneck", {"is_parallel": "zz"}),
        ("bert-bottleneck", {"is_parallel": "false"}),
        ("bert-bottleneck", {"use_gating": "false"}),
        ("bert-bottleneck", {"scaling": "zz"}),
        ("bert-bottleneck", {"scaling": float("nan")}),
        ("bert-lora", {"r": "3"}),
        ("bert-lora", {"alpha": None}),
        ("bert-lora", {"dropout": 1}),
        ("bert-lora", {"attn_matrices": None}),
        ("bert-prefix", {"prefix_length": 2.5}),
        ("bert-prefix", {"flat": "false"}),
        ("bert-prefix", {"non_linearity": "zz"}),
    ],
    ids=str,
)
def test_values_that_the_library_never_writes_are_refused(case, changes, copied, tmp_path):
    assert next(iter(changes)) in reasons(case, copied(case, **changes), tmp_path)


@pytest.mark.parametrize(
    "case, scaling, problem",
    [
        ("bert-parallel", 2.0, "scaleup has no scaling of the adapters"),
        ("bert-bottleneck", "learned", "has no scaling of the adapters"),
    ],
)
def test_a_learned_scale_is_there_exactly_if_the_config_says_so(
    case, scaling, problem, copied, tmp_path
):
    assert problem in reasons(case, copied(case, scaling=scaling), tmp_path)


@pytest.mark.parametrize(
    "ids, problem",
    [
        ("zz", "no valid label2id"),
        (["a", "b", "c"], "no valid label2id"),
        ({"a": 0, "b": "one", "c": 2}, "no valid label2id"),
        ({"a": 1, "b": 2, "c": 3}, "does not number its labels"),
        ({"a": 0, "b": 0, "c": 2}, "does not number its labels"),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["bert-lora", "bert-unipelt-flex"])
def test_a_head_with_odd_numbers_of_labels_is_refused(case, ids, problem, copied, tmp_path):
    folder = copied(case)
    content = json.loads((folder / "head_config.json").read_text())
    (content["config"] or content)["label2id"] = ids
    (folder / "head_config.json").write_text(json.dumps(content))
    assert problem in reasons(case, folder, tmp_path)


def test_every_reason_is_named_at_once(copied, tmp_path):
    folder = copied("bert-unipelt", 1, mh_adapter=True, ln_before=True)
    lines = reasons("bert-unipelt", folder, tmp_path).splitlines()
    assert [line.partition("=")[0] for line in lines] == ["DIR: mh_adapter", "DIR: ln_before"]


def test_bart_with_a_prefix_asks_how_it_was_trained(tmp_path):
    for attention in (None, "sdpa"):
        with pytest.raises(ValueError, match="shifts the decoder's causal mask.*--attention eager"):
            import_adapter(
                FIXTURES / "bart-prefix", tmp_path / "OUT", backbone_of("bart-prefix"), attention
            )


@pytest.mark.parametrize(
    "changes, problem",
    [({"layers": 3}, "has the same head"), ({"head_type": "dependency_parsing"}, "same head")],
    ids=str,
)
def test_a_head_that_no_class_has_is_refused(changes, problem, copied, tmp_path):
    folder = copied("bert-unipelt-flex")
    path = folder / "head_config.json"
    config = json.loads(path.read_text())
    config["config"].update(changes | {"activation_function": "relu"})
    path.write_text(json.dumps(config))
    assert problem in reasons("bert-unipelt-flex", folder, tmp_path)


def change(path: pathlib.Path, alter) -> None:
    """Change the tensors in a file."""
    tensors = load_file(path)
    alter(tensors)
    save_file(tensors, path)


def test_a_trained_output_embedding_is_refused(copied, tmp_path):
    folder = copied("t5-lora")
    path = folder / "pytorch_model_head.bin"
    torch.save({name: t + 1 for name, t in torch.load(path).items()}, path)
    assert "the output embedding lm_head.weight" in reasons("t5-lora", folder, tmp_path)


@pytest.mark.parametrize("which", ["missing", "additional", "other size"])
def test_tensors_that_do_not_fit_are_refused(which, copied, tmp_path):
    folder = copied("bert-bottleneck")
    place = "bert.encoder.layer.1.output.adapters.task"
    up = f"{place}.adapter_up.weight"
    alterations = {
        "missing": (lambda t: t.pop(up), "has no adapter_up.weight of the adapters at"),
        "additional": (
            lambda t: t.update({f"{place}.m": t[up].clone()}),
            "scaleup has no m of the",
        ),
        "other size": (
            lambda t: t.update({f"{place}.adapter_down.0.weight": torch.ones(5, 16)}),
            "reduction_factor: the layers have bottlenecks of different sizes",
        ),
    }
    alter, problem = alterations[which]
    change(folder / "adapter.safetensors", alter)
    assert problem in reasons("bert-bottleneck", folder, tmp_path)


def test_a_damaged_config_is_refused(copied, tmp_path):
    folder = copied("bert-unipelt")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["config"]["configs"][2]["r"]
    path.write_text(json.dumps(config))
    assert reasons("bert-unipelt", folder, tmp_path) == "DIR: adapter_config.json lacks r"
    config["config"]["configs"] = "lora"
    path.write_text(json.dumps(config))
    assert "has no list of methods" in reasons("bert-unipelt", folder, tmp_path)
    path.write_text("{")
    assert "not valid JSON" in reasons("bert-unipelt", folder, tmp_path)


def test_another_backbone_is_refused(tmp_path):
    config = transformers.AutoConfig.from_pretrained(backbone_of("bert-lora"))
    config.hidden_size = 24
    config.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="--model: it is not the backbone of"):
        import_adapter(FIXTURES / "bert-lora", tmp_path / "OUT", str(tmp_path / "wide"))
    with pytest.raises(ValueError, match="--model: .* is a roberta, and .* belongs to a bert"):
        import_adapter(FIXTURES / "bert-lora", tmp_path / "OUT", backbone_of("roberta-lora"))


def test_a_file_that_would_run_code_is_refused(copied, tmp_path):
    folder = copied("bert-prefix")
    torch.save({"a": pathlib.PurePosixPath("x")}, folder / "pytorch_adapter.bin")
    assert "pytorch_adapter.bin cannot be read" in reasons("bert-prefix", folder, tmp_path)


def test_the_command_prints_what_loads_the_result(tmp_path, capsys):
    words = [str(FIXTURES / "roberta-unipelt"), "--output", str(tmp_path / "OUT")]
    words += ["--model", backbone_of("roberta-unipelt")]
    assert main(["import-adapters", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "submodules: adapter, prefix, lora; gates: learned"
    assert lines[1] == "labels: LABEL_0, LABEL_1, LABEL_2"
    names: dict = {}
    exec("\n".join(line.strip() for line in lines[3:]), names)
    inputs = load_file(FIXTURES / "roberta-unipelt" / "expected.safetensors")
    expected = inputs.pop("logits")
    assert (outputs(names["model"].eval(), inputs) - expected).abs().max() < 1e-5


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    def refused(folder: pathlib.Path) -> str:
        words = [str(folder), "--output", str(tmp_path / "OUT")]
        assert main(["import-adapters", *words]) == 2
        first, problem = capsys.readouterr().err.splitlines()
        assert first == "error: 1 problem:"
        return problem

    (tmp_path / "all").mkdir()
    shutil.copytree(FIXTURES / "bert-lora", tmp_path / "all" / "task")
    assert "has no adapter_config.json; its subfolders task have one" in refused(tmp_path / "all")
    assert "--model: there is no folder tiny/bert here" in refused(FIXTURES / "bert-lora")
    (tmp_path / "OUT").mkdir()
    assert "--output:" in refused(FIXTURES / "bert-lora")


def _not_finite(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * float("nan")


def _short(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten()[:1].clone()


@pytest.mark.parametrize(
    ("ending", "change", "problem"),
    [
        ("query.loras.task.lora_A", _not_finite, "NaN or infinity"),
        ("prefix_gates.task.weight", _short, "do not fit together"),
        ("self_prefix.control_trans.0.weight", _short, "do not fit together"),
        ("self_prefix.control_trans.0.bias", _short, "do not fit together"),
    ],
)
def test_damaged_tensors_are_refused(ending, change, problem, copied, tmp_path):
    folder = copied("bert-unipelt")
    path = folder / "pytorch_adapter.bin"
    tensors = torch.load(path, weights_only=True)
    names = [name for name in tensors if name.endswith(ending)]
    assert names
    torch.save(tensors | {name: change(tensors[name]) for name in names}, path)
    with pytest.raises(ConfigError, match=problem):
        convert("bert-unipelt", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "reason"), [("x" * 248, "File name too long"), ("file/out", "File exists")]
)
def test_an_output_that_cannot_be_written_is_named_and_not_its_temporary_folder(
    name, reason, tmp_path
):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as error:
        convert("bert-lora", FIXTURES / "bert-lora", tmp_path / name)
    assert str(error.value) == f"--output: {tmp_path / name} cannot be written: {reason}"


def test_a_full_disk_leaves_nothing_of_a_conversion(tmp_path, monkeypatch):
    def save(tensors, path, metadata):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("scaleup.export.adapterhub.convert.save_file", save)
    with pytest.raises(ConfigError, match="--output: .*/out cannot be written: No space left"):
        convert("bert-lora", FIXTURES / "bert-lora", tmp_path / "out")
    assert not list(tmp_path.iterdir())
