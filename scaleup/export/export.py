"""Exports of a trained run, which are measured before they get their final name.

    run(ExportOptions(checkpoint=Path("RUN/best"), kind="merged", output=Path("DIR")))

exact       the adapter checkpoint with the prefix's MLP collapsed, for `PeftModel.from_pretrained`
            after `import scaleup`
standalone  a transformers folder that needs neither scaleup nor PEFT; gates stay learned
merged      such a folder with a constant in place of each gate: its mean over calibration data
plain       a model of the backbone's own class, whose weights approximate what UniPELT does
lora        the same as a LoRA adapter of PEFT

Measurements run the whole model in processes of their own. The process of the export holds only one
shard of the backbone at a time.
"""

import dataclasses
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable

from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from scaleup import __version__, io
from scaleup.backbone import loading, weights
from scaleup.backbone.method import complete_config
from scaleup.backbone.tokenizer import share_pad_token
from scaleup.data import tasks
from scaleup.errors import CheckpointError, ConfigError, ExportError, PermissionMissing, one_line
from scaleup.export import absorbed, fold
from scaleup.export.calibrate import Place, TrainedMeasurements
from scaleup.export.card import card
from scaleup.export.evaluation import BATCH, Evaluation
from scaleup.export.folder import FolderWriter
from scaleup.export.kinds import KINDS
from scaleup.export.measure import peak_mib
from scaleup.export.report import (
    Absorption,
    Calibration,
    Export,
    ExportOptions,
    ExportReport,
    GateReport,
)
from scaleup.export.verify import dtype_name, verify_export
from scaleup.machine import versions
from scaleup.settings.data_rules import METRICS
from scaleup.settings.loading import override
from scaleup.settings.schema import Settings
from scaleup.training import resume
from scaleup.training.checkpoint import (
    check_adapter_tensors,
    commit_checkpoint,
    create_staging_folder,
    describe_file,
    staging_folder,
    verify,
)
from scaleup.training.manifest import ALTERED, MANIFEST, Manifest
from scaleup.training.output_folder import has_long_name
from scaleup.training.run_settings import load_trained
from scaleup.unipelt.sites import find_sites
from scaleup.unipelt.submodules import SUBMODULES

TOKENIZER = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|spiece|sentencepiece|chat_template)[\w.-]*"
)


def run(options: ExportOptions, say: Callable[[str], None] = print) -> ExportReport:
    """Write the folder `options.output`, whose export.json holds the report.

    Args:
        options: what to export and how.
        say: prints a line on progress.

    Raises:
        ConfigError: something that the user must change.
        CheckpointError: the checkpoint is not whole.
        ExportError: the export failed its verification, and nothing was kept.
    """
    settings, manifest, config = _read_run(options)
    staging = staging_folder(options.output)
    if staging.is_dir():  # left by an export that is still running or was killed
        io.hold(staging, "--output: another export", lock="")
    try:
        staging = create_staging_folder(options.output)
        io.hold(staging, "--output: another export", lock="")
        auto = tasks.of(settings.data).auto
        complete_config(settings, config, auto, manifest.labels)
        check_adapter_tensors(options.checkpoint, manifest, settings, config, auto)
        tokenizer = _load_tokenizer(options)
        share_pad_token(str(options.checkpoint), tokenizer, config, auto)
        adapter, tensors = fold.read_checkpoint(options.checkpoint)
        export = Export(options, settings, manifest, config, tokenizer, adapter, tensors, say)
        return _export(export, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _read_run(options: ExportOptions) -> tuple[Settings, Manifest, PretrainedConfig]:
    """Return the run's settings, the checkpoint's manifest and the backbone's config.

    Raises:
        ConfigError: they do not belong together, or cannot be exported.
        CheckpointError: the checkpoint is not whole.
    """
    checkpoint = options.checkpoint
    path = options.config or checkpoint.parent / "config.yaml"
    problems = []
    if not os.path.isdir(checkpoint):
        problems.append(f"--checkpoint: no folder {checkpoint}")
    elif os.path.isfile(checkpoint / "config.yaml") and not (checkpoint / MANIFEST).exists():
        problems.append(
            f"--checkpoint: {checkpoint} is the folder of a run; {_suggest(checkpoint)}"
        )
    elif not os.path.isfile(path):
        problems.append(
            f"--config: no file {path}; give the config.yaml of the run that wrote {checkpoint}"
        )
    if problem := _output_problem(options.output, checkpoint):
        problems.append(f"--output: {options.output} {problem}; choose another folder")
    if problems:
        raise ConfigError(problems)
    _check_manifest(checkpoint, Manifest.read(checkpoint))
    manifest = verify(checkpoint)
    overrides = [] if options.backbone is None else [override("model.name", options.backbone)]
    settings = load_trained(path, manifest, overrides, options.trust_remote_code)
    _check_tokenizer_code(options)
    own_file = options.calibrate not in ("dev", "test")
    if KINDS[options.kind].needs_data and own_file and settings.data.name:
        raise ConfigError(
            f"--calibrate: the run's data is {settings.data.name}, which is not a file; use dev or "
            "test"
        )
    task = settings.data.resolved_task
    if options.metric is not None and options.metric not in METRICS[task]:
        raise ConfigError(
            f"--metric: {options.metric} does not fit data.task {task}; choose from "
            f"{', '.join(METRICS[task])}"
        )
    config, trained_on = loading.load_config(settings.model), manifest.backbone
    if loading.fingerprint(settings.model, config) != trained_on["fingerprint"]:
        advice = "give its folder with --backbone"
        if options.backbone is not None:
            advice = "--backbone needs an unchanged copy of its folder, with config.json"
        raise ConfigError(
            f"model.name: {settings.model.name} is not the backbone that was trained on "
            f"({trained_on['name']}, {str(trained_on['fingerprint'])[:19]}…); {advice}"
        )
    return settings, manifest, config


def _output_problem(output: pathlib.Path, checkpoint: pathlib.Path) -> str | None:
    """Return why no export can be written to a folder, or None."""
    try:
        if output.exists():
            return "exists"
        if checkpoint.resolve() in output.resolve().parents:
            return "is inside the checkpoint"
        if has_long_name(staging_folder(output)):
            return "has a name that is too long"
        parent = next(path for path in output.absolute().parents if path.exists())
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    if not parent.is_dir():
        return f"cannot be written: {parent} is a file"
    return None if os.access(parent, os.W_OK | os.X_OK) else "cannot be written: no permission"


def _suggest(run: pathlib.Path) -> str:
    """Return advice that names the best checkpoint in the folder of a run."""
    names = ("best", "final", *(path.name for path in reversed(resume.checkpoints(run))))
    name = next((name for name in names if (run / name).is_dir()), None)
    if name is None:
        return "it has no checkpoint yet"
    return f"give one of its checkpoints: --checkpoint {run / name}"


def _check_manifest(checkpoint: pathlib.Path, manifest: Manifest) -> None:
    """Raise ConfigError if the checkpoint is not one that can be exported."""
    if manifest.export not in (None, "exact"):
        raise ConfigError(
            f"--checkpoint: {checkpoint} is an export already ({manifest.export}); give best/ or "
            "final/ of the run"
        )
    method = manifest.method
    if method["name"] != "unipelt":
        raise ConfigError(
            f"--checkpoint: {checkpoint} was trained with method {method['name']}; it is a "
            "transformers folder already, so load it as it is"
        )
    built_in = [n for n, s in SUBMODULES.items() if type(s).__module__.startswith("scaleup.")]
    foreign = [name for name in method["submodules"] if name not in built_in]
    if foreign:
        raise ConfigError(
            f"--checkpoint: {checkpoint} uses {', '.join(foreign)}, which is not a submodule of "
            "scaleup; an export cannot contain its code"
        )


def _check_tokenizer_code(options: ExportOptions) -> None:
    """Raise PermissionMissing if the checkpoint's tokenizer asks to run code of its own."""
    path = options.checkpoint / "tokenizer_config.json"
    try:
        asks = path.is_file() and "auto_map" in io.read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; {ALTERED}") from None
    if asks and not options.trust_remote_code:
        raise PermissionMissing(
            f"--trust-remote-code: {path} asks to run Python code (auto_map); give this flag if "
            "you trust that code"
        )


def _load_tokenizer(options: ExportOptions) -> PreTrainedTokenizerBase:
    """Load the checkpoint's tokenizer. If it is damaged, raise CheckpointError."""
    folder, trusted = options.checkpoint, options.trust_remote_code
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:  # the library tokenizers has no class for its errors
        problem = f"its tokenizer cannot be loaded ({one_line(error, 200)})"
        raise CheckpointError(f"{folder}: {problem}; {ALTERED}") from None


def _export(export: Export, staging: pathlib.Path) -> ExportReport:
    """Write an export into the staging folder, verify it and commit it."""
    # If the export is killed, the next one to the same output removes the staging folder. A name of
    # its own, because a process of the killed export may still write into this folder.
    work = pathlib.Path(tempfile.mkdtemp(prefix=".work-", dir=staging))
    options, manifest = export.options, export.manifest
    empty = loading.empty_model(
        export.config, export.settings.model.attention, export.dtype, export.auto
    )
    sites = find_sites(empty)
    evaluation = before = calibration = absorption = updates = None
    gates, dropped = None, set[Place]()
    if export.has_constants and export.adapter.gates == "none":
        gates = fold.constant_gates(export.adapter, *sites)
    if options.verify or export.needs_calibration or options.absorbs:
        evaluation = Evaluation(export, work)
        batches = len(evaluation.batches)
        export.say(f"measuring {options.checkpoint} on {batches} batches of {BATCH}")
        examples = (
            min(options.resolved_examples, evaluation.size) if export.needs_calibration else 0
        )
        before = evaluation.measure_trained("before", examples=examples)
        if options.absorbs:
            updates = work / "updates.safetensors"
            export.say(f"fitting updates of rank {options.rank} to its layers and predictions")
            absorption = absorbed.fit_updates(evaluation, updates)
        if export.needs_calibration:
            gates = gates or {key: mean for key, (mean, _) in before.gates.items()}
            dropped = {key for key, effect in before.effects.items() if effect < options.prune}
            calibration = _calibration(options, before, dropped, examples)
    writer = None
    try:
        if options.kind == "exact":
            size = _write_adapter(export, staging)
        elif options.kind == "lora":
            assert updates is not None
            size = absorbed.write_lora(export, empty, updates, staging)
        else:
            if updates is not None:
                folded = absorbed.folded(export, updates)
            else:
                places = frozenset(dropped)
                folded = fold.fold(export.adapter, export.tensors, *sites, gates, places)
            writer = FolderWriter(empty, folded, export.dtype, staging)
            size = _write_folder(export, writer)
    except SafetensorError as error:  # raised if the disk is full
        raise ExportError(f"{options.output} could not be written: {error}") from None
    _copy_tokenizer(options.checkpoint, staging, manifest)
    report = _report(export, size, writer, calibration, absorption)
    if options.verify and evaluation is not None and before is not None:
        export.say("loading the export in a new process")
        proof = verify_export(evaluation, staging, before, gates, dropped, updates)
        report = dataclasses.replace(report, proof=proof)
    io.write_json(staging / "export.json", report.to_json())
    text = card(export, report)
    (staging / "README.md").write_text(text, encoding="utf-8")
    if options.output.exists():
        raise ExportError(f"{options.output} has appeared in the meantime; nothing was kept")
    manifest = dataclasses.replace(manifest, export=options.kind)
    shutil.rmtree(work)
    try:
        commit_checkpoint(staging, options.output, {}, manifest)
    except CheckpointError as error:
        raise ExportError(str(error)) from None
    return report


def _copy_tokenizer(checkpoint: pathlib.Path, staging: pathlib.Path, manifest: Manifest) -> None:
    """Copy the tokenizer files that the manifest lists, without code of a tokenizer."""
    for name, entry in manifest.files.items():
        if TOKENIZER.fullmatch(name) and not name.endswith(".py"):
            shutil.copyfile(checkpoint / name, staging / name)
            if describe_file(staging / name) != entry:
                raise CheckpointError(f"{checkpoint}: {name} changed during the export")


def _write_adapter(export: Export, staging: pathlib.Path) -> int:
    """Write an exact export and return the bytes of its weights."""
    content = {fold.PEFT_PREFIX + name: t.contiguous() for name, t in export.tensors.items()}
    save_file(content, str(staging / "adapter_model.safetensors"), metadata={"format": "pt"})
    export.adapter.save_pretrained(str(staging))
    return sum(tensor.numel() * tensor.itemsize for tensor in content.values())


def _write_folder(export: Export, writer: FolderWriter) -> int:
    """Write a transformers folder and return the bytes of its weights."""
    model, output = export.settings.model, export.options.output
    files = weights.checkpoint_folder(model.name, model.revision)
    writer.write_config(export.auto.__name__)
    generation = files / "generation_config.json"
    if generation.is_file():  # parsed, because a link in a foreign folder may lead anywhere
        try:
            io.write_json(writer.folder / generation.name, io.read_json(generation))
        except ValueError as error:
            raise ConfigError(
                f"model.name: {generation} is {error}; restore or remove it"
            ) from None
    export.say(f"writing {output} from {files}, shard by shard")
    try:
        return writer.write_weights(files, export.options.max_shard_bytes)
    except ValueError as error:
        raise ExportError(f"{output} could not be written: {error}") from None


def _calibration(
    options: ExportOptions, before: TrainedMeasurements, dropped: set[Place], examples: int
) -> Calibration:
    """Return what export.json says about the gates."""
    effects = {key: round(effect, 6) for key, effect in before.effects.items()}
    gates = [
        GateReport(*key, round(mean, 6), round(spread, 6), key in dropped, effects.get(key))
        for key, (mean, spread) in before.gates.items()
    ]
    return Calibration(options.calibrate, examples, options.prune, gates)


def _report(
    export: Export,
    size: int,
    writer: FolderWriter | None,
    calibration: Calibration | None,
    absorption: Absorption | None,
) -> ExportReport:
    """Return the report of an export that is not verified yet; `size`: bytes of the weights."""
    checkpoint = export.options.checkpoint
    files = weights.tensor_files(checkpoint)
    return ExportReport(
        kind=export.options.kind,
        checkpoint=str(checkpoint),
        backbone=export.manifest.backbone,
        gates="absorbed" if absorption else "frozen" if export.has_constants else "learned",
        remote_code=writer is not None and writer.folded.specification is not None,
        dtype=None if writer is None else dtype_name(writer.dtype),
        calibration=calibration,
        bytes={"weights": size, "checkpoint": sum(path.stat().st_size for path in files)},
        peak_memory_mib={"writing": round(peak_mib(), 1)},
        versions=versions("torch transformers peft") | {"scaleup": __version__},
        absorption=absorption,
    )
