"""Run the command line with `python -m scaleup`."""

import sys

from scaleup.cli import main

if __name__ == "__main__":
    sys.exit(main())
