"""Compares a trained model with its export, each in its own process, over the same batches."""

import contextlib
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction

from scaleup.backbone import weights
from scaleup.backbone.lengths import fit_length
from scaleup.data import tasks
from scaleup.data.examples import Examples
from scaleup.data.pairs import separate_pairs
from scaleup.errors import CheckpointError, ConfigError, ExportError
from scaleup.export import measure
from scaleup.export.calibrate import Place, TrainedJob, TrainedMeasurements
from scaleup.export.measure import FolderJob, Job, Measurements
from scaleup.export.report import Export, ExportOptions, Metric, Proof
from scaleup.io import read_json
from scaleup.settings import schema
from scaleup.settings.data import DataSettings
from scaleup.unipelt.submodule import Gates

ROOT = pathlib.Path(__file__).resolve().parents[2]
BATCH = 16
SAME_SCORE = 2.0  # points by which another device or data type may change the run's score
# Largest difference that rounding explains, by the data type of the weights, if the largest logit
# is 1. It grows with larger logits.
ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

M = TypeVar("M", bound="Saved")
J = TypeVar("J", bound=TrainedJob)


class Saved(Protocol):
    """What a process of an export leaves in a file."""

    @classmethod
    def load(cls, path: str) -> Self: ...


def dtype_name(dtype: torch.dtype) -> str:
    """Return a name such as "float32"."""
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def _deferred_signals() -> Iterator[None]:
    """Handle the signals that end an export at the end of the block, if they arrive inside it."""
    arrived: list[int] = []
    numbers: tuple[int, ...] = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    handlers = {n: h for n in numbers if callable(h := signal.getsignal(n))}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}  # only the main thread may set handlers, and Python runs them there
    for number in handlers:
        signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in arrived:
            os.kill(os.getpid(), number)


class Evaluation:
    """Measures models over the data that an export is compared on.

    Args:
        export: the export.
        work: folder for temporary files.

    Raises:
        ConfigError: the data is missing or has changed since the run.
    """

    def __init__(self, export: Export, work: pathlib.Path):
        self.export, self.options, self.work = export, export.options, work
        self.settings = export.settings
        if self.options.metric is not None:
            data = self.settings.data.model_copy(update={"metric": self.options.metric})
            self.settings = self.settings.model_copy(update={"data": data})
        self.task = tasks.of(self.settings.data)
        self.module: Any = self.task.module
        self.tokenizer = export.tokenizer
        data, chosen = fit_length(self.settings, export.config).data, self.options.calibrate
        self.data = data
        if chosen not in ("dev", "test"):
            data = data.model_copy(update={"validation_file": chosen})
        texts = self._load_texts(data)
        self._check_unchanged(texts)
        self._check_pairs(texts)
        self.examples = self.module.tokenize(texts, self.tokenizer, data)
        if chosen == "test" and self.examples.test is None:
            raise ConfigError("--calibrate: the run has no test data; use dev or a file")
        self.run_score = _run_score(self.options, self.examples.metric)
        rows = self.examples.test if chosen == "test" else self.examples.dev
        collate = self.module.collator(self.tokenizer, data)
        self.batches: list[dict[str, torch.Tensor]] = [
            dict(collate([rows[i] for i in range(start, min(start + BATCH, len(rows)))]))
            for start in range(0, len(rows), BATCH)
        ]
        torch.save(self.batches, work / "batches.pt")
        (work / "config.yaml").write_text(schema.to_yaml(self.settings), encoding="utf-8")

    @property
    def size(self) -> int:
        """Return the number of examples."""
        return self.examples.count("test" if self.options.calibrate == "test" else "dev")

    def _load_texts(self, data: DataSettings) -> Examples:
        try:
            return self.module.load(data)
        except ConfigError as error:
            problem = "the run's data is needed to measure the export"
            if self.options.kind in ("exact", "standalone"):
                problem += "; --no-verify does without it"
            raise ConfigError([*error.problems, problem]) from None

    def _check_pairs(self, texts: Examples) -> None:
        """Raise ConfigError if the run joined its pairs of texts without a separator."""
        is_pair = "text_pair" in texts.dev.column_names
        if is_pair and separate_pairs(self.tokenizer) is not self.tokenizer:
            raise ConfigError(
                f"--checkpoint: {self.options.checkpoint} was trained on pairs of texts without a "
                "separator, by an earlier version of scaleup; train it again"
            )

    def _check_unchanged(self, texts: Examples) -> None:
        """Raise ConfigError if the run's data is not what it was trained with."""
        current = {source["split"]: source.get("sha256") for source in texts.sources}
        for source in self.export.manifest.data:
            split = source["split"]
            replaced = split == "validation" and self.options.calibrate not in ("dev", "test")
            if current.get(split) != source.get("sha256") and not replaced:
                raise ConfigError(
                    f"--calibrate: the run's {split} data has changed since, so that dev would be "
                    "other examples; restore it, or name a file"
                )

    def _files(self, name: str) -> dict[str, Any]:
        """Return the fields that all jobs have."""
        generate: dict[str, int] | None = tasks.generation(self.settings.data, self.examples.metric)
        if generate is not None:
            generate = generate | {"pad_token_id": self.tokenizer.pad_token_id}
        return {
            "batches": str(self.work / "batches.pt"),
            "output": str(self.work / f"{name}.pt"),
            "writes": self.task.writes,
            "outputs": list(self.task.outputs),
            "generate": generate,
            "offload": str(self.work / f"{name}-weights"),
            "memory": self.options.max_memory_bytes,
        }

    def run_process(self, name: str, command: list[str], job: Job, result: type[M]) -> M:
        """Run `python COMMAND JOB.json` and return what it measured, as the class `result`.

        Raises:
            ExportError: the process failed. The message ends with its last line.
        """
        path = self.work / f"{name}.json"
        path.write_text(job.to_json(), encoding="utf-8")
        # The process runs in the current folder, because paths of the run may be relative to it.
        # Both commands keep Python from importing modules from there (-P or -I).
        module_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        process = None
        try:
            with _deferred_signals():  # else a child that was just started could be lost
                process = subprocess.Popen(
                    [sys.executable, *command, str(path)],
                    env=os.environ | {"PYTHONPATH": module_path},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                )
            _, output = process.communicate()
        finally:
            if process is not None:
                process.kill()
                process.wait()
        if process.returncode:
            lines = [line for line in output.splitlines() if line.strip()]
            killed = f"exit code {process.returncode}, maybe because memory ran out"
            raise ExportError(f"{name} failed: {(lines or [killed])[-1][:500]}")
        return result.load(job.output)

    def trained_job(self, kind: type[J], name: str, **fields: Any) -> J:
        """Return a job on the trained model; `fields` are those of its class."""
        known = {
            "checkpoint": str(self.options.checkpoint.resolve()),
            "dtype": self.export.manifest.backbone.get("dtype"),
            "config": str(self.work / "config.yaml"),
            "labels": self.export.manifest.labels,
        }
        return kind(**self._files(name) | known | fields)

    def measure_trained(self, name: str, **fields: Any) -> TrainedMeasurements:
        """Measure the model as it was trained; `fields` are those of a TrainedJob."""
        job = self.trained_job(TrainedJob, name, **fields)
        command = ["-P", "-m", "scaleup.export.calibrate"]
        return self.run_process(name, command, job, TrainedMeasurements)

    def measure_export(self, folder: pathlib.Path) -> Measurements:
        """Measure an exported folder where scaleup does not exist, nor PEFT if it is no adapter."""
        fields: dict[str, Any] = {"folder": str(folder.resolve())}
        if self.options.kind == "lora":
            model, config = self.settings.model, self.export.config
            settings = {"pad_token_id": config.pad_token_id}
            if not self.task.writes:
                settings["num_labels"] = config.num_labels
            backbone = weights.checkpoint_folder(model.name, model.revision).resolve()
            fields = {"adapter": fields["folder"], "folder": str(backbone), "settings": settings}
        job = FolderJob(
            auto=self.export.auto.__name__,
            attention=self.settings.model.portable_attention,
            **fields,
            **self._files("after"),
        )
        return self.run_process("after", ["-I", measure.__file__], job, Measurements)

    def score(self, measured: Measurements) -> float:
        """Return the run's metric in points, or the loss."""
        name = self.examples.metric
        if name == "loss":
            assert measured.loss is not None
            return measured.loss
        metric = self.module.compute_metrics(self.examples, self.tokenizer)
        outputs = self._outputs(measured)
        return 100 * metric(EvalPrediction(predictions=outputs, label_ids=self._numbers()))[name]

    def _numbers(self) -> np.ndarray:
        """Return the labels of the examples, or the numbers by which metrics look them up."""
        key = "reference" if "reference" in self.batches[0] else "labels"
        return torch.cat([batch[key] for batch in self.batches]).numpy()

    def _outputs(self, measured: Measurements) -> np.ndarray:
        """Return the outputs of the model as metrics take them, one row per example."""
        if measured.written:
            longest, pad = max(map(len, measured.written)), self.tokenizer.pad_token_id
            return np.array([row + [pad] * (longest - len(row)) for row in measured.written])
        if not self.task.by_token and len(self.task.outputs) == 1:
            return measured.logits.numpy()
        lengths = [n for batch in self.batches for n in batch["attention_mask"].sum(1).tolist()]
        return pad_sequence(list(measured.logits.split(lengths)), batch_first=True).numpy()

    def agreement(self, before: Measurements, after: Measurements) -> float | None:
        """Return the share of examples with the same prediction, None if there is none."""
        if before.written:
            texts = [
                self.tokenizer.batch_decode(measured.written, skip_special_tokens=True)
                for measured in (before, after)
            ]
            return statistics.mean(one == other for one, other in zip(*texts))
        if self.task.lines is not None and not self.task.writes:
            pair = (
                self.task.lines(
                    *(self.examples, self.tokenizer, self._outputs(measured), self._numbers())
                )
                for measured in (before, after)
            )
            return statistics.mean(one == other for one, other in zip(*pair))
        if self.examples.labels is None:
            return None
        return (before.logits.argmax(-1) == after.logits.argmax(-1)).float().mean().item()


def verify_export(
    evaluation: Evaluation,
    folder: pathlib.Path,
    before: TrainedMeasurements,
    gates: Gates | None,
    dropped: set[Place],
    updates: pathlib.Path | None = None,
) -> Proof:
    """Load an export in a new process and compare it with the trained model.

    Args:
        evaluation: the data and the processes.
        folder: the export.
        before: measurements of the trained model.
        gates: constants in place of the gates, None if the gates stay learned.
        dropped: (site, submodule) pairs that are left out.
        updates: file of the updates that absorb UniPELT.

    Raises:
        ExportError: the logits are not those that were expected, or the metric drops too much.
    """
    options, dtype = evaluation.options, evaluation.export.dtype
    expected: Measurements = before
    after: Measurements
    # A run in bfloat16 that is exported in another type is compared in that type.
    other_dtype = before.dtype not in ("float32", dtype_name(dtype))
    quantized = evaluation.settings.model.quantization != "none"
    if options.kind == "exact":
        checkpoint = str(folder.resolve())
        after = evaluation.measure_trained("after", with_peft=True, checkpoint=checkpoint)
    else:
        if gates is not None or updates is not None or other_dtype or quantized:
            expected = evaluation.measure_trained(
                "expected",
                full_precision=True,
                **({"dtype": dtype_name(dtype)} if other_dtype else {}),
                gates=None if gates is None else [(*key, value) for key, value in gates.items()],
                dropped=sorted(dropped),
                updates=None if updates is None else str(updates),
            )
        after = evaluation.measure_export(folder)
    reload_difference = (after.logits - expected.logits).abs().max().item()
    if not reload_difference <= ROUNDING[dtype] * max(1.0, expected.logits.abs().max().item()):
        raise ExportError(
            "the export gives other logits in a new process than it should, by "
            f"{reload_difference:.2g}; nothing was kept. Please report this"
        )
    name = evaluation.examples.metric
    scores = evaluation.score(before), evaluation.score(after)
    _check_run_score(evaluation, name, scores[0])
    metric = Metric(name, round(scores[0], 6), round(scores[1], 6))
    _check_drop(options, metric)
    differences = (after.logits - before.logits).abs()
    measured: dict[str, Measurements] = {"before": before, "after": after}
    return Proof(
        data=options.calibrate,
        examples=evaluation.size,
        reload_difference=reload_difference,
        logit_difference={"max": differences.max().item(), "mean": differences.mean().item()},
        metric=metric,
        agreement=evaluation.agreement(before, after),
        milliseconds_per_batch={
            key: round(1000 * statistics.median(m.seconds), 2) for key, m in measured.items()
        },
        peak_memory_mib={key: round(m.peak_mib, 1) for key, m in measured.items()},
    )


def _run_score(options: ExportOptions, name: str) -> float | None:
    """Return the run's own score of the checkpoint in points, or None if it has none.

    Only `best` was scored by the run. A run's loss is a mean over batches and cannot be compared.
    """
    path = options.checkpoint.parent / "results.json"
    is_best = options.calibrate == "dev" and options.checkpoint.name == "best"
    if not is_best or not path.is_file() or name == "loss" or options.metric is not None:
        return None
    try:
        return 100 * float(read_json(path)["dev"][name])
    except (ValueError, KeyError, TypeError):
        advice = "remove it to export without a comparison with the run's score"
        raise CheckpointError(f"{path} is damaged; {advice}") from None


def _check_run_score(evaluation: Evaluation, name: str, score: float) -> None:
    """Raise ExportError if the trained model scores differently than at the end of its run."""
    run_score = evaluation.run_score
    if run_score is not None and abs(score - run_score) > SAME_SCORE:
        raise ExportError(
            f"{evaluation.options.checkpoint} scores {score:.2f} {name} now and {run_score:.2f} in "
            "its run; is the backbone still the one that it was trained on? Nothing was kept"
        )


def _check_drop(options: ExportOptions, metric: Metric) -> None:
    """Raise ExportError if the export loses more of the metric than allowed."""
    if not metric.drop > options.max_metric_drop:
        return
    before, after = metric.shown
    advice = {
        "merged": "; --kind standalone keeps the learned gates",
        "plain": "; more --rank, --examples or --epochs lose less, --kind standalone nothing",
        "lora": "; more --rank, --examples or --epochs lose less, --kind exact nothing",
        "standalone": "; the data type or the quantisation of the weights is the cause: "
        "try --dtype float32",
    }
    raise ExportError(
        f"{metric.name} on {options.calibrate} went from {before} to {after}, more than "
        f"--max-metric-drop {options.max_metric_drop:g} allows; nothing was kept"
        + advice.get(options.kind, "")
    )
