"""Load the config.yaml of a trained run, which another person may have written."""

import pathlib
from collections.abc import Sequence

from scaleup.errors import PermissionMissing
from scaleup.settings.schema import Settings, load
from scaleup.training.manifest import Manifest
from scaleup.training.preflight import model_folder


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
    settings = load(str(path), overrides, checks=[model_folder])
    if settings.model.trust_remote_code and not trusted:
        raise PermissionMissing(
            f"--trust-remote-code: {path} asks to run Python code that comes with the backbone "
            f"{settings.model.name}; give this flag if you trust that code"
        )
    manifest.check_settings(settings, path)
    return settings
