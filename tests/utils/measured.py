"""Train for three steps and measure this process's tensors during the third.

    python -m torch.distributed.run … tests/utils/measured.py OUT section.key=value …

Every process writes OUT.<rank>.json: `rest`, the bytes of all live tensors before the third step;
`peak`, the most bytes during that step as the CPU allocator records them; `shape`, that of
input_ids. tests/unit/memory/test_plan.py compares them with the plan.
"""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from scaleup.experiments.meter import allocated_peak, live_bytes
from scaleup.settings import schema
from scaleup.training import distributed, run


class Measured(Exception):
    """Ends the run after the measurement."""


def main() -> None:
    """Train as the overrides on the command line say."""
    out, *overrides = sys.argv[1:]
    steps = 0
    training_step = run.RunTrainer.training_step

    def measured_step(self, model, inputs, *args, **kwargs):
        nonlocal steps
        steps += 1
        if steps < 3:
            return training_step(self, model, inputs, *args, **kwargs)
        rest = live_bytes()
        peak = rest + allocated_peak(lambda: training_step(self, model, inputs, *args, **kwargs))
        row = {"rest": rest, "peak": peak, "shape": list(inputs["input_ids"].shape)}
        pathlib.Path(f"{out}.{os.environ['RANK']}.json").write_text(json.dumps(row))
        raise Measured

    run.RunTrainer.training_step = measured_step
    try:
        run.run(schema.load(None, overrides))
    except Measured:
        distributed.leave()


if __name__ == "__main__":
    main()
