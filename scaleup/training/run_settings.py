"""Load the config.yaml of a trained run, which another person may have written."""

import os
import pathlib
from collections.abc import Sequence

from scaleup.errors import ConfigError, PermissionMissing
from scaleup.settings.loading import override, read
from scaleup.settings.schema import Settings, earlier_settings, load
from scaleup.training.manifest import ANY, Manifest
from scaleup.training.preflight import model_files, model_folder


def check_permission(path: str | None, overrides: Sequence[str]) -> None:
    """Raise ConfigError if only the config in a run folder allows code of the model.

    A file that the user has written is a permission. Another person may have made a run folder,
    also one that a link leads to.
    """
    key = "model.trust_remote_code"
    if path is None or any(word.startswith(f"{key}=") for word in overrides):
        return
    folders = {os.path.dirname(path), os.path.dirname(os.path.realpath(path))}
    if not any(os.path.isfile(os.path.join(folder, "environment.json")) for folder in folders):
        return
    sections, _ = read(path, [], ["model"])
    if sections.get("model", {}).get("trust_remote_code") not in (None, False):
        raise ConfigError(
            f"{key}: {path} is the config of a run, and asks to run Python code that comes with "
            f"the model; add {key}=true if you trust that code"
        )


def load_trained(
    path: pathlib.Path, manifest: Manifest, overrides: Sequence[str], trusted: bool
) -> Settings:
    """Load the settings of a run and compare them with those that its checkpoint depends on.

    Args:
        path: config.yaml of the run.
        manifest: the manifest of a checkpoint of the run.
        overrides: words `section.key=value`.
        trusted: whether the user allows code that comes with the backbone. The run's own
            model.trust_remote_code is only a request.

    Raises:
        ConfigError: the file is damaged, or was changed since the checkpoint was written.
        PermissionMissing: the run asks to execute code, which the user has not allowed.
    """
    # The run may be another person's, and may have prepared its data on another machine.
    local = [override(key, None) for key in ANY]
    overrides = [*earlier_settings(str(path)), *local, *overrides]
    settings = load(str(path), overrides, checks=[model_folder, model_files], earlier=True)
    if settings.model.trust_remote_code and not trusted:
        raise PermissionMissing(
            f"--trust-remote-code: {path} asks to run Python code that comes with the backbone "
            f"{settings.model.name}; give this flag if you trust that code"
        )
    manifest.check_settings(settings, path)
    return settings
