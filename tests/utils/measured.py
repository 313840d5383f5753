"""Started by tests/test_plan.py in every process: a real training run that counts its own tensors.

    python -m torch.distributed.run … tests/measured.py OUT section.key=value …

Writes OUT.<rank>.json: `rest`, bytes of all live tensors before the third step; `peak`, the most during that step, from the
CPU allocator's own record.
"""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from scaleup.experiments.meter import allocated_peak, live_bytes
from scaleup.settings import schema as config
from scaleup.training import distributed as runtime
from scaleup.training import run as train


class Enough(Exception):
    pass


def main() -> None:
    out, *overrides = sys.argv[1:]
    steps = []
    plain_step = train.RunTrainer.training_step

    def step(self, model, inputs, *args, **kwargs):
        steps.append(None)
        if len(steps) < 3:
            return plain_step(self, model, inputs, *args, **kwargs)
        rest = live_bytes()
        peak = rest + allocated_peak(lambda: plain_step(self, model, inputs, *args, **kwargs))
        pathlib.Path(f"{out}.{os.environ['RANK']}.json").write_text(
            json.dumps({"rest": rest, "peak": peak, "shape": list(inputs["input_ids"].shape)})
        )
        raise Enough

    train.RunTrainer.training_step = step
    try:
        train.run(config.load(None, overrides))
    except Enough:
        runtime.leave()


if __name__ == "__main__":
    main()
