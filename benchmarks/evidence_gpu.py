"""Run as much of the MPNet sweep as a time limit allows, several trials at a time on one GPU.

    python -m benchmarks.evidence_gpu --model models/mpnet --glue ../shared/data/glue --output \
        results/mpnet_gpu.csv

The trials of the first seeds come first. At the limit running trials are stopped, and the table has
the finished ones. `--model` may be a folder whose weights are split into files of less than 64 MiB
(benchmarks/model_parts.py). Words like train.num_train_epochs=5 are settings of every trial.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

from benchmarks.cases import ROOT, argument_parser

SWEEP = ROOT / "configs" / "sweeps" / "mpnet.yaml"
SAVING_S = 60  # time for running trials to save and end


def main() -> int:
    """Run the sweep and copy its table; return 0 if there are results."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--model", type=pathlib.Path, default=ROOT / "models" / "mpnet")
    add("--glue", type=pathlib.Path, default=ROOT.parent / "shared" / "data" / "glue")
    add("--seconds", type=int, default=450, help="time after which no trial goes on")
    add("--jobs", type=int, default=12, help="trials at a time")
    add("--sweep", type=pathlib.Path, default=SWEEP, help="the sweep file")
    add("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evidence-") as folder:
        command = [sys.executable, "-m", "scaleup", "sweep", str(options.sweep)]
        command += ["--jobs", str(options.jobs), f"model.name={options.model.resolve()}"]
        command += [f"data.path={options.glue.resolve()}", *options.overrides]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=folder, env=environment)
        for seconds in (options.seconds, SAVING_S):
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)  # the second signal kills the trials
        process.wait()
        tables = list(pathlib.Path(folder).glob("runs/*/results.csv"))
        if not tables:
            print("error: no trial has finished", file=sys.stderr)
            return 1
        options.output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tables[0], options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
