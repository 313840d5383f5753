"""Exports give the logits of the trained model for every family; verification notices errors."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from scaleup import errors, unipelt
from scaleup.backbone import loading as backbones
from scaleup.cli import main
from scaleup.errors import CheckpointError, ConfigError
from scaleup.export import calibrate, export, fold
from scaleup.export import folder as ship
from scaleup.export import verify as proof
from scaleup.unipelt.sites import find_sites
from scaleup.unipelt.submodules import SUBMODULES
from tests.utils.tiny import FAMILIES, adapt, backbone, implementation, logits, same, task_type
from tests.utils.workspace import ROOT, environment, make_workspace, overrides

AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
}
families = pytest.mark.parametrize("family", FAMILIES)


class Exported:
    """A tiny model with UniPELT, its backbone's folder, and what a fold of it gives."""

    def __init__(self, family: str, folder: pathlib.Path, **config):
        self.family, self.folder = family, folder
        base = backbone(family)
        self.auto = getattr(transformers, AUTO[task_type(base)])
        base.save_pretrained(folder / "base")
        self.model = adapt(base, **config)
        self.model.save_pretrained(str(folder / "bundle"))
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
        """The folder, written and loaded again, without a tensor missing or left over."""
        config, tensors = fold.read_checkpoint(self.folder / "bundle")
        folded = fold.fold(config, tensors, self.attentions, self.blocks, gates, dropped)
        out = self.folder / "out"
        out.mkdir()
        ship.write_config(self.empty, self.auto.__name__, folded, gates is None, dtype, out, "0")
        ship.write_weights(
            self.empty,
            self.folder / "base",
            folded,
            dtype,
            torch.float32 if gates is None else dtype,
            out,
            shard_bytes,
        )
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
        ] + [(path, "adapter") for path in SUBMODULES["adapter"].paths([], self.blocks)]
        return {key: torch.rand((), generator=draw).item() for key in places}


@families
def test_a_folder_with_learned_gates_gives_the_models_own_logits(family, tmp_path):
    exported = Exported(family, tmp_path)
    expected = logits(exported.model)
    assert same(logits(exported.load(None)), expected)


@pytest.mark.parametrize(
    "family",
    [
        "bert",
        "albert",
        "deberta-v2",
        "modernbert",
        "bart",
        "mbart",
        "t5",
        "gpt2",
        "gpt_neox",
        "gemma2",
        "qwen3",
        "phi3",
    ],
)
def test_constants_folded_into_weights_equal_constants_in_the_gates(family, tmp_path):
    exported = Exported(family, tmp_path)
    gates, before = exported.random_gates(), logits(exported.model)
    dropped = {
        (exported.attentions[0].name, "prefix"),
        (SUBMODULES["adapter"].paths([], exported.blocks)[-1], "adapter"),
    }
    calibrate.freeze(exported.model, gates, dropped)
    expected = logits(exported.model)
    assert (expected - before).abs().max() > 1e-3  # the constants do matter
    assert (logits(exported.load(gates, dropped)) - expected).abs().max() < 1e-5 * max(
        1, expected.abs().max()
    )


@pytest.mark.parametrize("family", ["bert", "bart", "t5", "gpt2", "gpt_neox"])
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


def test_dropping_everything_but_lora_leaves_plain_weights(tmp_path):
    exported = Exported("bert", tmp_path)
    gates = exported.random_gates()
    exported.load(gates, {key for key in gates if key[1] in ("prefix", "adapter")})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "bert"


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "pegasus"])
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


def test_shards_hold_no_more_than_asked_and_load_as_one(tmp_path):
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
    config, tensors = fold.read_checkpoint(tmp_path / "bundle")
    assert not any(".transform." in name for name in tensors)
    save_file(
        {fold.PEFT_PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()},
        tmp_path / "bundle" / "adapter_model.safetensors",
    )
    config.save_pretrained(str(tmp_path / "bundle"))
    again = PeftModel.from_pretrained(
        exported.auto.from_pretrained(tmp_path / "base", attn_implementation="sdpa"),
        tmp_path / "bundle",
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


def options(workspace: pathlib.Path, kind: str, **more) -> export.Options:
    given = {
        "checkpoint": workspace / "run" / "best",
        "kind": kind,
        "output": workspace / f"out-{kind}",
    } | more
    return export.Options(**given)


@pytest.mark.parametrize("kind", ["exact", "standalone", "merged"])
def test_an_export_proves_itself_in_a_fresh_process(workspace, kind):
    report = export.run(options(workspace, kind), print)
    assert report == json.loads((workspace / f"out-{kind}" / "export.json").read_text())
    found = report["proof"]
    assert found["reload_difference"] < 1e-5
    if kind != "merged":
        assert found["logit_difference"]["max"] < 1e-6 and found["agreement"] == 1.0
    assert found["metric"]["before"] == pytest.approx(
        100 * json.loads((workspace / "run" / "results.json").read_text())["dev"]["accuracy"],
        abs=1e-3,
    )
    card = (workspace / f"out-{kind}" / "README.md").read_text()
    assert "good" in card and f"{found['metric']['after']:.2f}" in card
    if kind == "merged":
        gates = {
            (gate["site"], gate["part"]): gate["mean"] for gate in report["calibration"]["gates"]
        }
        trained = json.loads((workspace / "run" / "results.json").read_text())["gates"]
        for site, parts in trained.items():  # the run counted them over the same examples
            for part, value in parts.items():
                assert gates[site, part] == pytest.approx(value["mean"], abs=1e-5)


def test_a_run_in_bfloat16_is_exported_in_float32_and_proved_in_float32(workspace, tmp_path):
    """What every run on a GPU is, if nothing else is said."""
    run = shutil.copytree(
        workspace / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*")
    )
    said = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(said.replace("bf16: auto", "bf16: true"))
    assert "bf16: true" in (run / "config.yaml").read_text()
    report = export.run(
        options(workspace, "standalone", checkpoint=run / "best", output=tmp_path / "out"), print
    )
    assert (
        report["dtype"] == "float32"
        and report["proof"]["reload_difference"] < 1e-5 < report["proof"]["logit_difference"]["max"]
    )


def test_a_pipeline_classifies_where_neither_scaleup_nor_peft_exists(workspace):
    out = workspace / "out-merged"
    if not out.exists():
        export.run(options(workspace, "merged", verify=False), print)
    code = (
        "import sys, json; sys.modules['scaleup'] = sys.modules['peft'] = None;"
        "from transformers import pipeline;"
        f"classify = pipeline('text-classification', {str(out)!r}, trust_remote_code=True);"
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
    measured = {
        "logits": torch.tensor([[1.0, 0.0]] * 32),
        "written": [],
        "loss": None,
        "seconds": [1.0],
        "peak_mib": 1.0,
    }
    scores = iter([90.0, 90.0 - drop])
    monkeypatch.setattr(proof.Job, "process", lambda *args, **kwargs: measured)
    monkeypatch.setattr(proof, "points", lambda job, found: next(scores))
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


def test_a_reload_that_differs_is_not_called_done(workspace, monkeypatch):
    write = ship.write_weights

    def damaged(*args, **kwargs):
        size = write(*args, **kwargs)
        path = args[5] / "model.safetensors"
        save_file(
            {name: tensor + 0.1 for name, tensor in load_file(path).items()},
            path,
            metadata={"format": "pt"},
        )
        return size

    monkeypatch.setattr(ship, "write_weights", damaged)
    with pytest.raises(errors.ExportError, match="other logits in a fresh process"):
        export.run(options(workspace, "standalone", output=workspace / "differs"), print)
    assert not list(workspace.glob("*differs*"))


def test_what_cannot_be_exported_is_said_in_one_line(workspace, tmp_path):
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
            "--max-shard-size: many is no amount of memory",
        ),
    ],
)
def test_arguments_without_meaning_are_refused(tmp_path, capsys, words, message):
    arguments = ["export", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main([*arguments, *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
