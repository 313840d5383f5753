"""Exports of a run are verified, and what fails is not kept."""

import csv
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from scaleup import errors
from scaleup.cli import main
from scaleup.errors import CheckpointError, ConfigError
from scaleup.export import calibrate, export, inputs
from scaleup.export.evaluation import Evaluation
from scaleup.export.folder import FolderWriter
from scaleup.export.report import ExportOptions
from scaleup.unipelt import submodules
from scaleup.unipelt.submodule import Submodule
from tests.utils.workspace import ROOT, environment, make_workspace, overrides

OLD_FORMAT = ROOT / "tests" / "fixtures" / "format_0_1"
KEYS = ["kind", "checkpoint", "backbone", "gates", "remote_code", "dtype", "calibration", "bytes"]
KEYS += ["peak_memory_mib", "versions", "proof"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    """A finished run of BERT."""
    folder = make_workspace(tmp_path_factory.mktemp("export"))
    words = overrides(
        folder,
        folder / "run",
        "train.max_steps=6",
        "train.eval_strategy=steps",
        "train.eval_steps=3",
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), *words],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def options(workspace: pathlib.Path, kind: str, **changes) -> ExportOptions:
    fields = {"checkpoint": workspace / "run" / "best", "output": workspace / f"out-{kind}"}
    return ExportOptions(kind=kind, **(fields | changes))


class Reached(Exception):
    """Ends an export before its processes start."""


def test_updates_are_also_fitted_to_rows_that_the_run_left_out(workspace, monkeypatch):
    found: list[Evaluation] = []

    def stop(evaluation, *args, **kwargs):
        found.append(evaluation)
        raise Reached

    monkeypatch.setattr(Evaluation, "measure_trained", stop)
    with pytest.raises(Reached):
        export.run(options(workspace, "plain"), print)
    (evaluation,) = found

    def counted(rows) -> Counter:
        return Counter(evaluation.tokenizer.decode(ids) for ids in rows["input_ids"])

    few, unused = evaluation.unused_rows(5), evaluation.unused_rows(1000)
    used = counted(evaluation.examples.train) + counted(evaluation.examples.dev)
    with (workspace / "train.csv").open(newline="") as file:
        texts = [evaluation.tokenizer(row["text"])["input_ids"] for row in csv.DictReader(file)]
    left = counted({"input_ids": texts}) - used
    assert counted(few) <= counted(unused) <= left and len(few) == 5
    assert unused.num_rows == left.total() - 1 == 120 - 64 - 32 - 1


def test_a_run_on_several_files_is_exported_unless_one_of_them_has_changed(
    workspace, tmp_path, monkeypatch
):
    header, *lines = (workspace / "train.csv").read_text().splitlines(keepends=True)
    for name, part in (("a", lines[:60]), ("b", lines[60:])):
        (tmp_path / f"{name}.csv").write_text("".join([header, *part]))
    sources = f"[{{file: {tmp_path}/a.csv}}, {{file: {tmp_path}/b.csv}}]"
    words = overrides(workspace, tmp_path / "run", f"data.sources={sources}", "train.max_steps=2")
    words = [word for word in words if not word.startswith("data.train_file")]
    assert main(["train", *words]) == 0

    def stop(*args, **kwargs):
        raise Reached

    monkeypatch.setattr(Evaluation, "measure_trained", stop)
    chosen = options(tmp_path, "merged")
    with pytest.raises(Reached):
        export.run(chosen, print)
    (tmp_path / "a.csv").write_text("".join([header, *lines[:59], "warm film,good,1\n"]))
    with pytest.raises(ConfigError, match="the run's train data has changed since training"):
        export.run(chosen, print)


@pytest.mark.parametrize("kind", ["exact", "standalone", "merged"])
def test_an_export_equals_the_trained_model_in_a_new_process(workspace, kind):
    report = export.run(options(workspace, kind), print)
    content = json.loads((workspace / f"out-{kind}" / "export.json").read_text())
    assert report.to_json() == content and list(content) == KEYS
    proof = report.proof
    assert proof.reload_difference < 1e-5
    if kind != "merged":
        assert proof.logit_difference["max"] < 1e-6 and proof.agreement == 1.0
    assert proof.metric.before == pytest.approx(
        100 * json.loads((workspace / "run" / "results.json").read_text())["dev"]["accuracy"],
        abs=1e-3,
    )
    card = (workspace / f"out-{kind}" / "README.md").read_text()
    assert "good" in card and f"{proof.metric.after:.2f}" in card
    if kind == "merged":
        gates = {(gate.site, gate.part): gate.mean for gate in report.calibration.gates}
        trained = json.loads((workspace / "run" / "results.json").read_text())["gates"]
        for site, parts in trained.items():  # the run counted them over the same examples
            for part, value in parts.items():
                assert gates[site, part] == pytest.approx(value["mean"], abs=1e-5)


PLAIN = """
import json, sys
sys.modules["scaleup"] = None
import torch, transformers
from peft import PeftModel

kind, folder, backbone = sys.argv[1:]
cls = transformers.AutoModelForSequenceClassification
model = cls.from_pretrained(folder if kind == "plain" else backbone, num_labels=2)
if kind == "lora":
    model = PeftModel.from_pretrained(model, folder)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
batch = tokenizer(["fine film", "poor plot"], padding=True, return_tensors="pt")
with torch.no_grad():
    print(json.dumps([type(model).__name__, model.eval()(**batch).logits.tolist()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_an_export_that_absorbs_unipelt_needs_no_code_of_its_own(workspace, kind):
    """The stand-in for other people's engines: transformers and PEFT as they are."""
    chosen = options(workspace, kind, examples=64, epochs=1, rank=8, max_metric_drop=100.0)
    report = export.run(chosen, print)
    folder = workspace / f"out-{kind}"
    content = json.loads((folder / "export.json").read_text())
    assert report.to_json() == content and list(content) == [*KEYS, "absorption"]
    assert report.gates == "absorbed" and report.absorption.examples == 64
    assert 0 < sum(report.absorption.unexplained.values()) < len(report.absorption.unexplained)
    assert report.proof.reload_difference < 1e-4
    assert not [path for path in folder.iterdir() if path.suffix == ".py"]
    backbone = report.backbone["name"]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, kind, str(folder), backbone],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    name, logits = json.loads(done.stdout.splitlines()[-1])
    assert name.startswith("Bert" if kind == "plain" else "PeftModel")
    assert len(logits) == 2 and logits[0] != logits[1]
    card = (folder / "README.md").read_text()
    assert "import scaleup" not in card and "trust_remote_code" not in card


@pytest.mark.slow
def test_an_adapter_loads_on_a_backbone_with_a_head_of_another_size(workspace):
    """The files of this BART have a head for three classes, and the run has two."""
    words = overrides(workspace, workspace / "bart-run", "train.max_steps=2", family="bart")
    assert main(["train", *words]) == 0
    folder = workspace / "out-bart"
    chosen = options(workspace, "lora", examples=8, epochs=0, rank=2, max_metric_drop=100.0)
    best = workspace / "bart-run" / "best"
    export.run(dataclasses.replace(chosen, checkpoint=best, output=folder), print)
    code = (folder / "README.md").read_text().split("```")[1].removeprefix("python\n")
    exec(code.replace("THIS FOLDER", str(folder)), loaded := {})
    head = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.classification_head.out_proj.weight"
    used = loaded["model"].get_base_model().classification_head.modules_to_save["default"]
    assert torch.equal(used.out_proj.weight, head[name])


@pytest.mark.parametrize("dtype", [None, pytest.param("float32", marks=pytest.mark.slow)])
def test_a_run_in_bfloat16_is_exported_and_verified_as_stored_or_in_float32(
    workspace, tmp_path, dtype
):
    """Runs on a GPU are in bfloat16 by default."""
    run = shutil.copytree(
        workspace / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*")
    )
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("bf16: auto", "bf16: true"))
    assert "bf16: true" in (run / "config.yaml").read_text()
    manifest = json.loads((run / "best" / "manifest.json").read_text())
    assert manifest["backbone"]["dtype"] == "float32"
    manifest["backbone"]["dtype"] = "bfloat16"
    (run / "best" / "manifest.json").write_text(json.dumps(manifest))
    paths = {"checkpoint": run / "best", "output": tmp_path / "out"}
    report = export.run(options(workspace, "standalone", **paths, dtype=dtype), print)
    assert report.dtype == (dtype or "bfloat16")
    if dtype is None:
        assert report.proof.logit_difference["max"] < 1e-2
    else:
        assert report.proof.reload_difference < 1e-5 < report.proof.logit_difference["max"]


def test_a_pipeline_classifies_where_neither_scaleup_nor_peft_exists(workspace):
    out = workspace / "out-merged"
    if not out.exists():
        export.run(options(workspace, "merged", verify=False), print)
    code = (
        "import sys, json; sys.modules['scaleup'] = sys.modules['peft'] = None\n"
        "from transformers import pipeline\n"
        f"classify = pipeline('text-classification', {str(out)!r}, trust_remote_code=True)\n"
        "print(json.dumps(classify(['fine film', 'poor plot'])))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {row["label"] for row in json.loads(done.stdout.splitlines()[-1])} <= {"good", "bad"}


@pytest.mark.parametrize("drop, allowed", [(3.2, 1.0), (3.2, 5.0)])
def test_an_export_that_loses_too_much_keeps_nothing(workspace, monkeypatch, drop, allowed):
    measured = calibrate.TrainedMeasurements(
        logits=torch.tensor([[1.0, 0.0]] * 32),
        written=[],
        loss=None,
        seconds=[1.0],
        peak_mib=1.0,
        dtype="float32",
    )
    scores = iter([90.0, 90.0 - drop])
    monkeypatch.setattr(Evaluation, "run_process", lambda *args: measured)
    monkeypatch.setattr(Evaluation, "score", lambda *args: next(scores))
    chosen = options(
        workspace,
        "exact",
        output=workspace / f"lost-{allowed:g}",
        calibrate="test",
        max_metric_drop=allowed,
    )
    if drop > allowed:
        with pytest.raises(errors.ExportError, match="went from 90.00 to 86.80"):
            export.run(chosen, print)
    else:
        export.run(chosen, print)
    assert [path.name for path in workspace.glob("*lost*")] == (
        [] if drop > allowed else [f"lost-{allowed:g}"]
    )


@pytest.mark.slow
def test_what_a_killed_export_leaves_is_removed_by_the_next_one(workspace, tmp_path):
    temporary, output = tmp_path / "tmp", tmp_path / "out"
    temporary.mkdir()
    words = ["export", "--checkpoint", str(workspace / "run" / "best"), "--output", str(output)]
    process = subprocess.Popen(
        [sys.executable, "-m", "scaleup", *words],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(TMPDIR=str(temporary)),
        cwd=ROOT,
    )
    assert process.stderr is not None
    assert any("measuring" in line for line in process.stderr)
    process.kill()
    process.wait()
    assert not list(temporary.glob("scaleup*")) and not output.exists()
    assert [path.name for path in tmp_path.iterdir() if path != temporary] == [".out.draft"]
    assert main(words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tmp"]
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


def test_a_full_disk_is_one_sentence(workspace, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    chosen = options(workspace, "exact", output=workspace / "full", verify=False)
    with pytest.raises(errors.ExportError, match="full could not be written: No space left"):
        export.run(chosen, print)
    assert not list(workspace.glob("*full*"))


def test_an_export_whose_logits_differ_after_loading_is_not_kept(workspace, monkeypatch):
    write = FolderWriter.write_weights

    def damaged(writer, *args):
        size = write(writer, *args)
        path = writer.folder / "model.safetensors"
        save_file(
            {name: tensor + 0.1 for name, tensor in load_file(path).items()},
            path,
            metadata={"format": "pt"},
        )
        return size

    monkeypatch.setattr(FolderWriter, "write_weights", damaged)
    with pytest.raises(
        errors.ExportError, match="in a new process, the logits of the export differ"
    ):
        export.run(options(workspace, "standalone", output=workspace / "differs"), print)
    assert not list(workspace.glob("*differs*"))


def test_problems_with_the_checkpoint_are_reported_before_anything_is_loaded(workspace, tmp_path):
    with pytest.raises(ConfigError, match="no folder") as several:
        export.run(
            options(workspace, "exact", checkpoint=tmp_path / "none", output=workspace / "run"),
            print,
        )
    assert len(several.value.problems) == 2
    with pytest.raises(ConfigError, match="config.yaml"):
        (tmp_path / "alone").mkdir()
        export.run(
            options(workspace, "exact", checkpoint=tmp_path / "alone", output=tmp_path / "out"),
            print,
        )
    with pytest.raises(CheckpointError, match="not a finished checkpoint"):
        export.run(
            options(
                workspace,
                "exact",
                checkpoint=workspace / "bert",
                config=workspace / "run" / "config.yaml",
                output=tmp_path / "out",
            ),
            print,
        )
    with pytest.raises(ConfigError, match="not the backbone that was trained on"):
        export.run(
            options(workspace, "exact", backbone=str(workspace / "bart"), output=tmp_path / "out"),
            print,
        )
    assert not list(tmp_path.glob("*out*"))


def test_a_submodule_from_outside_of_the_package_is_refused(tmp_path, monkeypatch):
    class Outside(Submodule):
        name = "outside"

    monkeypatch.setattr(submodules, "SUBMODULES", dict(submodules.SUBMODULES))
    monkeypatch.setattr(inputs, "SUBMODULES", submodules.SUBMODULES)
    submodules.register(Outside())
    checkpoint = shutil.copytree(OLD_FORMAT / "best", tmp_path / "best")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["method"]["submodules"].append("outside")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(inputs, "load_trained", None)  # raises TypeError if it is called
    config = OLD_FORMAT / "run" / "config.yaml"
    for kind in ("exact", "standalone", "merged"):
        refused = ExportOptions(checkpoint, kind, tmp_path / "out", config=config)
        with pytest.raises(ConfigError, match="uses outside, which is not a submodule of scaleup"):
            export.run(refused, print)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--prune", "0.1"], "--prune: has no effect with --kind exact"),
        (
            ["--kind", "standalone", "--examples", "5"],
            "--examples: has no effect with --kind standalone",
        ),
        (["--dtype", "bfloat16"], "--dtype: has no effect with --kind exact"),
        (["--no-verify", "--max-metric-drop", "2"], "nothing is scored"),
        (["--calibrate", "nowhere.csv"], "neither dev, test nor a file"),
        (
            ["--kind", "merged", "--max-shard-size", "many"],
            "--max-shard-size: many is not an amount of memory",
        ),
    ],
)
def test_arguments_without_meaning_are_refused(tmp_path, capsys, words, message):
    arguments = ["export", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main([*arguments, *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_export_of_a_model_larger_than_the_memory_equals_the_trained_model(workspace):
    out = workspace / "out-offloaded"
    words = ["--checkpoint", str(workspace / "run" / "best"), "--kind", "merged", "--output"]
    assert main(["export", *words, str(out), "--max-memory", "0.03MB"]) == 0
    content = json.loads((out / "export.json").read_text())
    whole = export.run(options(workspace, "merged", output=workspace / "out-whole"), print)
    proof = content["proof"]
    assert proof["reload_difference"] < 1e-5
    assert proof["logit_difference"]["max"] == pytest.approx(
        whole.proof.logit_difference["max"], abs=1e-5
    )
    assert [gate["mean"] for gate in content["calibration"]["gates"]] == pytest.approx(
        [gate.mean for gate in whole.calibration.gates], abs=1e-5
    )


def test_an_export_can_be_scored_with_another_metric(workspace, capsys):
    out = workspace / "out-f1"
    words = ["--checkpoint", str(workspace / "run" / "best"), "--output", str(out)]
    assert main(["export", *words, "--metric", "f1"]) == 0
    metric = json.loads((out / "export.json").read_text())["proof"]["metric"]
    assert metric["name"] == "f1" and metric["before"] == metric["after"] >= 0
    capsys.readouterr()
    words[-1] += "-bleu"
    assert main(["export", *words, "--metric", "bleu"]) == 2
    assert (
        "--metric: bleu does not fit data.task sequence_classification" in capsys.readouterr().err
    )
