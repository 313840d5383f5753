"""Exports of a trained run, each with proof of what it costs: exact, merged, standalone.

    report = run(Options(checkpoint=pathlib.Path("RUN/best"), kind="merged", output=pathlib.Path("DIR")))

exact: the bundle with the prefix MLP collapsed, for `PeftModel.from_pretrained` after `import scaleup`. standalone: a transformers
folder that needs neither scaleup nor PEFT; gates stay learned. merged: such a folder with each gate at its mean over calibration data.

Whatever needs the whole model (before, after, the proof) runs in processes of their own; this one writes, and holds one shard of the
backbone at a time.
"""

import dataclasses
import importlib.metadata
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel

from scaleup import __version__, io
from scaleup.backbone import loading as backbone
from scaleup.backbone import weights
from scaleup.data import tasks
from scaleup.errors import ConfigError, ExportError
from scaleup.export import fold
from scaleup.export import folder as ship
from scaleup.export.card import card
from scaleup.export.measure import peak_mib
from scaleup.export.verify import BATCH, Job, Options, prepare, prove
from scaleup.io import write_json
from scaleup.settings import schema as config
from scaleup.settings.loading import override
from scaleup.settings.schema import Settings
from scaleup.training.checkpoint import (
    commit_checkpoint,
    create_staging_folder,
    staging_folder,
    verify,
)
from scaleup.training.preflight import model_folder
from scaleup.unipelt.config import UniPeltConfig
from scaleup.unipelt.sites import find_sites

TOKENIZER = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|spiece|sentencepiece|chat_template)[\w.-]*"
)


def run(options: Options, say: Callable[[str], None] = print) -> dict:
    """Writes `options.output` and returns what its export.json holds.

    Raises ConfigError for what a user must change, CheckpointError for a checkpoint that is not whole, ExportError where the export failed
    its proof.
    """
    settings, manifest = _read_run(options)
    written = staging_folder(options.output)
    if written.is_dir():  # of an export that is still running, or was killed
        io.hold(written, "--output: another export", lock="")
    written = create_staging_folder(options.output)
    io.hold(written, "--output: another export", lock="")
    try:
        with tempfile.TemporaryDirectory(prefix="scaleup-export-") as work:
            return _export(Job(options, settings, manifest, pathlib.Path(work), say), written)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _read_run(options: Options) -> tuple[Settings, dict]:
    """The run's settings and the bundle's manifest. Raises ConfigError or CheckpointError."""
    problems = []
    path = options.config or options.checkpoint.parent / "config.yaml"
    if not options.checkpoint.is_dir():
        problems.append(f"--checkpoint: no folder {options.checkpoint}")
    elif not path.is_file():
        problems.append(
            f"--config: no file {path}; name the config.yaml of the run that left {options.checkpoint}"
        )
    if options.output.exists():
        problems.append(f"--output: {options.output} exists; choose another folder")
    elif options.checkpoint.resolve() in options.output.resolve().parents:
        problems.append(
            f"--output: {options.output} is inside the checkpoint; choose another folder"
        )
    if problems:
        raise ConfigError(problems)
    manifest = verify(options.checkpoint)
    if manifest.export not in (None, "exact"):
        raise ConfigError(
            [
                f"--checkpoint: {options.checkpoint} is an export itself ({manifest.export}); name the run's best/ or final/"
            ]
        )
    overrides = [] if options.backbone is None else [override("model.name", options.backbone)]
    settings = config.load(str(path), overrides, checks=[model_folder])
    method = manifest.method
    if method["name"] != "unipelt":
        raise ConfigError(
            [
                f"--checkpoint: {options.checkpoint} was trained with method {method['name']}; it is a transformers folder already, load it as it is"
            ]
        )
    if settings.dump()["method"] != method:
        raise ConfigError(
            [
                f"--config: {path} is not of the run that left {options.checkpoint}; its method is another one"
            ]
        )
    if (
        options.kind == "merged"
        and options.calibrate not in ("dev", "test")
        and settings.data.name is not None
    ):
        raise ConfigError(
            [f"--calibrate: the run's data is {settings.data.name} by name; use dev or test"]
        )
    shape, then = backbone.load_config(settings.model), manifest.backbone
    if backbone.fingerprint(settings.model, shape) != then["fingerprint"]:
        advice = (
            "name its folder with --backbone"
            if options.backbone is None
            else "--backbone takes the very folder, config.json included"
        )
        raise ConfigError(
            [
                f"model.name: {settings.model.name} is not the backbone that was trained on ({then['name']}, {then['fingerprint'][:19]}…); {advice}"
            ]
        )
    return settings, manifest


def _export(job: Job, written: pathlib.Path) -> dict:
    options, settings = job.options, job.settings
    bundle, tensors = fold.read_checkpoint(options.checkpoint)
    frozen = options.kind != "exact" and (options.kind == "merged" or bundle.gates == "none")
    counts = options.kind == "merged" and (
        bundle.gates == "learned" or options.prune > 0
    )  # something depends on data
    shape = backbone.load_config(settings.model)
    if not tasks.of(settings.data).writes:
        backbone.set_labels(shape, job.manifest.labels)
    if shape.pad_token_id is None:
        shape.pad_token_id = AutoTokenizer.from_pretrained(options.checkpoint).pad_token_id
    dtype = getattr(
        torch,
        options.dtype or ("float32" if settings.model.dtype == "auto" else settings.model.dtype),
    )
    empty = backbone.empty_model(
        shape, settings.model.attention, dtype, tasks.of(settings.data).auto
    )
    attentions, blocks = find_sites(empty)
    before = None
    if options.verify or counts:
        prepare(job, shape)
        job.say(f"measuring {options.checkpoint} on {len(job.batches)} batches of {BATCH}")
        before = job.trained("before", calibrate=options.examples if counts else 0)
    gates, dropped = None, set()
    if frozen:
        gates = (
            {(site, part): mean for site, part, mean, _ in before["gates"]}
            if bundle.gates == "learned"
            else fold.constant_gates(bundle, attentions, blocks)
        )
        dropped = (
            {(site, part) for site, part, effect in before["effects"] if effect < options.prune}
            if counts
            else set()
        )
    folded = None
    if options.kind == "exact":
        size = _write_exact(bundle, tensors, written)
    else:
        folded = fold.fold(bundle, tensors, attentions, blocks, gates, dropped)
        size = _write_folder(job, empty, folded, frozen, dtype, written)
    for path in options.checkpoint.iterdir():  # the tokenizer, as it was trained with
        if path.is_file() and TOKENIZER.fullmatch(path.name):
            shutil.copy2(path, written / path.name)
    report = _report(job, frozen, dtype, size, before if counts else None, dropped, folded)
    if options.verify:
        job.say("loading it in a fresh process")
        report["proof"] = prove(job, written, before, gates, dropped, dtype)
    write_json(written / "export.json", report)
    (written / "README.md").write_text(
        card(settings, job.manifest, report, tasks.of(settings.data).auto.__name__),
        encoding="utf-8",
    )
    if options.output.exists():
        raise ExportError(f"{options.output} has appeared meanwhile; nothing was kept")
    commit_checkpoint(
        written, options.output, {}, dataclasses.replace(job.manifest, export=options.kind)
    )
    return report


def _write_exact(
    bundle: UniPeltConfig, tensors: dict[str, torch.Tensor], written: pathlib.Path
) -> int:
    """Bytes of the weights."""
    content = {f"{fold.PEFT_PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(content, str(written / "adapter_model.safetensors"), metadata={"format": "pt"})
    bundle.save_pretrained(str(written))
    return sum(tensor.numel() * tensor.itemsize for tensor in content.values())


def _write_folder(
    job: Job,
    empty: PreTrainedModel,
    folded: fold.Folded,
    frozen: bool,
    dtype: torch.dtype,
    written: pathlib.Path,
) -> int:
    """Bytes of the weights."""
    model = job.settings.model
    files = weights.checkpoint_folder(model.name, model.revision)
    ship.write_config(
        empty,
        tasks.of(job.settings.data).auto.__name__,
        folded,
        not frozen,
        dtype,
        written,
        __version__,
    )
    if (files / "generation_config.json").is_file():
        shutil.copy2(files / "generation_config.json", written)
    job.say(f"writing {written.parent / job.options.output.name}, {files} shard by shard")
    try:
        return ship.write_weights(
            empty,
            files,
            folded,
            dtype,
            dtype if frozen else torch.float32,
            written,
            job.options.max_shard_bytes,
        )
    except (ValueError, SafetensorError) as error:  # safetensors' own word for a full disk
        raise ExportError(f"{job.options.output} could not be written: {error}") from None


def _report(
    job: Job,
    frozen: bool,
    dtype: torch.dtype,
    size: int,
    calibrated: dict | None,
    dropped: set,
    folded: fold.Folded | None,
) -> dict:
    """export.json without the proof."""
    gates = None
    if calibrated is not None:
        effects = {(site, part): effect for site, part, effect in calibrated["effects"]}
        gates = [
            {
                "site": site,
                "part": part,
                "mean": round(mean, 6),
                "spread": round(spread, 6),
                "dropped": (site, part) in dropped,
            }
            | ({"effect": round(effects[site, part], 6)} if (site, part) in effects else {})
            for site, part, mean, spread in calibrated["gates"]
        ]
    options = job.options
    return {
        "kind": options.kind,
        "checkpoint": str(options.checkpoint),
        "backbone": job.manifest.backbone,
        "gates": "frozen" if frozen else "learned",
        "remote_code": folded is not None and folded.specification is not None,
        "dtype": str(dtype).removeprefix("torch.") if folded is not None else None,
        "calibration": None
        if calibrated is None
        else {
            "data": options.calibrate,
            "examples": calibrated["examples"],
            "prune": options.prune,
            "gates": gates,
        },
        "bytes": {
            "weights": size,
            "checkpoint": sum(
                path.stat().st_size for path in options.checkpoint.glob("*.safetensors")
            ),
        },
        "peak_memory_mib": {"writing": round(peak_mib(), 1)},
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")
        }
        | {"scaleup": __version__},
    }
