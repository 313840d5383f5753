"""What the commands that take a config share: its arguments, and reading it."""

import argparse
import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from scaleup.errors import ConfigError

if TYPE_CHECKING:
    from scaleup.settings.schema import Settings


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Import large libraries faster: they create millions of objects, none of which is garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config and the overrides."""
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with the sections model, method, data and train"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that override the file"
    )


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Add the permission of commands that read a run folder, which another person may have made."""
    trust = (
        "run Python code that comes with the run's backbone or tokenizer, if the run's config.yaml "
        "asks for it; only for folders you trust"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help=trust)


def load_settings(options: argparse.Namespace, problems: Sequence[str] = ()) -> "Settings":
    """Load and check the config of a command.

    Args:
        options: the parsed command line.
        problems: problems with other arguments, which are reported with those of the config.

    Raises:
        ConfigError: lists every problem.
    """
    with without_garbage_collection():
        from scaleup.settings.schema import load
        from scaleup.training.preflight import CHECKS

    _check_permission(options)
    return load(options.config, options.overrides, checks=(*CHECKS, lambda _: list(problems)))


def _check_permission(options: argparse.Namespace) -> None:
    """Raise ConfigError if only the config in a run folder allows code of the model.

    A file that the user has written is a permission. Another person may have made a run folder.
    """
    from scaleup.settings.loading import read

    key = "model.trust_remote_code"
    if options.config is None or any(word.startswith(f"{key}=") for word in options.overrides):
        return
    folder = os.path.dirname(options.config)
    if not os.path.isfile(os.path.join(folder, "environment.json")):
        return
    sections, _ = read(options.config, [], ["model"])
    if sections.get("model", {}).get("trust_remote_code") not in (None, False):
        raise ConfigError(
            f"{key}: {options.config} is the config of a run, and asks to run Python code that "
            f"comes with the model; add {key}=true if you trust that code"
        )
