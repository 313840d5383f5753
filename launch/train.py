"""Start `scaleup train` from a launcher that takes a script, such as `accelerate launch`.

accelerate launch launch/train.py --config configs/quickstart.yaml train.max_steps=20
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from scaleup.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
