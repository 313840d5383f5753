"""The data and the processes in which a trained model and its export are measured."""

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

import datasets
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction

from scaleup.backbone import weights
from scaleup.backbone.lengths import fit_length
from scaleup.data import splits, tasks
from scaleup.data.examples import Examples
from scaleup.data.pairs import separate_pairs
from scaleup.errors import CheckpointError, ConfigError, ExportError
from scaleup.export import measure
from scaleup.export.calibrate import TrainedJob, TrainedMeasurements
from scaleup.export.kinds import KINDS
from scaleup.export.measure import FolderJob, Job, Measurements
from scaleup.export.report import Export, ExportOptions
from scaleup.io import read_json
from scaleup.settings import schema
from scaleup.settings.data import DataSettings

ROOT = pathlib.Path(__file__).resolve().parents[2]
BATCH = 16

M = TypeVar("M", bound="Saved")
J = TypeVar("J", bound=TrainedJob)


class Saved(Protocol):
    """What a process of an export leaves in a file."""

    @classmethod
    def load(cls, path: str) -> Self: ...


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

    def unused_rows(self, most: int) -> datasets.Dataset | None:
        """Return at most `most` tokenized rows of the training data that data.k left out.

        None of them is in the development set. Returns None if there are no such rows, or if a row
        of the data is not exactly one example.
        """
        data = self.data
        counts = [s.get("rows") for s in self.examples.sources if s["split"] == "train"]
        mixed = any(source.weight != 1 for source in data.sources or [])
        if data.k == "all" or data.streaming or data.packing or mixed or None in counts:
            return None
        has_dev = splits.has_own_dev(data)
        first = data.k + (0 if has_dev else data.dev_size)
        last = min(sum(counts) - (0 if has_dev else 1), first + most)
        if last <= first:
            return None
        # The rows of a run are the first ones of one order, whatever their number.
        larger = data.model_copy(update={"k": last} | ({} if has_dev else {"dev_size": 1}))
        rows = self.module.tokenize(self._load_texts(larger), self.tokenizer, larger).train
        return rows.select(range(first, last)) if len(rows) == last else None

    def _load_texts(self, data: DataSettings) -> Examples:
        try:
            return self.module.load(data)
        except ConfigError as error:
            problem = "the run's data is needed to measure the export"
            if not KINDS[self.options.kind].needs_data:
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
        before, now = _hashes(self.export.manifest.data), _hashes(texts.sources)
        if self.options.calibrate not in ("dev", "test"):  # the file replaces it
            before.pop("validation", None)
        for split, hashes in before.items():
            if now.get(split) != hashes:
                raise ConfigError(
                    f"--calibrate: the run's {split} data has changed since training, so dev would "
                    "not be the same examples; restore it, or name a file"
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
        """Measure an exported folder in a process without scaleup and, unless it is lora, PEFT."""
        fields: dict[str, Any] = {"folder": str(folder.resolve())}
        if self.options.kind == "lora":
            model, config = self.settings.model, self.export.config
            settings = {"pad_token_id": config.pad_token_id}
            if not self.task.writes:
                settings["num_labels"] = config.num_labels
                settings["ignore_mismatched_sizes"] = True  # the adapter has the head
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


def _hashes(sources: list[dict[str, Any]]) -> dict[str, list[str | None]]:
    """Return the hashes of the sources of each split, in their order."""
    hashes: dict[str, list[str | None]] = {}
    for source in sources:
        hashes.setdefault(source["split"], []).append(source.get("sha256"))
    return hashes


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
