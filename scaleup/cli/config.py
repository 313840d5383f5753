"""What the commands that take a config share: its arguments, and reading it."""

import argparse
import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

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


def load_settings(
    options: argparse.Namespace, problems: Sequence[str] = (), writes: bool = True
) -> "Settings":
    """Load and check the config of a command.

    Args:
        options: the parsed command line.
        problems: problems with other arguments, which are reported with those of the config.
        writes: whether the command writes into the output folder, which is then checked.

    Raises:
        ConfigError: lists every problem.
    """
    with without_garbage_collection():
        from scaleup.settings.schema import load
        from scaleup.training.preflight import CHECKS, READING_CHECKS
        from scaleup.training.run_settings import check_permission

    check_permission(options.config, options.overrides)
    checks = CHECKS if writes else READING_CHECKS
    return load(options.config, options.overrides, checks=(*checks, lambda _: list(problems)))
