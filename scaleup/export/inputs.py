"""Read and check what is exported: the run, its checkpoint and its tokenizer."""

import os
import pathlib

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from scaleup import io
from scaleup.backbone import loading
from scaleup.errors import CheckpointError, ConfigError, PermissionMissing, one_line
from scaleup.export.kinds import KINDS
from scaleup.export.report import ExportOptions
from scaleup.settings.data_rules import METRICS
from scaleup.settings.loading import override
from scaleup.settings.schema import Settings
from scaleup.training import resume
from scaleup.training.checkpoint import staging_folder, verify
from scaleup.training.manifest import ALTERED, MANIFEST, Manifest
from scaleup.training.output_folder import has_long_name
from scaleup.training.run_settings import load_trained
from scaleup.unipelt.submodules import SUBMODULES


def read_run(options: ExportOptions) -> tuple[Settings, Manifest, PretrainedConfig]:
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


def load_tokenizer(options: ExportOptions) -> PreTrainedTokenizerBase:
    """Load the checkpoint's tokenizer. If it is damaged, raise CheckpointError."""
    folder, trusted = options.checkpoint, options.trust_remote_code
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:  # the library tokenizers has no class for its errors
        problem = f"its tokenizer cannot be loaded ({one_line(error, 200)})"
        raise CheckpointError(f"{folder}: {problem}; {ALTERED}") from None
