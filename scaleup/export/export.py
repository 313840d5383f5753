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

import contextlib
import dataclasses
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable

from safetensors import SafetensorError
from safetensors.torch import save_file

from scaleup import __version__, io
from scaleup.backbone import loading, weights
from scaleup.backbone.method import complete_config
from scaleup.backbone.tokenizer import share_pad_token
from scaleup.data import tasks
from scaleup.errors import CheckpointError, ConfigError, ExportError
from scaleup.export import absorbed, fold
from scaleup.export.calibrate import Place, TrainedMeasurements
from scaleup.export.card import card
from scaleup.export.evaluation import BATCH, Evaluation
from scaleup.export.folder import FolderWriter
from scaleup.export.inputs import load_tokenizer, read_run
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
from scaleup.training.checkpoint import (
    check_adapter_tensors,
    commit_checkpoint,
    describe_file,
    staging_folder,
)
from scaleup.training.manifest import Manifest
from scaleup.unipelt.sites import find_sites

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
    settings, manifest, config = read_run(options)
    staging = _claim(options.output)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, staging, ignore_errors=True)
        auto = tasks.of(settings.data).auto
        complete_config(settings, config, auto, manifest.labels)
        check_adapter_tensors(options.checkpoint, manifest, settings, config, auto)
        tokenizer = load_tokenizer(options)
        share_pad_token(str(options.checkpoint), tokenizer, config, auto)
        adapter, tensors = fold.read_checkpoint(options.checkpoint)
        export = Export(options, settings, manifest, config, tokenizer, adapter, tensors, say)
        report = _export(export, staging)
        cleanup.pop_all()  # the folder has its final name
    return report


def _claim(output: pathlib.Path) -> pathlib.Path:
    """Return the empty staging folder of an output, which this process holds.

    Raises:
        ConfigError: another export writes to the output, or has done so in the meantime.
    """
    staging = staging_folder(output)
    try:
        staging.mkdir(parents=True, exist_ok=True)
        io.hold(staging, "--output: another export", lock="")
        for path in staging.iterdir():  # of an export that was killed
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    except FileNotFoundError:  # it has got its final name, or was removed
        problem = f"another export to {output} has just ended"
        raise ConfigError(f"--output: {problem}; start again, or choose another folder") from None
    if output.exists():
        staging.rmdir()
        raise ConfigError(f"--output: {output} exists; choose another folder")
    return staging


def _export(export: Export, staging: pathlib.Path) -> ExportReport:
    """Write an export into the staging folder, verify it and commit it."""
    # If the export is killed, the next one to the same output empties the staging folder. A name of
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
