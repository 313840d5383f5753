"""The entry point of all commands."""

import argparse
import functools
import importlib
import logging
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import scaleup
from scaleup.cli.exit_codes import cut, discard_lost_output, run_command
from scaleup.io import expand_home

COMMANDS = {
    "train": "train one model as a YAML config says",
    "prepare": "read, check and tokenise the data of a run once, for all its processes",
    "plan": "predict the memory that a run will need",
    "doctor": "examine hosts, network and folders before a run",
    "export": "turn a checkpoint into a folder for others to load",
    "push": "upload an export or a checkpoint to the Hugging Face hub",
    "import-adapters": "convert a checkpoint of the library adapters",
    "sweep": "run a grid of methods, tasks, training set sizes and seeds",
    "report": "make tables and figures from finished runs",
    "bench": "compare the speed and memory of the methods",
    "schema": "write the JSON schema of the config files",
}
HELP_COLUMNS = 100
HelpFormatter = functools.partial(argparse.RawDescriptionHelpFormatter, width=HELP_COLUMNS)


class Parser(argparse.ArgumentParser):
    """A parser whose messages stay short, however long an argument is."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with code 2."""
        super().error(cut(message + self._advice(message)))

    def _advice(self, message: str) -> str:
        """Return what a word that argparse refuses was probably meant to be, or nothing."""
        from scaleup.settings.loading import nearest

        if choice := re.search(r"invalid choice: '(.+)' \(choose from (.+)\)$", message):
            return nearest(choice[1], re.findall(r"[\w.-]+", choice[2]))
        if setting := re.search(r"arguments: .*?--((model|method|data|train)\.\S+)", message):
            value = "" if "=" in setting[1] else "=VALUE"
            return f"; write {setting[1]}{value} without dashes"
        if flag := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            return nearest(flag[1], re.findall(r"--[\w-]+", self.format_usage()))
        return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after the program's name; those of this process if None.

    Returns:
        The exit code, see `scaleup.cli.exit_codes`.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        name = _parser().parse_args(words[:1]).command
    finally:
        discard_lost_output()  # the help, into a pipe that is closed
    command = importlib.import_module(f"scaleup.cli.{name.replace('-', '_')}")
    parser = Parser(
        prog=f"scaleup {name}",
        description=command.__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        conflict_handler="resolve",  # `train` has its own --help
    )
    command.configure(parser)
    # argparse cannot mix positional words with flags where there are subcommands.
    parse = parser.parse_args if name == "bench" else parser.parse_intermixed_args
    _quiet_libraries()
    for word in words[1:]:
        if re.fullmatch(r"--[\w-]+=--", word):  # argparse makes an empty list of it
            parser.error(f"{word}: -- is not a value; write ./-- for a file of this name")

    def parse_and_run(options: argparse.Namespace) -> int:
        parse(words[1:], options)  # prints the help, too
        _expand_homes(parser, options)
        return int(command.run(options))

    return run_command(name, parse_and_run, argparse.Namespace())


def _expand_homes(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Replace ~ at the start of every argument, as no shell does in --output=~/x."""
    for name, value in vars(options).items():
        if isinstance(value, str | pathlib.Path) and "\0" in str(value):
            parser.error(f"--{name.replace('_', '-')}: it holds a null character")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str | pathlib.Path) and not _is_unicode(str(item)):
                parser.error(f"--{name.replace('_', '-')}: it is not UTF-8 text")
        try:
            if isinstance(value, list):
                value = [expand_home(item) for item in value]
            elif isinstance(value, str | pathlib.Path):
                value = type(value)(expand_home(str(value)))
        except ValueError as error:
            parser.error(f"--{name.replace('_', '-')}: {error}")
        setattr(options, name, value)


def _is_unicode(text: str) -> bool:
    """Return whether a word of the command line was UTF-8, as libraries expect of paths."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = Parser(
        prog="scaleup",
        description=f"{scaleup.__doc__.splitlines()[0]}\n\ncommands:\n"
        + "\n".join(f"  {name:<{width}} {summary}" for name, summary in COMMANDS.items()),
        epilog="`scaleup COMMAND --help` describes a command.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the above")
    parser.add_argument("--version", action="version", version=scaleup.__version__)
    return parser


def _quiet_libraries() -> None:
    """Silence what other libraries say about themselves. Call this before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Each attempt to reach the hub is a warning. The error at the end says what is wrong.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # PEFT imports bitsandbytes wherever it is installed, which then misses an optional kernel.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def hide_progress_bars() -> None:
    """Hide the progress bars of transformers and datasets."""
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
