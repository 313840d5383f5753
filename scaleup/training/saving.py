"""Checkpoints of the training loop, which are committed whole."""

import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import EarlyStoppingCallback, TrainerState
from transformers.trainer_callback import ExportableState

from scaleup.backbone.method import load_weights, saved_content
from scaleup.backbone.sharded import copies_on_first
from scaleup.errors import CheckpointError, RunError, one_line
from scaleup.training import distributed, resume, training_state, watchdog
from scaleup.training.callbacks import GateStatistics, GracefulShutdown
from scaleup.training.checkpoint import (
    commit_checkpoint,
    create_staging_folder,
    expected_tensors,
    staging_folder,
    verify,
)
from scaleup.training.context import Run
from scaleup.training.engines import Engine, PlainEngine
from scaleup.training.evaluation import EvaluatingTrainer
from scaleup.training.failures import write_failure
from scaleup.training.random_states import seed_anew, set_random_states
from scaleup.training.training_state import TrainingState
from scaleup.training.zero_state import ZeroEngine, is_plain


class SavingTrainer(EvaluatingTrainer):
    """A Trainer that commits checkpoints and `final/` whole, and continues from a checkpoint.

    Attributes:
        engine: reads and writes the state of the optimizer; None before training.
        stored: state of the checkpoint that the run continues from.
        random_states: random states of that checkpoint.
        earlier_loss: sum of the losses of the steps before this run was resumed.
        repeats_evaluation: whether the run begins with an evaluation that a signal ended.
        length_group: number of examples that ResumableSampler puts into groups of similar length.
    """

    def __init__(
        self, run: Run, gate_statistics: GateStatistics, shutdown: GracefulShutdown, **kwargs
    ):
        super().__init__(run, gate_statistics, **kwargs)
        self.shutdown = shutdown
        self.out, self.writes = run.out, run.writes
        self.engine: Engine | None = None
        self.stored: TrainingState | None = None
        self.random_states: dict[str, torch.Tensor] = {}
        self.earlier_loss = 0.0
        self.repeats_evaluation = False
        self.length_group = self.args.train_batch_size * self.args.gradient_accumulation_steps

    def refuse_bad_loss(self) -> None:
        """Raise RunError on every rank if a loss so far was not finite."""
        raise NotImplementedError

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model on every host that has its own output folder.

        Under DeepSpeed, Trainer would copy or gather the whole model. Here rank 0 collects what is
        saved, and its files are copied to the other hosts.
        """
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
            return
        content = copies_on_first(saved_content(self.accelerator.unwrap_model(self.model)))
        if self.run.world.main:
            self._save(output_dir, content)
        if not self.run.shared:
            folder = pathlib.Path(output_dir or self.args.output_dir)
            distributed.copy_from_first(self.run.world, folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the whole state of training, with random states and loss scale."""
        assert self.engine is not None and self.lr_scheduler is not None
        world, args = self.run.world, self.args
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        training_state.save(
            pathlib.Path(output_dir),
            world,
            self.engine,
            not self.run.shared,
            examples=batch * world.size,
            length_group=self.length_group,
            schedule=self.lr_scheduler.state_dict(),
        )

    def _save_scaler(self, output_dir: str) -> None:
        """Save nothing: `_save_optimizer_and_scheduler` has saved it."""

    def _save_rng_state(self, output_dir: str) -> None:
        """Save nothing: `_save_optimizer_and_scheduler` has saved it."""

    def continue_from(self, state: TrainingState) -> None:
        """Take over what the order of examples depends on. Call this before `train`."""
        self.stored, self.length_group = state, state.length_group

    def _load_from_checkpoint(self, *args, **kwargs) -> None:
        """Load nothing: `run` has loaded the weights, before any engine shared them out."""

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint) -> tuple:
        """Wrap the model, and write the state of a checkpoint into its optimizer."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        model = self.accelerator.unwrap_model(self.model)
        scaler = getattr(self.accelerator, "scaler", None)
        self.engine = PlainEngine(model, self.optimizer, scaler, self.run.world.main)
        if self.is_deepspeed_enabled and not is_plain(self.model_wrapped):
            self.engine = ZeroEngine(self.model_wrapped, model)
        if resume_from_checkpoint is not None:
            assert self.stored is not None
            folder = pathlib.Path(resume_from_checkpoint)
            self.random_states = training_state.load(
                folder, self.run.world, self.engine, model, self.stored
            )
            training_state.restore_schedule(self.lr_scheduler, self.stored.schedule)
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore this process's random states; other numbers of processes get new ones."""
        if self.random_states:
            set_random_states(self.random_states)
        elif checkpoint is not None:
            seed_anew(self.args.seed, self.state.global_step, self.run.world.rank)

    def save_adapter_checkpoint(self, name: str) -> None:
        """Save the model as it is now to `out/name`. Every rank must call this."""
        folder = self.out / name
        if self.writes:
            create_staging_folder(folder)
        self.accelerator.wait_for_everyone()
        self._write(folder, lambda: self.save_model(str(staging_folder(folder))))
        self._commit(folder)

    def _write(self, folder: pathlib.Path, save: Callable[[], Any]) -> None:
        """Call `save`. If writing fails, raise a RunError of one line."""
        try:
            save()
        except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:
            if watchdog.is_lost(error):
                raise
            problem = write_failure(folder, error)
            shutil.rmtree(staging_folder(folder), ignore_errors=True)
            raise RunError(problem) from error

    def _commit(self, folder: pathlib.Path) -> None:
        self.accelerator.wait_for_everyone()
        if self.writes:
            staging = staging_folder(folder)
            (staging / "README.md").unlink(missing_ok=True)  # PEFT's model card is an empty form
            expected = expected_tensors(self.accelerator.unwrap_model(self.model))
            manifest = self.run.manifest
            self._write(folder, lambda: commit_checkpoint(staging, folder, expected, manifest))
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: object) -> str:
        """Let Trainer write checkpoint-N inside the staging folder of the same name."""
        return str(staging_folder(self.out / f"checkpoint-{self.state.global_step}"))

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Save checkpoint-N into its staging folder, complete it, and commit it."""
        folder = self.out / f"checkpoint-{self.state.global_step}"
        staging, step = staging_folder(folder), self.state.global_step
        self.refuse_bad_loss()
        # The log is in log.jsonl. Of all its lines, a resumed run needs only the mean loss.
        loss_sum = self.earlier_loss + self._total_loss_scalar
        self.state.log_history = [{"step": step, "loss": loss_sum / step}]
        if self.writes:
            create_staging_folder(folder)
        self.accelerator.wait_for_everyone()
        self._write(folder, lambda: super(SavingTrainer, self)._save_checkpoint(model, trial))
        self.accelerator.wait_for_everyone()
        best = self._best_checkpoint()
        if best is not None and best != folder and self.writes and not best.is_dir():
            raise RunError(f"{best}, the best checkpoint so far, was removed during the run")
        self.state.best_model_checkpoint = best and str(best)
        if self.writes:
            inner = staging / folder.name
            self._write(folder, lambda: self.state.save_to_json(str(inner / "trainer_state.json")))
            for path in list(inner.iterdir()):
                path.rename(staging / path.name)
            inner.rmdir()
        self._commit(folder)
        if self.writes:
            keep = self.run.settings.train.keep_checkpoints
            resume.keep_newest(self.out, keep, step, self.state.best_global_step)

    def _best_checkpoint(self) -> pathlib.Path | None:
        step = self.state.best_global_step
        return self.out / f"checkpoint-{step}" if step else None

    def _load_callback_state(self) -> None:
        """Restore early stopping and the best checkpoint's path, after Trainer has read a state."""
        if best := self._best_checkpoint():
            self.state.best_model_checkpoint = str(best)
        self.earlier_loss = resume.loss_sum(self.state.log_history)
        count = resume.patience_used(self.state.stateful_callbacks)
        # An evaluation at the start belongs to step 0.
        self.repeats_evaluation = resume.must_evaluate(self.state.stateful_callbacks)
        self.args.eval_on_start = self.repeats_evaluation
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = count
        # Trainer expects each of its callbacks here, and the earlier run may have had others.
        own = [*self.callback_handler.callbacks, self.control]
        own = [callback for callback in own if isinstance(callback, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=own).stateful_callbacks

    def _load_best_model(self) -> None:
        if self.shutdown.stopped_by is None:
            self.save_adapter_checkpoint("final")
            self._check_best_checkpoint()
            best = self._best_checkpoint()
            assert best is not None
            load_weights(self.accelerator.unwrap_model(self.model), best)

    def _check_best_checkpoint(self) -> None:
        """Refuse a best checkpoint that was altered. Trainer would keep the last model instead."""
        best = self._best_checkpoint()
        if best is None or not self.writes:
            return
        try:
            verify(best)
        except (CheckpointError, OSError) as error:
            problem = "the best checkpoint was removed or altered during the run"
            raise RunError(f"{problem}: {one_line(error, 300)}") from error
