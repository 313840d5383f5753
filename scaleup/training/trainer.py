"""The training loop: HF Trainer with checkpoints that are committed whole.

This is the only file that overrides private methods of Trainer.
"""

import contextlib
import math
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput

from scaleup.backbone.sharded import whole_copies
from scaleup.data.metrics import IGNORED
from scaleup.errors import CheckpointError, RunError, one_line
from scaleup.training import distributed, resume, watchdog
from scaleup.training.callbacks import GateStatistics, GracefulShutdown
from scaleup.training.checkpoint import (
    commit_checkpoint,
    create_staging_folder,
    expected_tensors,
    staging_folder,
)
from scaleup.training.context import Run
from scaleup.training.sampler import ResumableSampler

BATCHES = 1 << 20  # more than the batches of one optimizer step
# Columns of a batch that only `generate` and the metrics read.
FOR_GENERATION = ("prompt", "prompt_mask", "reference")


class RunTrainer(Trainer):
    """A Trainer that counts tokens, logs gates, and commits checkpoints and `final/` whole."""

    def __init__(
        self, run: Run, gate_statistics: GateStatistics, shutdown: GracefulShutdown, **kwargs
    ):
        super().__init__(args=run.args, **kwargs)
        # Most losses are means over the batch and ignore the item count that Trainer passes. With
        # True, Trainer would not divide them by the accumulation steps.
        self.model_accepts_loss_kwargs = run.task.writes
        self.run, self.gate_statistics, self.shutdown = run, gate_statistics, shutdown
        self.out, self.writes = run.out, run.writes
        self.tokens = torch.zeros((), device=self.args.device)
        self.since = time.perf_counter()
        self.batch = (0, 0)  # optimizer step, forward pass within it
        self.frozen_head: dict[str, torch.Tensor] = {}  # whole, while ZeRO-3 saves
        self.parameter_groups: list[dict[str, Any]] = []  # of the optimizer, except of DeepSpeed's
        # The first bad loss, as step * BATCHES + pass.
        self.first_bad = torch.full((), -1, device=self.args.device, dtype=torch.long)

    def try_out(self) -> None:
        """Make data loader, optimizer and schedule once; libraries raise if settings are bad."""
        self.get_train_dataloader()
        if self.is_deepspeed_enabled:
            self.args.hf_deepspeed_config.trainer_config_finalize(self.args, self.model, 1000)
        else:
            self.create_optimizer_and_scheduler(1000)
            self.parameter_groups = [
                dict(group)
                for group in self.optimizer.param_groups  # type: ignore[has-type]
            ]
            self.optimizer = self.lr_scheduler = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Give the gates a learning rate of their own if the run has one."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        learning_rate = self.run.settings.train.gate_learning_rate
        if fresh and learning_rate is not None:
            gates = {id(p) for n, p in self.model.named_parameters() if ".unipelt_gate." in n}
            for group in list(optimizer.param_groups):
                apart = [p for p in group["params"] if id(p) in gates]
                group["params"] = [p for p in group["params"] if id(p) not in gates]
                optimizer.add_param_group(group | {"params": apart, "lr": learning_rate})
        return optimizer

    def _run_epoch(self, *args, **kwargs) -> None:
        """Stop a resumed run that is at its end already. Trainer would take one more step."""
        if 0 < self.state.max_steps <= self.state.global_step:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict, *args, **kwargs) -> torch.Tensor:
        # Packed rows have no attention mask.
        counted = inputs.get("attention_mask", inputs["input_ids"] >= 0)
        self.tokens += counted.sum().to(self.tokens.device)
        loss = super().training_step(model, inputs, *args, **kwargs)
        step = self.state.global_step + 1
        self.batch = (step, self.batch[1] + 1 if self.batch[0] == step else 1)
        # Recorded on the device, and read only where the process waits for the device anyway.
        bad = ~torch.isfinite(loss.detach()) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, step * BATCHES + self.batch[1], self.first_bad)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Return the mean loss of a forward pass.

        If the loss of a step is a mean over its tokens, scale the loss of a pass in training by its
        share of the step's `num_items_in_batch` tokens. Not every model would do so itself.
        """
        kept = {name: value for name, value in inputs.items() if name not in FOR_GENERATION}
        if inputs["labels"].dim() > 1:  # with a cache, texts packed into one row see each other
            kept["use_cache"] = False
        tokens = (inputs["labels"] != IGNORED).sum()  # label smoothing removes the labels
        loss = super().compute_loss(model, kept, return_outputs)
        if num_items_in_batch is None or not model.training:
            return loss
        # The gradients are averaged over the processes.
        averaged = self.args.world_size if self.args.average_tokens_across_devices else 1
        return loss * (tokens * averaged / num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None) -> tuple:
        """Evaluate a batch and return Trainer's tuple: loss, outputs [B, …] and labels [B, …].

        In a generation task, outputs are the generated tokens [B, T] and labels the number of each
        reference [B]. Examples that only fill the last batches of the processes are not evaluated;
        their outputs are copies, which Trainer removes.
        """
        inputs = self._prepare_inputs(inputs)
        size = len(inputs["labels"])
        count = self._examples_to_score(size)
        # Under ZeRO-3 every process has to take part.
        scored = {name: value[: max(count, 1)] for name, value in inputs.items()}
        with contextlib.nullcontext() if count else self.gate_statistics.paused():
            loss, outputs, labels = self._predict(model, scored, prediction_loss_only, ignore_keys)
        if count:
            items = (scored["labels"] != IGNORED).sum()  # tokens, or examples
            self.loss_sum_and_items += torch.stack([loss.double() * items, items.double()])
        if outputs is None:
            return loss, None, None
        rows = torch.arange(size, device=outputs.device).clamp(max=len(outputs) - 1)
        return loss, outputs[rows], inputs.get("reference", inputs["labels"])

    def _examples_to_score(self, size: int) -> int:
        """Return how many examples of this process's batch are no repetition of earlier ones."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return size
        return min(max(state.remainder - self.args.process_index * size, 0), size)

    def _predict(self, model, inputs, prediction_loss_only, ignore_keys) -> tuple:
        if "reference" not in inputs:
            loss, outputs, labels = super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys
            )
            return loss, outputs[0] if isinstance(outputs, tuple) else outputs, labels
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        if self.run.generation is None:
            return loss, None, None
        prompt = inputs.get("prompt", inputs["input_ids"])
        with self.compute_loss_context_manager(), self.gate_statistics.paused(), torch.no_grad():
            tokens = self.accelerator.unwrap_model(model).generate(
                input_ids=prompt,
                attention_mask=inputs.get("prompt_mask", inputs.get("attention_mask")),
                do_sample=False,
                use_cache=True,
                pad_token_id=self.processing_class.pad_token_id,
                **self.run.generation,
            )
        if "prompt" in inputs:  # a decoder repeats the prompt
            tokens = tokens[:, prompt.shape[1] :]
        return loss, tokens, None

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """Evaluate a data set. Its loss is the mean over its tokens, or over its examples.

        Trainer takes the mean over batches and counts the examples that fill the last ones.
        """
        self.loss_sum_and_items = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss_sum, items = self.accelerator.reduce(self.loss_sum_and_items).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss_sum / items
        return output

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs) -> DataLoader:
        """Evaluate every example, also if `dataloader_drop_last` leaves some out of training."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler:
        grouped = self.args.train_sampling_strategy == "group_by_length"
        lengths = list(self.train_dataset[self.args.length_column_name]) if grouped else None
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ResumableSampler(
            count=len(self.train_dataset),
            seed=self.args.seed,
            epoch=lambda: int((self.state.epoch or 0.0) + 1e-6),  # tolerates rounding
            lengths=lengths,
            batch_size=batch_size,
        )

    def _get_eval_sampler(self, eval_dataset) -> torch.utils.data.Sampler | list[int] | None:
        """Order examples by length, the longest first, so that a lack of memory shows at once.

        Trainer draws groups of fifty batches at random. A small set would have no groups at all,
        and half of each batch would be padding.
        """
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        lengths = eval_dataset[self.args.length_column_name]
        return sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def refuse_bad_loss(self) -> None:
        """Raise RunError on every rank, with the step and batch of the first loss not finite."""
        first_by_rank = self.accelerator.gather(self.first_bad.reshape(1)).tolist()
        bad = [(first, rank) for rank, first in enumerate(first_by_rank) if first >= 0]
        if not bad:
            return
        first, rank = min(bad)
        step, batch = divmod(first, BATCHES)
        raise RunError(
            f"the loss is not a number at step {step} (its batch {batch}, rank {rank})."
            f" {self._last_good()}. Try a lower train.learning_rate, or look at the step's data"
        )

    def _last_good(self) -> str:
        kept = resume.checkpoints(self.out)
        return f"The last good checkpoint is {kept[-1] if kept else 'none'}"

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Add speed and gates to a log entry. Every rank must call this to sum the tokens."""
        if "loss" in logs:
            self.refuse_bad_loss()
            assert math.isfinite(logs["loss"])
            tokens = self.accelerator.reduce(self.tokens, reduction="sum").item()
            self.tokens = torch.zeros_like(self.tokens)
            logs["tokens_per_second"] = round(tokens / (time.perf_counter() - self.since), 1)
        if "loss" in logs or any(key.startswith("eval_") for key in logs):
            self.since = time.perf_counter()  # evaluation does not count as training time
            self.gate_statistics.drain()
            logs.update(self.gate_statistics.scalars())
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        self.gate_statistics.drain()  # the gates logged with dev scores are those of dev examples
        return super().evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model on every host that has its own output folder.

        Under ZeRO-3 only rank 0 ever holds whole tensors, so its files are copied to the others.
        Trainer leaves out what is frozen, also a head, which has to be saved.
        """
        if is_deepspeed_zero3_enabled():
            parameters = self.accelerator.unwrap_model(self.model).named_parameters()
            saved = {name: p for name, p in parameters if ".modules_to_save." in name}
            self.frozen_head = whole_copies({n: p for n, p in saved.items() if not p.requires_grad})
        super().save_model(output_dir, _internal_call)
        if not self.run.shared and is_deepspeed_zero3_enabled():
            folder = pathlib.Path(output_dir or self.args.output_dir)
            distributed.copy_from_first(self.run.world, folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.run.world.main or not is_deepspeed_zero3_enabled():
            super()._save(output_dir, state_dict and state_dict | self.frozen_head)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if not self.run.shared and self.is_deepspeed_enabled:
            # DeepSpeed writes this file on the first host only.
            distributed.copy_from_first(self.run.world, pathlib.Path(output_dir), "latest")

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
            cause = getattr(error, "strerror", None) or one_line(error, 200)
            if shutil.disk_usage(self.out).free < 2**20:  # torch reports "unexpected pos"
                cause = "the disk is full"
            shutil.rmtree(staging_folder(folder), ignore_errors=True)
            problem = f"{folder} could not be written: {cause}"
            raise RunError(f"{problem}. {self._last_good()}") from error

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
        staging = staging_folder(folder)
        self.refuse_bad_loss()
        if self.writes:
            create_staging_folder(folder)
        self.accelerator.wait_for_everyone()
        self._write(folder, lambda: super(RunTrainer, self)._save_checkpoint(model, trial))
        self.accelerator.wait_for_everyone()
        best = self._best_checkpoint()
        if best is not None and best != folder and self.writes:
            assert best.is_dir(), f"{best} was never saved"
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
            resume.keep_newest(self.out, keep, self.state.best_global_step)

    def _best_checkpoint(self) -> pathlib.Path | None:
        step = self.state.best_global_step
        return self.out / f"checkpoint-{step}" if step else None

    def _load_callback_state(self) -> None:
        """Restore early stopping and the best checkpoint's path, after Trainer has read a state."""
        if best := self._best_checkpoint():
            self.state.best_model_checkpoint = str(best)
        count = resume.patience_used(self.state.stateful_callbacks)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = count

    def _load_best_model(self) -> None:
        if self.shutdown.stopped_by is None:
            self.save_adapter_checkpoint("final")
            super()._load_best_model()
