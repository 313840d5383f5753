"""Losses and scores that do not depend on batches, accumulation or the number of processes."""

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from scaleup.data.metrics import IGNORED
from scaleup.training.callbacks import GateStatistics
from scaleup.training.context import Run


def counted(labels: torch.Tensor) -> torch.Tensor:
    """Return the number of labels in a mean loss: those of tokens, or of examples."""
    if labels.is_floating_point():  # of a regression, where every number is a label
        return torch.tensor(labels.numel(), device=labels.device)
    return (labels != IGNORED).sum()


class EvaluatingTrainer(Trainer):
    """A Trainer that evaluates every example once, and takes means over tokens for text."""

    def __init__(self, run: Run, gate_statistics: GateStatistics, **kwargs):
        super().__init__(args=run.args, **kwargs)
        # With True, Trainer counts the tokens of a step for `compute_loss`. With False it divides
        # the loss of a batch by the accumulation steps.
        self.model_accepts_loss_kwargs = run.task.by_token
        self.run, self.gate_statistics = run, gate_statistics

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
        kept = self.run.task.model_inputs(inputs)
        if self.run.task.loss is not None:
            outputs = model(**kept)
            loss = self.run.task.loss(outputs, inputs)
            return (loss, outputs) if return_outputs else loss
        tokens = (inputs["labels"] != IGNORED).sum()  # label smoothing removes the labels
        loss = super().compute_loss(model, kept, return_outputs)
        if num_items_in_batch is None or not model.training:
            return loss
        # The gradients are averaged over the processes.
        averaged = self.args.world_size if self.args.average_tokens_across_devices else 1
        return loss * (tokens * averaged / num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None) -> tuple:
        """Evaluate a batch and return Trainer's tuple: loss, outputs [B, …] and labels [B, …].

        In a generation task, outputs are the generated tokens [B, T]. Where metrics look up what
        they compare with, labels are the number of each row [B]. Examples that only fill the last
        batches of the processes are not evaluated; their outputs are copies, which Trainer removes.
        """
        inputs = self._prepare_inputs(inputs)
        size = len(inputs["labels"])
        count = self._examples_to_score(size)
        # Under ZeRO-3 every process has to take part.
        scored = {name: value[: max(count, 1)] for name, value in inputs.items()}
        with contextlib.nullcontext() if count else self.gate_statistics.paused():
            loss, outputs, labels = self._predict(model, scored, prediction_loss_only, ignore_keys)
        if count:
            items = counted(scored["labels"])
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
        task = self.run.task
        if not task.writes:
            loss, outputs, labels = super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys
            )
            return loss, outputs if outputs is None else task.scored(outputs), labels
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
                # All processes make as many passes as the longest text needs.
                synced_gpus=True if self.run.settings.train.fsdp else None,
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

    def _get_eval_sampler(self, eval_dataset) -> torch.utils.data.Sampler | list[int] | None:
        """Order examples by length, the longest first, so that a lack of memory shows at once.

        Trainer draws groups of fifty batches at random. A small set would have no groups at all,
        and half of each batch would be padding.
        """
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        lengths = eval_dataset[self.args.length_column_name][:]
        return sorted(range(len(lengths)), key=lambda i: -lengths[i])
