"""Upload an export, or the adapter of a checkpoint, to the Hugging Face hub.

    scaleup push EXPORT --repo me/film-reviews --private
    scaleup push RUN/best --repo me/film-reviews

EXPORT is a folder that `scaleup export` has written. A checkpoint is exported as `exact` first, and
scored, so that the model card has the base model, the data, the metric and the lines that load it.
Log in with `hf auth login`, or set HF_TOKEN. Files of the repository that are not uploaded stay.

Exit codes: 0 done; 1 the hub could not be reached, or the export failed its verification; 2 an
argument, the checkpoint or the login must change; 130 interrupted.
"""

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scaleup.cli.exit_codes import DONE
from scaleup.errors import ConfigError

KEY = "--repo"
MESSAGE = "Upload with scaleup"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="an export, or best/, final/ or checkpoint-N/")
    add("--repo", required=True, metavar="USER/NAME", help="repository; a new one is created")
    private = "create a repository that only its owner can see"
    add("--private", action="store_true", help=private)
    add("--revision", metavar="BRANCH", help="branch to upload to (default: main)")
    message = "message of the commit"
    add("--message", default=MESSAGE, metavar="TEXT", help=message)


def run(options: argparse.Namespace) -> int:
    """Upload, and print the address. Returns the exit code."""
    folder = options.folder
    exported = (folder / "export.json").is_file()
    if not exported and not (folder / "manifest.json").is_file():
        problem = "is neither an export (with export.json) nor a checkpoint (with manifest.json)"
        raise ConfigError(f"DIR: {folder} {problem}")
    from scaleup.export.push import check_access, push

    check_access(options.repo, KEY)
    with contextlib.nullcontext(folder) if exported else adapter_of(folder) as content:
        address = push(
            content,
            options.repo,
            private=options.private,
            revision=options.revision,
            message=options.message,
            key=KEY,
        )
    print(address)
    return DONE


@contextlib.contextmanager
def adapter_of(checkpoint: Path) -> Iterator[Path]:
    """Yield a temporary folder with a checkpoint as an adapter, its scores and its card."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess, and warn
    from scaleup.cli.entry import hide_progress_bars
    from scaleup.export import export

    hide_progress_bars()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "adapter"
        export.run(export.ExportOptions(checkpoint, "exact", folder), lambda _: None)
        yield folder
