"""Gates of finished runs, by layer, class and example."""

import csv
import json
import pathlib
import shutil
import statistics

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AlbertConfig, AlbertForSequenceClassification

from scaleup.backbone import loading as backbone
from scaleup.backbone import weights
from scaleup.backbone.lengths import fit_length
from scaleup.backbone.method import load_run_model
from scaleup.backbone.tokenizer import load_tokenizer
from scaleup.data import classification as data
from scaleup.data import tasks
from scaleup.errors import ConfigError
from scaleup.experiments import gate_values, gates, results
from scaleup.settings import schema as config
from scaleup.settings.data import DataSettings
from scaleup.training import checkpoint
from scaleup.training.manifest import Manifest
from scaleup.unipelt.gate import GateMoments, LearnedGate
from tests.utils.finished_runs import leave_run, squeeze
from tests.utils.workspace import make_workspace


@pytest.fixture(scope="module")
def gated(tmp_path_factory) -> pathlib.Path:
    """Leave folders of gated runs without training.

    The gates are random. Their statistics over the dev set come from GateMoments. `albert` calls
    its one layer three times.
    """
    folder = tmp_path_factory.mktemp("gated")
    workspace = make_workspace(folder)
    albert = AlbertConfig(
        vocab_size=1000,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
    )
    shutil.copytree(workspace / "bert", workspace / "albert")
    AlbertForSequenceClassification(albert).save_pretrained(workspace / "albert")
    for name in ("one", "other", "albert"):
        out = folder / name / "run" if name == "albert" else folder / name
        model_name = "albert" if name == "albert" else "bert"
        overrides = [
            f"model.name={workspace / model_name}",
            f"data.train_file={workspace / 'train.csv'}",
            f"data.test_file={workspace / 'test.csv'}",
        ]
        overrides += [
            "data.k=64",
            "data.dev_size=32",
            "method.prefix_hidden_size=16",
            f"train.output_dir={out}",
        ]
        settings = config.load(None, overrides)
        found = backbone.load_config(settings.model)
        settings = fit_length(settings, found)
        examples = data.load(settings.data)
        tokenizer = load_tokenizer(settings.model, found)
        auto = tasks.of(settings.data).auto
        model = load_run_model(settings, found, auto, examples.labels, torch.device("cpu")).eval()
        torch.manual_seed(len(name))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.3)
        learned = {
            key.removeprefix("base_model.model.").split(".unipelt_")[0]: m
            for key, m in model.named_modules()
            if isinstance(m, LearnedGate)
        }
        for gate in learned.values():
            gate.statistics = GateMoments(len(gate.names), gate.bias.device)
        encoded = data.tokenize(examples, tokenizer, settings.data).dev
        with torch.no_grad():
            for row in encoded:  # one by one
                model(
                    input_ids=torch.tensor([row["input_ids"]]),
                    attention_mask=torch.tensor([row["attention_mask"]]),
                )
        drained = {
            site: {
                part: {"mean": m, "std": s}
                for part, (m, s) in zip(gate.names, GateMoments.moments(gate.statistics.take()))
            }
            for site, gate in learned.items()
        }
        draft = checkpoint.create_staging_folder(out / "best")
        model.save_pretrained(draft)
        checkpoint.commit_checkpoint(
            draft,
            out / "best",
            checkpoint.expected_tensors(model),
            Manifest(
                method=settings.dump()["method"],
                backbone={
                    "name": settings.model.name,
                    "revision": None,
                    "quantization": "none",
                    "fingerprint": weights.fingerprint(settings.model.name, None),
                },
                task=examples.task,
                labels=examples.labels,
                data=data.provenance(examples),
                run={"processes": 1, "zero_stage": 0},
            ),
        )
        (out / "config.yaml").write_text(config.to_yaml(settings))
        results = {
            "task": "sequence_classification",
            "metric": "accuracy",
            "test": {"accuracy": 0.5},
            "dev": {"accuracy": 0.5},
            "test_is_dev": False,
            "method": settings.dump()["method"],
            "gates": drained,
            "seeds": {"data": 0, "train": 42},
            "examples": {"train": 64},
            "parameters": {"stored": 1, "stored_percent": 1.0},
        }
        (out / "results.json").write_text(json.dumps(results))
    return folder


def test_a_pass_over_the_dev_set_gives_the_statistics_of_the_run(gated):
    run = results.read(gated / "one" / "results.json")
    own, passed = gate_values.from_results(run, "one"), gate_values.from_pass(run, "one", "dev")
    assert list(own.mean.index) == list(passed.mean.index) == ["layer 0", "layer 1", "layer 2"]
    assert list(own.mean.columns) == list(passed.mean.columns) == ["adapter", "prefix", "lora"]
    assert np.allclose(own.mean, passed.mean, atol=1e-5) and np.allclose(
        own.std, passed.std, atol=1e-4
    )
    assert passed.each.shape == (32, 3, 3) and passed.std.to_numpy().min() > 1e-4
    written = run.results["gates"]
    assert own.mean.iloc[1, 2] == written["bert.encoder.layer.1.attention.self"]["lora"]["mean"]
    assert own.std.iloc[2, 0] == written["bert.encoder.layer.2.output.LayerNorm"]["adapter"]["std"]


def test_another_backbone_or_other_data_are_refused(gated, tmp_path):
    workspace = shutil.copytree(gated / "one", tmp_path / "one") and tmp_path
    for name in ("bert", "train.csv", "test.csv"):
        source = next(path for path in (gated, *gated.iterdir()) if (path / name).exists()) / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, workspace / name)
    config = workspace / "one" / "config.yaml"
    was = yaml.safe_load(config.read_text())
    moved = {
        "model": {"name": str(workspace / "bert")},
        "data": {
            key: str(workspace / f"{key.partition('_')[0]}.csv")
            for key in ("train_file", "test_file")
        },
    }
    config.write_text(
        yaml.safe_dump({name: values | moved.get(name, {}) for name, values in was.items()})
    )
    run = results.read(workspace / "one" / "results.json")
    gate_values.from_pass(run, "one", "dev")  # the same under another path
    rows = (workspace / "train.csv").read_text().splitlines(keepends=True)
    (workspace / "train.csv").write_text("".join(rows[:-1]))
    with pytest.raises(ConfigError, match="the run's data has changed since"):
        gate_values.from_pass(run, "one", "dev")
    shape = workspace / "bert" / "config.json"
    shape.write_text(json.dumps(json.loads(shape.read_text()) | {"layer_norm_eps": 0.5}))
    with pytest.raises(ConfigError, match="is not the backbone that was trained on"):
        gate_values.from_pass(run, "one", "dev")


def test_gates_by_class_and_example_are_those_of_the_right_examples(gated):
    view = gate_values.from_pass(results.read(gated / "one" / "results.json"), "one", "dev")
    good = [
        any(word in text.split() for word in ("fine", "great", "warm", "bright"))
        for text in view.texts
    ]
    assert [label == "good" for label in view.labels] == good and view.classes == ["bad", "good"]
    by_hand = sum(view.each[i] for i in range(32) if good[i]) / sum(good)
    assert np.allclose(view.of_class("good")[0], by_hand) and not np.allclose(
        view.of_class("bad")[0], by_hand, atol=1e-4
    )
    longest, shortest = (
        choose(range(32), key=lambda i: len(view.texts[i].split())) for choose in (max, min)
    )
    alone = gate_values.from_pass(results.read(gated / "one" / "results.json"), "one", "train")
    assert alone.each.shape[0] == 64 and not np.allclose(
        view.each[longest], view.each[shortest], atol=1e-4
    )


def test_a_layer_that_is_called_many_times_has_the_mean_over_its_calls(gated):
    run = results.read(gated / "albert" / "run" / "results.json")
    own, passed = (
        gate_values.from_results(run, "albert"),
        gate_values.from_pass(run, "albert", "dev"),
    )
    assert passed.each.shape[0] == 32 and np.allclose(own.mean, passed.mean, atol=1e-5)


def test_different_backbones_of_runs_are_noted(gated, tmp_path):
    for other, count in ((gated / "other", 0), (gated / "albert" / "run", 1)):
        screen = gates.report([str(gated / "one"), str(other)], None, tmp_path / "out")
        assert (
            sum(line.startswith("The runs have different backbones: one ") for line in screen)
            == count
        )


def test_runs_with_the_same_name_are_shown_with_their_folders(gated, tmp_path):
    shutil.copytree(gated / "one", tmp_path / "one", ignore=shutil.ignore_patterns("best"))
    screen = gates.report([str(gated / "one"), str(tmp_path / "one")], None, tmp_path / "out")
    text = (tmp_path / "out" / "gates.md").read_text()
    assert (
        f"## {tmp_path / 'one'}: " in text
        and f" minus {gated / 'one'}: " in text
        and "No view by class or example: --run: " in screen[-2]
    )


def test_a_run_that_generates_text_shows_its_statistics_only(gated, tmp_path):
    shutil.copytree(gated / "one", tmp_path / "one")
    settings = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    settings["data"] |= {"task": "causal_lm", "target_column": "label", "label_column": None}
    (tmp_path / "one" / "config.yaml").write_text(yaml.safe_dump(settings))
    screen = gates.report([str(tmp_path / "one")], None, tmp_path / "out")
    assert (tmp_path / "out" / "gates.png").is_file() and "No view by class or example" in screen[
        -2
    ]


def test_the_examples_of_another_file_can_be_examined(gated, tmp_path):
    run = results.read(gated / "one" / "results.json")
    view = gate_values.from_pass(run, "one", "dev")
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["text", "label"],
                [view.texts[3], "good"],
                [view.texts[9], "bad"],
                [view.texts[3], "bad"],
            ]
        )
    mine = gate_values.from_pass(run, "one", str(tmp_path / "mine.csv"))
    assert np.allclose(mine.each, view.each[[3, 9, 3]], atol=1e-5) and mine.labels == [
        "good",
        "bad",
        "bad",
    ]
    with pytest.raises(
        ConfigError, match="--data: there is no file none.csv; it takes train, dev, test or a file"
    ):
        gate_values.from_pass(run, "one", "none.csv")
    (tmp_path / "other.csv").write_text("words,label\nfine,good\n")
    with pytest.raises(ConfigError, match="--data: .*other.csv has no column 'text'") as caught:
        gate_values.from_pass(run, "one", str(tmp_path / "other.csv"))
    assert len(caught.value.problems) == 1


def test_the_gate_report_has_every_view_and_compares_two_runs(gated, tmp_path):
    screen = gates.report([str(gated / "one"), str(gated / "other")], None, tmp_path)
    names = {
        "gates.md",
        "gates.csv",
        "gates.png",
        "gates_classes.png",
        "gates_examples.csv",
        "gates_examples.png",
        "gates_difference.png",
    }
    assert {path.name for path in tmp_path.iterdir()} == names and all(
        name in screen[-1] for name in names
    )
    one, other = (
        gate_values.from_results(results.read(gated / name / "results.json"), name)
        for name in ("one", "other")
    )
    text = (tmp_path / "gates.md").read_text()
    last = text[text.index(" minus ") :]
    assert f"| layer 0 | {other.mean.iloc[0, 0] - one.mean.iloc[0, 0]:+.3f} |" in squeeze(last)
    assert "### Class good" in text and "prefix, mean over layers: the 5 lowest and highest" in text
    lines = list(csv.DictReader((tmp_path / "gates_examples.csv").open()))
    assert (
        len(lines) == 2 * 32
        and len(lines[0]) == 4 + 9
        and {line["label"] for line in lines} == {"good", "bad"}
    )
    for name in ("one", "other"):
        mine = [float(line["layer 1 lora"]) for line in lines if line["run"].startswith(name)]
        assert statistics.fmean(mine) == pytest.approx(
            gate_values.from_results(results.read(gated / name / "results.json"), name).mean.iloc[
                1, 2
            ],
            abs=1e-4,
        )
    kinds = {line["examples"] for line in csv.DictReader((tmp_path / "gates.csv").open())}
    assert kinds == {"all", "good", "bad"}


def test_without_the_checkpoint_the_statistics_of_the_run_are_shown_with_a_note(gated, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("results.json", "config.yaml"):
        (tmp_path / "run" / name).write_text((gated / "one" / name).read_text())
    screen = gates.report([str(tmp_path / "run")], None, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "gates.md",
        "gates.csv",
        "gates.png",
    } and "has no best/" in screen[-2]
    with pytest.raises(ConfigError, match="has no best/, which a pass over data needs"):
        gates.report([str(tmp_path / "run")], "dev", tmp_path / "out")


def test_a_changed_checkpoint_and_a_run_without_gates_are_refused(gated, tmp_path):
    leave_run(tmp_path, "cola", 100, "ap_nogate", 0, 0.1)
    with pytest.raises(ConfigError, match=r"has no learned gates \(ap_nogate\)"):
        gates.report([str(tmp_path / "cola-100-ap_nogate-0")], None, tmp_path / "out")
    weights = gated / "other" / "best" / "adapter_model.safetensors"
    assert load_file(weights)
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-4] + b"\0\0\0\0")
        with pytest.raises(ConfigError, match="the checkpoint was altered"):
            gate_values.from_pass(results.read(gated / "other" / "results.json"), "other", "dev")
    finally:
        weights.write_bytes(kept)


def test_gates_of_two_stacks_stand_apart():
    sites = [
        ("model.encoder.layers.0.self_attn", "prefix"),
        ("model.encoder.layers.0.final_layer_norm", "adapter"),
        ("model.decoder.layers.0.self_attn", "prefix"),
        ("model.decoder.layers.0.encoder_attn", "prefix"),
        ("model.decoder.layers.0.final_layer_norm", "adapter"),
    ]
    frame, positions = gate_values.layout(sites)
    assert list(frame.index) == ["encoder 0", "decoder 0"] and list(frame.columns) == [
        "adapter",
        "prefix self_attn",
        "prefix encoder_attn",
    ]
    assert [positions[site] for site in sites] == [(0, 1), (0, 0), (1, 1), (1, 2), (1, 0)]


def test_the_gates_of_a_row_of_a_table_are_those_of_the_run(gated, tmp_path):
    results.write_csv(results.load([str(gated / "one")]), tmp_path / "runs.csv")
    gates.report([str(gated / "one")], None, tmp_path / "folder")
    gates.report([str(tmp_path / "runs.csv" / "one")], None, tmp_path / "table")
    with pytest.raises(ConfigError, match="runs.csv has no trial two"):
        gates.report([str(tmp_path / "runs.csv" / "two")], None, tmp_path / "table")
    folder, table = (
        (tmp_path / name / "gates.csv").read_text().splitlines() for name in ("folder", "table")
    )
    of_folder = [line.split(",")[-4:] for line in folder if ",all," in line]
    of_table = [line.split(",")[-4:] for line in table if ",all," in line]
    assert [line[:2] for line in of_folder] == [line[:2] for line in of_table]
    for one, other in zip(of_folder, of_table):
        assert float(one[2]) == pytest.approx(float(other[2]), abs=1e-5)


def test_a_file_with_the_columns_of_a_glue_task_can_be_examined(tmp_path):
    rows = "".join(f"a film,a movie {i},{i % 6}\n" for i in range(12))
    (tmp_path / "pairs.csv").write_text(f"sentence1,sentence2,label\n{rows}")
    settings = DataSettings(name="stsb", k=8, dev_size=2)
    examples, split = gate_values._examples(settings, str(tmp_path / "pairs.csv"))
    chosen = getattr(examples, split)
    assert len(chosen) == 12 and examples.labels is None
    assert (chosen["text"][3], chosen["text_pair"][3], chosen["label"][3]) == (
        "a film",
        "a movie 3",
        3.0,
    )
