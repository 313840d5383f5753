"""Write the JSON schema of the config files, with which editors complete and check them.

scaleup schema --output configs/schema.json
"""

import argparse
import json
from pathlib import Path

from scaleup.cli.exit_codes import DONE
from scaleup.io import write_text


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    output = "file to write (default: print the schema)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=output)


def run(options: argparse.Namespace) -> int:
    """Write or print the schema. Returns the exit code."""
    from scaleup.settings.describe import json_schema

    text = json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"
    if options.output is None:
        print(text, end="")
    else:
        write_text(options.output, text)
        print(f"{options.output}: written")
    return DONE
