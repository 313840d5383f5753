"""What an export is measured with: the trained model and the export, each in a process of its own, over the same batches.

The processes are scaleup.export.calibrate, which loads the trained model, and scaleup.export.measure, which loads an exported folder as its user would.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoTokenizer, EvalPrediction, PretrainedConfig, PreTrainedTokenizerBase

from scaleup.backbone.lengths import fit_length
from scaleup.data import tasks
from scaleup.data.files import Examples
from scaleup.errors import ConfigError, ExportError
from scaleup.export import fold
from scaleup.settings import schema as config
from scaleup.settings.schema import Settings
from scaleup.training.checkpoint import Manifest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BATCH = 16
SAME_SCORE = (
    2.0  # points by which a score may differ from the run's own: another device, another type
)
# Largest difference that rounding explains, of logits whose largest is 1 or more, by the type weights are written in.
ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to export and how; see scaleup export for the meaning of each.

    calibrate: "dev", "test" or a file with the columns of the run's own. max_shard_bytes: of one weights file.
    """

    checkpoint: pathlib.Path
    kind: str
    output: pathlib.Path
    config: pathlib.Path | None = None
    backbone: str | None = None
    calibrate: str = "dev"
    examples: int = 256
    prune: float = 0.0
    dtype: str | None = None
    max_shard_bytes: int = 2 * 10**9
    verify: bool = True
    max_metric_drop: float = 1.0


@dataclasses.dataclass
class Job:
    """What the steps share."""

    options: Options
    settings: Settings
    manifest: Manifest
    work: pathlib.Path
    say: Callable[[str], None]
    examples: Examples | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    batches: list[dict[str, torch.Tensor]] = dataclasses.field(default_factory=list)

    def process(self, name: str, module: list[str], **job: object) -> dict:
        """Runs a job in a fresh process; what it measured. Raises ExportError with its last words."""
        files = {"batches": str(self.work / "batches.pt"), "output": str(self.work / f"{name}.pt")}
        (self.work / f"{name}.json").write_text(
            json.dumps(job | files | {"generate": self.generate}), encoding="utf-8"
        )
        command = [sys.executable, *module, str(self.work / f"{name}.json")]
        # In this folder, as paths of the run may be relative; scaleup is found all the same.
        here = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            )
        }
        done = subprocess.run(
            command,
            env=here,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        if done.returncode:
            words = [line for line in done.stderr.splitlines() if line.strip()] or [
                f"exit code {done.returncode}, as of a process killed for memory"
            ]
            raise ExportError(f"{name} failed: {words[-1][:500]}")
        return torch.load(self.work / f"{name}.pt")

    def trained(self, name: str, **job: object) -> dict:
        """The model as it was trained."""
        usual = {
            "weights": "trained",
            "full_precision": False,
            "dtype": None,
            "calibrate": 0,
            "gates": None,
            "dropped": [],
        }
        fixed = {
            "config": str(self.work / "config.yaml"),
            "labels": self.manifest.labels,
            "checkpoint": str(self.options.checkpoint.resolve()),
        }
        return self.process(name, ["-m", "scaleup.export.calibrate"], **(usual | fixed | job))

    @property
    def generate(self) -> dict | None:
        found = tasks.generation(self.settings.data, self.examples.metric)
        return found and found | {"pad_token_id": self.tokenizer.pad_token_id}


def prepare(job: Job, shape: PretrainedConfig) -> None:
    """The examples to measure on, as batches, and what the processes need beside them."""
    settings, asked = job.settings, job.options.calibrate
    settings = fit_length(settings, shape)
    if asked not in ("dev", "test"):
        settings = settings.model_copy(
            update={"data": settings.data.model_copy(update={"validation_file": asked})}
        )
    module = tasks.of(settings.data).module
    job.tokenizer = AutoTokenizer.from_pretrained(job.options.checkpoint)
    try:
        loaded = module.load(settings.data)
    except ConfigError as error:
        raise ConfigError(
            [
                *error.problems,
                "the run's data is needed to measure the export"
                + ("" if job.options.kind == "merged" else "; --no-verify leaves that out"),
            ]
        ) from None
    own = {source["split"]: source for source in loaded.sources}
    for then in job.manifest.data:
        now = own.get(then["split"], {})
        if now.get("sha256") != then.get("sha256") and (
            then["split"] != "validation" or asked in ("dev", "test")
        ):
            raise ConfigError(
                [
                    f"--calibrate: the run's {then['split']} data has changed since; dev would not be what it was. Put it back, or name a file"
                ]
            )
    examples = module.tokenize(loaded, job.tokenizer, settings.data)
    if asked == "test" and examples.test is None:
        raise ConfigError(["--calibrate: the run has no test data; use dev or a file"])
    job.examples = examples
    rows = examples.test if asked == "test" else examples.dev
    collate = module.collator(job.tokenizer, settings.data)
    job.batches = [
        dict(collate([rows[i] for i in range(first, min(first + BATCH, len(rows)))]))
        for first in range(0, len(rows), BATCH)
    ]
    torch.save(job.batches, job.work / "batches.pt")
    (job.work / "config.yaml").write_text(config.to_yaml(job.settings), encoding="utf-8")


def points(job: Job, found: dict) -> float:
    """The run's metric of what a process measured, in points."""
    name = job.examples.metric
    if name == "loss":
        return 100 * found["loss"]
    if found["written"]:
        longest = max(map(len, found["written"]))
        pad = job.tokenizer.pad_token_id
        outputs = np.array([row + [pad] * (longest - len(row)) for row in found["written"]])
        labels = torch.cat([batch["reference"] for batch in job.batches]).numpy()
    else:
        outputs, labels = (
            found["logits"].numpy(),
            torch.cat([batch["labels"] for batch in job.batches]).numpy(),
        )
    metric = tasks.of(job.settings.data).module.compute_metrics(job.examples, job.tokenizer)
    return 100 * metric(EvalPrediction(predictions=outputs, label_ids=labels))[name]


def _agreement(job: Job, before: dict, after: dict) -> float | None:
    """Share of examples with the same class or the same text; None for a regression and where only the loss counts."""
    if before["written"]:
        pairs = zip(_texts(job, before), _texts(job, after))
        return statistics.mean(a == b for a, b in pairs)
    if job.examples.labels is None:
        return None
    return (before["logits"].argmax(-1) == after["logits"].argmax(-1)).float().mean().item()


def _texts(job: Job, found: dict) -> list[str]:
    return [job.tokenizer.decode(row, skip_special_tokens=True) for row in found["written"]]


def prove(
    job: Job,
    written: pathlib.Path,
    before: dict,
    gates: fold.Gates | None,
    dropped: set,
    dtype: torch.dtype,
) -> dict:
    """Loads the export in a fresh process and compares: with what it must give (raises ExportError), and with the trained model."""
    quantised = job.settings.model.quantization != "none"
    if job.options.kind == "exact":
        expected, after = (
            before,
            job.trained("after", weights="user", checkpoint=str(written.resolve())),
        )
    else:
        expected, written_in = before, str(dtype).removeprefix("torch.")
        halved = before["dtype"] not in (
            "float32",
            written_in,
        )  # a run in bfloat16, exported in another type: what it must give is computed in that one
        if gates is not None or quantised or halved:
            constants = None if gates is None else [[*key, value] for key, value in gates.items()]
            expected = job.trained(
                "expected",
                full_precision=True,
                dtype=written_in if halved else None,
                gates=constants,
                dropped=sorted(dropped),
            )
        folder = {
            "folder": str(written.resolve()),
            "auto": tasks.of(job.settings.data).auto.__name__,
            "attention": job.settings.model.attention,
        }
        after = job.process(
            "after", ["-I", str(ROOT / "scaleup" / "export" / "measure.py")], **folder
        )
    scale = max(1.0, expected["logits"].abs().max().item())
    off = (after["logits"] - expected["logits"]).abs().max().item()
    if not off <= ROUNDING[dtype] * scale:
        raise ExportError(
            f"the export gives other logits in a fresh process than were measured here, by {off:.2g}; nothing was kept. Please report this"
        )
    difference = (after["logits"] - before["logits"]).abs()
    scores, name = [points(job, found) for found in (before, after)], job.examples.metric
    results = job.options.checkpoint.parent / "results.json"
    if (
        job.options.calibrate == "dev"
        and job.options.checkpoint.name == "best"
        and results.is_file()
        and name != "loss"
    ):  # a run's loss is a mean over batches
        then = 100 * json.loads(results.read_text(encoding="utf-8"))["dev"][name]
        if abs(scores[0] - then) > SAME_SCORE:
            raise ExportError(
                f"{job.options.checkpoint} scores {scores[0]:.2f} {name} here, {then:.2f} in its run; is the backbone still the one it was trained on? Nothing was kept"
            )
    drop = scores[1] - scores[0] if name == "loss" else scores[0] - scores[1]
    proof = {
        "data": job.options.calibrate,
        "examples": sum(len(batch["labels"]) for batch in job.batches),
        "reload_difference": off,
        "logit_difference": {"max": difference.max().item(), "mean": difference.mean().item()},
        "metric": {"name": name, "before": round(scores[0], 4), "after": round(scores[1], 4)},
        "agreement": _agreement(job, before, after),
        "milliseconds_per_batch": {
            key: round(1000 * statistics.median(found["seconds"]), 2)
            for key, found in (("before", before), ("after", after))
        },
        "peak_memory_mib": {
            key: round(found["peak_mib"], 1)
            for key, found in (("before", before), ("after", after))
        },
    }
    if drop > job.options.max_metric_drop:
        kept = {
            "merged": "--kind standalone keeps the gates",
            "standalone": "it was the type or the quantisation of the weights: try --dtype float32",
        }
        raise ExportError(
            f"{name} on {job.options.calibrate} went from {scores[0]:.2f} to {scores[1]:.2f}, more than --max-metric-drop {job.options.max_metric_drop:g} allows; "
            f"nothing was kept. {kept.get(job.options.kind, '')}".rstrip()
        )
    return proof
