"""Callbacks of the training loop: graceful shutdown, log.jsonl, progress bars, gate statistics."""

import contextlib
import json
import math
import pathlib
import signal
from collections.abc import Iterator

import torch
import torch.distributed
from torch import nn
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback

from scaleup.data.examples import Examples
from scaleup.errors import Preempted
from scaleup.io import write_text
from scaleup.training import resume
from scaleup.training.signals import handle_save_signals
from scaleup.unipelt.gate import GateMoments, LearnedGate
from scaleup.unipelt.model import site_of

Means = dict[str, dict[str, dict[str, float]]]  # site → submodule → mean and std


class GateStatistics:
    """Mean and standard deviation of every gate of a model, over all processes."""

    def __init__(self, model: nn.Module, compiled: bool = False):
        self.gates: list[tuple[str, LearnedGate]] = []  # with the paths of their sites
        self.last: Means = {}  # what the last `drain` returned
        for name, module in model.named_modules():
            if isinstance(module, LearnedGate):
                module.statistics = GateMoments(len(module.names), module.bias.device)
                if compiled:  # CUDA graphs write only to tensors whose addresses are fixed
                    torch._dynamo.mark_static_address(module.statistics.sums_3N)
                self.gates.append((site_of(name), module))

    def drain(self) -> Means:
        """Return the statistics since the last call, and start anew. Every process must call this.

        It is the only point that waits for the device.
        """
        sums = [g.statistics.take() for _, g in self.gates if g.statistics is not None]
        if sums and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            joined_3N = torch.cat(sums, 1)
            torch.distributed.all_reduce(joined_3N)
            sums = joined_3N.split([part.shape[1] for part in sums], 1)
        self.last = {}
        for (site, gate), sums_3N in zip(self.gates, sums):
            # A linear layer may have a gate of LoRA and one of an adapter beside it.
            self.last.setdefault(site, {}).update(
                {
                    submodule: {"mean": round(mean, 6), "std": round(std, 6)}
                    for submodule, (mean, std) in zip(gate.names, GateMoments.moments(sums_3N))
                }
            )
        return self.last

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Collect nothing inside the block. Each step of `generate` would count as an example."""
        kept = {gate: gate.statistics for _, gate in self.gates}
        for gate in kept:
            gate.statistics = None
        try:
            yield
        finally:
            for gate, statistics in kept.items():
                gate.statistics = statistics

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """Return the means of the last `drain` under flat names, as experiment trackers want.

        Args:
            prefix: "eval_" for examples of an evaluation, which trackers then show apart.
        """
        return {
            f"{prefix}gates/{site}/{submodule}": value["mean"]
            for site, submodules in self.last.items()
            for submodule, value in submodules.items()
        }


class GracefulShutdown(TrainerCallback):
    """On a signal: finish the step or the batch of an evaluation, save a checkpoint, and stop.

    All ranks stop together. SIGTERM comes from a preemption, `scancel` or the eviction of a pod,
    SIGHUP from a terminal that is closed. This callback also logs whenever a checkpoint may be
    saved, so that a resumed run logs at the same steps as an uninterrupted one.

    Args:
        group: all processes of the run, on the CPU (`World.group`); None for one process.

    Attributes:
        stopped_by: the name of the signal once all ranks have agreed to stop, else None.
    """

    def __init__(self, group: torch.distributed.ProcessGroup | None) -> None:
        self.stopped_by: str | None = None
        self._signal = 0
        # A group on the CPU: the vote after each step must not wait for the GPU.
        self._group = group

    def install(self) -> None:
        """Install the signal handlers. Only the main thread of a process may do this."""
        handle_save_signals(self._remember)

    def _remember(self, number: int, frame: object) -> None:
        self._signal = number

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._vote():
            control.should_save = control.should_training_stop = True
        control.should_log |= control.should_save or control.should_evaluate

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        if self._vote():
            note = resume.how_to_continue(pathlib.Path(args.output_dir))
            raise Preempted(f"stopped by {self.stopped_by} during an evaluation; {note}")

    def _vote(self) -> bool:
        """Return whether any rank has received a signal. Every rank must call this."""
        number = torch.tensor(self._signal)
        if self._group is not None:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, self._group)
        if number.item():
            self.stopped_by = signal.Signals(int(number.item())).name
        return self.stopped_by is not None

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        in_epoch = abs(state.epoch - round(state.epoch)) > 1e-6
        if self.stopped_by is not None and in_epoch and state.global_step < state.max_steps:
            # Trainer also ends the epoch when it stops in the middle of one. The resumed run
            # evaluates at the real end of the epoch, or at the last step.
            control.should_save = control.should_evaluate = control.should_log = False
        control.should_log |= control.should_save or control.should_evaluate


class JsonlLogger(TrainerCallback):
    """Write log.jsonl in the processes with `writes`."""

    def __init__(self, path: pathlib.Path, gate_statistics: GateStatistics, writes: bool):
        self.path, self.gate_statistics, self.writes = path, gate_statistics, writes

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self.writes:
            rewind(self.path, state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not self.writes:
            return
        gates = ("gates/", "eval_gates/")
        flat = {key: value for key, value in logs.items() if not key.startswith(gates)}
        line = {"step": state.global_step, **flat}
        if "loss" in logs or "eval_loss" in logs:
            line["gates"] = self.gate_statistics.last
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def rewind(path: pathlib.Path, step: int) -> None:
    """Remove what a resumed run writes again: lines after `step`, and the summary of a stopped run.

    Damaged lines are removed, too.
    """
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        write_text(path, "".join(line.decode() for line in lines if _step(line) <= step))


def _step(line: bytes) -> float:
    """Return the step of a log line; infinity for the summary, or if the line is cut or damaged."""
    try:
        entry = json.loads(line.decode("utf-8")) if line.endswith(b"\n") else {}
        step = math.inf if "train_loss" in entry else entry["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int | float) and step >= 0 else math.inf


class ProgressBars(ProgressCallback):
    """Show one bar for training, with the newest loss and dev score, and one for each scoring."""

    def __init__(self, examples: Examples):
        super().__init__()
        self.metric, self.test = examples.metric, examples.test
        self.prediction_bar: tqdm | None = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True
            )

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        for key, name in (("loss", "loss"), (f"eval_{self.metric}", f"dev {self.metric}")):
            if key in logs:
                self.shown[name] = f"{logs[key]:.3f}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        if state.is_world_process_zero and self.prediction_bar is None:
            self.prediction_bar = tqdm(
                desc="test" if eval_dataloader.dataset is self.test else "dev",
                total=len(eval_dataloader),
                leave=self.training_bar is None,
                dynamic_ncols=True,
            )
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def close(self) -> None:
        """End the bars, so that a message after them begins on a line of its own."""
        for bar in filter(None, (self.prediction_bar, self.training_bar)):
            bar.close()
        self.prediction_bar = self.training_bar = None
