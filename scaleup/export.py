"""Exports of a trained run, each with proof of what it costs: exact, merged, standalone.

    report = run(Options(checkpoint=pathlib.Path("RUN/best"), kind="merged", output=pathlib.Path("DIR")))

exact: the bundle with the prefix MLP collapsed, for `PeftModel.from_pretrained` after `import scaleup`. standalone: a transformers
folder that needs neither scaleup nor PEFT; gates stay learned. merged: such a folder with each gate at its mean over calibration data.

Whatever needs the whole model (before, after, the proof) runs in processes of their own; this one writes, and holds one shard of the
backbone at a time.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoTokenizer, EvalPrediction, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from scaleup import backbone, config, fold, ship, tasks, weights
from scaleup.card import card
from scaleup.checkpoint import draft, seal, verify
from scaleup.config import ConfigError, Settings
from scaleup.journal import write_json
from scaleup.readers import Examples
from scaleup.sites import find_sites

ROOT = pathlib.Path(__file__).resolve().parents[1]
VERSION = "0.1.0"
BATCH = 16
OF_BUNDLE = ("adapter_config.json", "manifest.json", "trainer_state.json")  # not the tokenizer's
# Largest difference that rounding explains, of logits whose largest is 1 or more, by the type weights are written in.
ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class ExportError(RuntimeError):
    """An export that cannot be made or did not pass its own proof, in one plain line. Nothing is left under the final name."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to export and how; see launch/export.py for the meaning of each.

    calibrate: "dev", "test" or a file with the columns of the run's own. max_shard_bytes: of one weights file.
    """

    checkpoint: pathlib.Path
    kind: str
    output: pathlib.Path
    config: pathlib.Path | None = None
    backbone: str | None = None
    calibrate: str = "dev"
    examples: int = 256
    prune: float = 0.0
    dtype: str | None = None
    max_shard_bytes: int = 2 * 10**9
    verify: bool = True
    max_metric_drop: float = 1.0


@dataclasses.dataclass
class _Job:
    """What the steps share."""

    options: Options
    settings: Settings
    manifest: dict
    work: pathlib.Path
    say: Callable[[str], None]
    examples: Examples | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    batches: list[dict[str, torch.Tensor]] = dataclasses.field(default_factory=list)

    def process(self, name: str, module: list[str], **job: object) -> dict:
        """Runs a job in a fresh process; what it measured. Raises ExportError with its last words."""
        files = {"batches": str(self.work / "batches.pt"), "output": str(self.work / f"{name}.pt")}
        (self.work / f"{name}.json").write_text(json.dumps(job | files | {"generate": self.generate}), encoding="utf-8")
        command = [sys.executable, *module, str(self.work / f"{name}.json")]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        if done.returncode:
            words = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}, as of a process killed for memory"]
            raise ExportError(f"{name} failed: {words[-1][:500]}")
        return torch.load(self.work / f"{name}.pt")

    def trained(self, name: str, **job: object) -> dict:
        """The model as it was trained."""
        usual = {"weights": "trained", "full_precision": False, "calibrate": 0, "gates": None, "dropped": []}
        fixed = {"config": str(self.work / "config.yaml"), "labels": self.manifest["labels"], "checkpoint": str(self.options.checkpoint.resolve())}
        return self.process(name, ["-m", "scaleup.calibrate"], **(usual | fixed | job))

    @property
    def generate(self) -> dict | None:
        found = tasks.generation(self.settings.data, self.examples.metric)
        return found and found | {"pad_token_id": self.tokenizer.pad_token_id}


def run(options: Options, say: Callable[[str], None] = print) -> dict:
    """Writes `options.output` and returns what its export.json holds.

    Raises ConfigError for what a user must change, BundleError for a checkpoint that is not whole, ExportError where the export failed
    its proof.
    """
    settings, manifest = _read_run(options)
    written = draft(options.output)
    try:
        with tempfile.TemporaryDirectory(prefix="scaleup-export-") as work:
            return _export(_Job(options, settings, manifest, pathlib.Path(work), say), written)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _read_run(options: Options) -> tuple[Settings, dict]:
    """The run's settings and the bundle's manifest. Raises ConfigError or BundleError."""
    problems = []
    path = options.config or options.checkpoint.parent / "config.yaml"
    if not options.checkpoint.is_dir():
        problems.append(f"--checkpoint: no folder {options.checkpoint}")
    elif not path.is_file():
        problems.append(f"--config: no file {path}; name the config.yaml of the run that left {options.checkpoint}")
    if options.output.exists():
        problems.append(f"--output: {options.output} exists; choose another folder")
    if problems:
        raise ConfigError(problems)
    manifest = verify(options.checkpoint)
    own = ["train.resume=auto"]  # else a config refuses a folder that is not empty
    settings = config.load(str(path), own if options.backbone is None else [*own, f"model.name={options.backbone}"])
    method = manifest["method"]
    if method["name"] != "unipelt":
        raise ConfigError([f"--checkpoint: {options.checkpoint} was trained with method {method['name']}; it is a transformers folder already, load it as it is"])
    if settings.dump()["method"] != method:
        raise ConfigError([f"--config: {path} is not of the run that left {options.checkpoint}; its method is another one"])
    if options.kind == "merged" and options.calibrate not in ("dev", "test") and settings.data.name is not None:
        raise ConfigError([f"--calibrate: the run's data is {settings.data.name} by name; use dev or test"])
    shape, then = backbone.load_config(settings.model), manifest["backbone"]
    if weights.fingerprint(settings.model.name, getattr(shape, "_commit_hash", None)) != then["fingerprint"]:
        raise ConfigError([f"model.name: {settings.model.name} is not the backbone that was trained on ({then['name']}, {then['fingerprint'][:19]}…); name its folder with --backbone"])
    return settings, manifest


def _export(job: _Job, written: pathlib.Path) -> dict:
    options, settings = job.options, job.settings
    bundle, tensors = fold.read_bundle(options.checkpoint)
    frozen = options.kind != "exact" and (options.kind == "merged" or bundle.gates == "none")
    counts = options.kind == "merged" and (bundle.gates == "learned" or options.prune > 0)  # something depends on data
    shape = backbone.load_config(settings.model)
    if not tasks.of(settings.data).writes:
        backbone.set_labels(shape, job.manifest["labels"])
    if shape.pad_token_id is None:
        shape.pad_token_id = AutoTokenizer.from_pretrained(options.checkpoint).pad_token_id
    dtype = getattr(torch, options.dtype or ("float32" if settings.model.dtype == "auto" else settings.model.dtype))
    empty = backbone.empty_model(shape, settings.model.attention, dtype, tasks.of(settings.data).auto)
    attentions, blocks = find_sites(empty)
    before = None
    if options.verify or counts:
        _prepare(job, shape)
        job.say(f"measuring {options.checkpoint} on {len(job.batches)} batches of {BATCH}")
        before = job.trained("before", calibrate=options.examples if counts else 0)
    gates, dropped = None, set()
    if frozen:
        gates = {(site, part): mean for site, part, mean, _ in before["gates"]} if bundle.gates == "learned" else fold.fixed_gates(bundle, attentions, blocks)
        dropped = {(site, part) for site, part, effect in before["effects"] if effect < options.prune} if counts else set()
    folded = None
    if options.kind == "exact":
        size = _write_exact(bundle, tensors, written)
    else:
        folded = fold.fold(bundle, tensors, attentions, blocks, gates, dropped)
        size = _write_folder(job, empty, folded, frozen, dtype, written)
    for path in options.checkpoint.iterdir():  # the tokenizer, as it was trained with
        if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja") and path.name not in OF_BUNDLE:
            shutil.copy2(path, written / path.name)
    report = _report(job, frozen, dtype, size, before if counts else None, dropped, folded)
    if options.verify:
        job.say("loading it in a fresh process")
        report["proof"] = _prove(job, written, before, gates, dropped, dtype)
    write_json(written / "export.json", report)
    (written / "README.md").write_text(card(settings, job.manifest, report, tasks.of(settings.data).auto.__name__), encoding="utf-8")
    seal(written, options.output, {}, {key: job.manifest[key] for key in ("method", "backbone", "task", "labels", "data", "run")} | {"export": options.kind})
    return report


def _prepare(job: _Job, shape: PretrainedConfig) -> None:
    """The examples to measure on, as batches, and what the processes need beside them."""
    settings, asked = job.settings, job.options.calibrate
    settings = backbone.fit_length(settings, shape)
    if asked not in ("dev", "test"):
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"validation_file": asked})})
    module = tasks.of(settings.data).module
    job.tokenizer = AutoTokenizer.from_pretrained(job.options.checkpoint)
    examples = module.tokenize(module.load(settings.data), job.tokenizer, settings.data)
    if asked == "test" and examples.test is None:
        raise ConfigError(["--calibrate: the run has no test data; use dev or a file"])
    job.examples = examples
    rows = examples.test if asked == "test" else examples.dev
    collate = module.collator(job.tokenizer, settings.data)
    job.batches = [dict(collate([rows[i] for i in range(first, min(first + BATCH, len(rows)))])) for first in range(0, len(rows), BATCH)]
    torch.save(job.batches, job.work / "batches.pt")
    (job.work / "config.yaml").write_text(config.to_yaml(job.settings), encoding="utf-8")


def _write_exact(bundle: fold.UniPeltConfig, tensors: dict[str, torch.Tensor], written: pathlib.Path) -> int:
    """Bytes of the weights."""
    content = {f"{fold.OUTSIDE}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(content, str(written / "adapter_model.safetensors"), metadata={"format": "pt"})
    bundle.save_pretrained(str(written))
    return sum(tensor.numel() * tensor.itemsize for tensor in content.values())


def _write_folder(job: _Job, empty: PreTrainedModel, folded: fold.Folded, frozen: bool, dtype: torch.dtype, written: pathlib.Path) -> int:
    """Bytes of the weights."""
    model = job.settings.model
    files = weights.checkpoint_folder(model.name, model.revision)
    ship.write_config(empty, tasks.of(job.settings.data).auto.__name__, folded, not frozen, dtype, written, VERSION)
    if (files / "generation_config.json").is_file():
        shutil.copy2(files / "generation_config.json", written)
    job.say(f"writing {written.parent / job.options.output.name}, {files} shard by shard")
    try:
        return ship.write_weights(empty, files, folded, dtype, dtype if frozen else torch.float32, written, job.options.max_shard_bytes)
    except (ValueError, SafetensorError) as error:  # safetensors' own word for a full disk
        raise ExportError(f"{job.options.output} could not be written: {error}") from None


def _report(job: _Job, frozen: bool, dtype: torch.dtype, size: int, calibrated: dict | None, dropped: set, folded: fold.Folded | None) -> dict:
    """export.json without the proof."""
    gates = None
    if calibrated is not None:
        effects = {(site, part): effect for site, part, effect in calibrated["effects"]}
        gates = [
            {"site": site, "part": part, "mean": round(mean, 6), "spread": round(spread, 6), "dropped": (site, part) in dropped}
            | ({"effect": round(effects[site, part], 6)} if (site, part) in effects else {})
            for site, part, mean, spread in calibrated["gates"]
        ]
    options = job.options
    return {
        "kind": options.kind,
        "checkpoint": str(options.checkpoint),
        "backbone": job.manifest["backbone"],
        "gates": "frozen" if frozen else "learned",
        "remote_code": folded is not None and folded.spec is not None,
        "dtype": str(dtype).removeprefix("torch.") if folded is not None else None,
        "calibration": None if calibrated is None else {"data": options.calibrate, "examples": calibrated["examples"], "prune": options.prune, "gates": gates},
        "bytes": {"weights": size, "checkpoint": sum(path.stat().st_size for path in options.checkpoint.glob("*.safetensors"))},
        "peak_memory_mib": {"writing": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")} | {"scaleup": VERSION},
    }


def _score(job: _Job, found: dict) -> float:
    """The run's metric of what a process measured, in points."""
    name = job.examples.metric
    if name == "loss":
        return 100 * found["loss"]
    if found["written"]:
        longest = max(map(len, found["written"]))
        pad = job.tokenizer.pad_token_id
        outputs = np.array([row + [pad] * (longest - len(row)) for row in found["written"]])
        labels = torch.cat([batch["reference"] for batch in job.batches]).numpy()
    else:
        outputs, labels = found["logits"].numpy(), torch.cat([batch["labels"] for batch in job.batches]).numpy()
    metric = tasks.of(job.settings.data).module.compute_metrics(job.examples, job.tokenizer)
    return 100 * metric(EvalPrediction(predictions=outputs, label_ids=labels))[name]


def _agreement(job: _Job, before: dict, after: dict) -> float | None:
    """Share of examples with the same class or the same text; None for a regression and where only the loss counts."""
    if before["written"]:
        pairs = zip(_texts(job, before), _texts(job, after))
        return statistics.mean(a == b for a, b in pairs)
    if job.examples.labels is None:
        return None
    return (before["logits"].argmax(-1) == after["logits"].argmax(-1)).float().mean().item()


def _texts(job: _Job, found: dict) -> list[str]:
    return [job.tokenizer.decode(row, skip_special_tokens=True) for row in found["written"]]


def _prove(job: _Job, written: pathlib.Path, before: dict, gates: fold.Gates | None, dropped: set, dtype: torch.dtype) -> dict:
    """Loads the export in a fresh process and compares: with what it must give (raises ExportError), and with the trained model."""
    quantised = job.settings.model.quantization != "none"
    if job.options.kind == "exact":
        expected, after = before, job.trained("after", weights="user", checkpoint=str(written.resolve()))
    else:
        expected = before
        if gates is not None or quantised:
            constants = None if gates is None else [[*key, value] for key, value in gates.items()]
            expected = job.trained("expected", full_precision=True, gates=constants, dropped=sorted(dropped))
        folder = {"folder": str(written.resolve()), "auto": tasks.of(job.settings.data).auto.__name__, "attention": job.settings.model.attention}
        after = job.process("after", ["-I", str(ROOT / "scaleup" / "fresh.py")], **folder)
    scale = max(1.0, expected["logits"].abs().max().item())
    off = (after["logits"] - expected["logits"]).abs().max().item()
    if not off <= ROUNDING[dtype] * scale:
        raise ExportError(f"the export gives other logits in a fresh process than were measured here, by {off:.2g}; nothing was kept. Please report this")
    difference = (after["logits"] - before["logits"]).abs()
    scores, name = [_score(job, found) for found in (before, after)], job.examples.metric
    drop = scores[1] - scores[0] if name == "loss" else scores[0] - scores[1]
    proof = {
        "data": job.options.calibrate,
        "examples": sum(len(batch["labels"]) for batch in job.batches),
        "reload_difference": off,
        "logit_difference": {"max": difference.max().item(), "mean": difference.mean().item()},
        "metric": {"name": name, "before": round(scores[0], 4), "after": round(scores[1], 4)},
        "agreement": _agreement(job, before, after),
        "milliseconds_per_batch": {key: round(1000 * statistics.median(found["seconds"]), 2) for key, found in (("before", before), ("after", after))},
        "peak_memory_mib": {key: round(found["peak_mib"], 1) for key, found in (("before", before), ("after", after))},
    }  # fmt: skip
    if drop > job.options.max_metric_drop:
        kept = {"merged": "--kind standalone keeps the gates", "standalone": "it was the type or the quantisation of the weights: try --dtype float32"}
        raise ExportError(
            f"{name} on {job.options.calibrate} went from {scores[0]:.2f} to {scores[1]:.2f}, more than --max-metric-drop {job.options.max_metric_drop:g} allows; "
            f"nothing was kept. {kept.get(job.options.kind, '')}".rstrip()
        )
    return proof
