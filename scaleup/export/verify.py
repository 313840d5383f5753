"""Compare a trained model with its export, over the same batches."""

import pathlib
import statistics

import torch

from scaleup.errors import ExportError
from scaleup.export.calibrate import Place, TrainedMeasurements
from scaleup.export.evaluation import Evaluation
from scaleup.export.kinds import KINDS
from scaleup.export.measure import Measurements
from scaleup.export.report import ExportOptions, Metric, Proof
from scaleup.unipelt.submodule import Gates

SAME_SCORE = 2.0  # points by which another device or data type may change the run's score
# Difference that rounding explains, by the data type of the weights, if the largest logit is 1. It
# grows with larger logits. In 16 bits the mean difference is compared, because merged weights are
# rounded again, which moves single logits further.
ROUNDING = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def dtype_name(dtype: torch.dtype) -> str:
    """Return a name such as "float32"."""
    return str(dtype).removeprefix("torch.")


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
    reloaded = (after.logits - expected.logits).abs()
    reload_difference = reloaded.max().item()
    rounded = reload_difference if dtype == torch.float32 else reloaded.mean().item()
    if not rounded <= ROUNDING[dtype] * max(1.0, expected.logits.abs().max().item()):
        raise ExportError(
            "in a new process, the logits of the export differ from the expected ones by "
            f"{rounded:.2g}; nothing was kept. Please report this"
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
    advice = KINDS[options.kind].advice
    raise ExportError(
        f"{metric.name} on {options.calibrate} went from {before} to {after}, more than "
        f"--max-metric-drop {options.max_metric_drop:g} allows; nothing was kept"
        + (f"; {advice}" if advice else "")
    )
