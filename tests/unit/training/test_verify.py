"""Whatever was added to a checkpoint, left out of it or changed in it is named and refused."""

import json
import os
import pathlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from scaleup.errors import CheckpointError, ConfigError
from scaleup.settings import schema
from scaleup.training.checkpoint import check_tensors, verify
from scaleup.training.manifest import Manifest, _hash, setting_hashes
from scaleup.training.run_settings import load_trained
from tests.utils.altered import rehash
from tests.utils.tiny import adapt, backbone
from tests.utils.workspace import ROOT

OLD = ROOT / "tests" / "fixtures" / "format_0_1"


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A checkpoint that was left by an earlier version."""
    return shutil.copytree(OLD / "best", tmp_path / "best")


@pytest.mark.parametrize(
    "name",
    [
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "tokenizer_code.py",
        "adapter_model.bin",
        "nested/adapter_model.safetensors",
        "README.md",
    ],
)
def test_a_file_that_the_manifest_does_not_list_is_refused_by_name(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{name} is not listed in manifest.json; remove it"):
        verify(folder)


def test_a_second_file_cannot_hide_changed_tensors(folder):
    """PEFT reads adapter_model.safetensors only; the hashes must not be those of another file."""
    path = folder / "adapter_model.safetensors"
    shutil.copy(path, folder / "zzz.safetensors")
    save_file({name: t + 1 for name, t in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match="zzz.safetensors: has .* as another file has"):
        verify(folder)


def test_a_file_without_tensors_is_refused(folder):
    save_file({}, folder / "empty.safetensors")
    with pytest.raises(CheckpointError, match="empty.safetensors: has no tensors"):
        verify(folder)


@pytest.mark.parametrize("name", ["tokenizer_x", "tokenizer.json", "manifest.json", "folder"])
def test_a_symbolic_link_is_refused_by_name(folder, name):
    target = "/etc" if name == "folder" else "/etc/passwd"
    if name in ("tokenizer.json", "manifest.json"):  # the link leads to the very same content
        target = folder.parent / name
        (folder / name).rename(target)
    (folder / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=f"{name} is a symbolic link; remove it"):
        verify(folder)


@pytest.mark.parametrize("name", ["tokenizer_x", "adapter_model.safetensors"])
def test_a_pipe_is_refused_at_once(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"{name} is not a plain file"):
        verify(folder)


def test_files_that_operating_systems_add_are_ignored(folder):
    for name in (".DS_Store", "._adapter_model.safetensors", "Thumbs.db", ".nfs0001", ".git/HEAD"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert verify(folder).labels == ["bad", "good"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("backbone"), "backbone: Field required"),
        (lambda m: m["backbone"].pop("fingerprint"), "backbone.fingerprint: Field required"),
        (lambda m: m.update(backbone=[1]), "backbone: "),
        (lambda m: m.update(method={}), "method.name: Field required"),
        (lambda m: m.update(method={"name": "unipelt"}), "method has no submodules"),
        (lambda m: m["method"].update(name="other"), "method.name: "),
        (lambda m: m["method"].update(submodules=7), "method.submodules: "),
        (lambda m: m.update(labels=[1, 2]), "labels.0: "),
        (lambda m: m.update(data=[{}]), "data.0.split: Field required"),
        (lambda m: m.update(run={"processes": "1"}), "run.processes: "),
        (lambda m: m["tensors"].update(x={}), "tensors.x.shape: Field required"),
        (lambda m: m["files"].update(x=None), "files.x: "),
        (lambda m: m.update(files=3), "files: "),
        (lambda m: m.update(more=1), "unknown entry more"),
        (lambda m: m.update(format_version=[2] * 999), "format version"),
    ],
)
def test_a_manifest_with_missing_or_wrong_entries_is_refused_in_one_line(folder, change, words):
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=words) as caught:
        verify(folder)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message and len(message) < 1000


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"{", b"[]", b"[" * 100_000], ids=["utf-8", "cut", "list", "deep"]
)
@pytest.mark.parametrize("name", ["manifest.json", "adapter_config.json"])
def test_a_manifest_or_adapter_config_that_is_no_mapping_is_refused(folder, name, content):
    (folder / name).write_bytes(content)
    if name != "manifest.json":
        rehash(folder)
    with pytest.raises(CheckpointError, match=f"{name}: .*the checkpoint was altered"):
        verify(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("peft_type"), "peft_type is not UNIPELT"),
        (lambda c: c.update(peft_type="LORA"), "peft_type is not UNIPELT"),
        (lambda c: c.update(peft_type=["UNIPELT"]), "peft_type is not UNIPELT"),
        (lambda c: c.update(submodules=["lora"]), "submodules is .'lora'. here"),
        (lambda c: c.update(submodules=[["lora"]]), "submodules must name"),
        (lambda c: c.update(r=8), "r is 8 here and 4 in manifest.json"),
        (lambda c: c.update(r="many"), "r has the wrong type"),
        (lambda c: c.pop("r"), "r is 8 here and 4 in manifest.json"),
        (lambda c: c.update(gates="none"), "gates is 'none' here"),
        (lambda c: c.update(modules_to_save=[1]), "modules_to_save is not a list of names"),
        (lambda c: c.update(modules_to_save="all"), "modules_to_save is not a list of names"),
        (lambda c: c.update(task_type="JAZZ"), "task type"),
        (lambda c: c.update(megatron_config={}, megatron_core="evil"), "megatron_config"),
        (lambda c: c.update(loftq_config=3), "loftq_config has the wrong type"),
        (lambda c: c.update(runtime_config=3), "runtime_config has the wrong type"),
    ],
)
def test_an_adapter_config_with_missing_or_wrong_entries_is_refused(folder, change, words):
    content = json.loads((folder / "adapter_config.json").read_text())
    change(content)
    (folder / "adapter_config.json").write_text(json.dumps(content))
    rehash(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        verify(folder)
    assert "adapter_config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_checkpoint_without_its_config_is_refused(folder):
    (folder / "adapter_config.json").unlink()
    rehash(folder)
    with pytest.raises(CheckpointError, match="adapter_config.json: there is no such file"):
        verify(folder)


def test_tensors_are_compared_with_those_that_the_model_needs():
    model = adapt(backbone("bert"))
    tensors = {name: list(t.shape) for name, t in _state(model).items()}
    name = sorted(tensors)[0]
    check_tensors(pathlib.Path("best"), _manifest(tensors), model)
    with pytest.raises(CheckpointError, match="is missing, and the model needs"):
        check_tensors(pathlib.Path("best"), _manifest({}), model)
    with pytest.raises(CheckpointError, match=r"has the shape \[9\], and the model needs"):
        check_tensors(pathlib.Path("best"), _manifest(tensors | {name: [9]}), model)
    with pytest.raises(CheckpointError, match="the model has no place for base_model.x"):
        check_tensors(pathlib.Path("best"), _manifest(tensors | {"base_model.x": [1]}), model)


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _manifest(shapes: dict[str, list[int]], **changes) -> Manifest:
    tensors = {name: {"shape": shape} for name, shape in shapes.items()}
    fields = {"backbone": {}, "task": "", "labels": None, "data": [], "run": {}, "tensors": tensors}
    return Manifest(**({"method": {}} | fields | changes))


@pytest.mark.parametrize(
    "change",
    [
        "data.max_length=17",
        "data.k=32",
        "model.dtype=bfloat16",
        "model.trust_remote_code=true",
        "method.r=3",
        "train.learning_rate=0.5",
    ],
)
def test_a_changed_config_is_noticed_and_the_setting_is_named(tmp_path, change):
    path, words = tmp_path / "config.yaml", ["data.name=rte", f"model.name={OLD / 'bert'}"]
    settings = schema.load(None, words)
    manifest = _manifest({}, method=settings.dump()["method"], config=setting_hashes(settings))
    manifest = Manifest(**json.loads(manifest.to_json()))
    path.write_text(schema.to_yaml(settings))
    assert load_trained(path, manifest, [], trusted=False).dump() == settings.dump()
    path.write_text(schema.to_yaml(schema.load(None, [*words, change])))
    with pytest.raises(ConfigError, match=f"with a different {change.partition('=')[0]};"):
        load_trained(path, manifest, [], trusted=True)


def test_what_may_change_when_a_run_moves_or_continues_is_no_change(tmp_path):
    settings = schema.load(None, ["data.name=rte", "model.name=org/model"])
    manifest = _manifest({}, method=settings.dump()["method"], config=setting_hashes(settings))
    path, changes = tmp_path / "config.yaml", ["train.resume=auto", "train.num_train_epochs=9"]
    words = ["data.name=rte", f"model.name={OLD / 'bert'}", "data.path=moved", *changes]
    path.write_text(schema.to_yaml(schema.load(None, words)))
    assert load_trained(path, manifest, [], trusted=False).train.resume == "auto"


@pytest.mark.parametrize("earlier", [False, True], ids=["now", "an earlier checkpoint"])
def test_the_files_of_sources_may_move_and_their_other_settings_may_not(tmp_path, earlier):
    path, parts = tmp_path / "config.yaml", "[{file: a.csv, weight: 2}, {file: b.csv}]"
    words = [f"model.name={OLD / 'bert'}", "data.task=sequence_classification"]
    settings = schema.load(None, [*words, f"data.sources={parts}"])
    hashes = setting_hashes(settings)
    if earlier:
        hashes["data.sources"] = _hash(settings.dump()["data"]["sources"])
    manifest = _manifest({}, method=settings.dump()["method"], config=hashes)

    def load(sources: str) -> None:
        path.write_text(schema.to_yaml(schema.load(None, [*words, f"data.sources={sources}"])))
        load_trained(path, manifest, [], trusted=False)

    load(parts)
    for changed in (parts.replace("2", "3"), "[{file: a.csv, weight: 2}]"):
        with pytest.raises(ConfigError, match="with a different data.sources;"):
            load(changed)
    if not earlier:
        load(parts.replace("a.csv", "moved/a.csv"))


def test_a_setting_that_is_newer_than_the_checkpoint_must_have_its_default(tmp_path):
    settings = schema.load(None, ["data.name=rte", f"model.name={OLD / 'bert'}"])
    hashes = setting_hashes(settings)
    del hashes["data.pad_to_max_length"]
    manifest = _manifest({}, method=settings.dump()["method"], config=hashes)
    path = tmp_path / "config.yaml"
    path.write_text(schema.to_yaml(settings))
    load_trained(path, manifest, [], trusted=False)
    with pytest.raises(ConfigError, match="with a different data.pad_to_max_length;"):
        load_trained(path, manifest, ["data.pad_to_max_length=true"], trusted=False)
