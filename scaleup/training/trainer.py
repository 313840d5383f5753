"""The training loop: HF Trainer with the order of examples, the passes and the log of a run.

Only this file, `scaleup.training.saving` and `scaleup.training.evaluation` override private methods
of Trainer.
"""

import copy
import functools
import json
import math
import time

import torch
from torch import nn

from scaleup.backbone import fsdp
from scaleup.errors import ConfigError, Preempted, RunError
from scaleup.training.callbacks import GateStatistics, GracefulShutdown
from scaleup.training.context import Run
from scaleup.training.engines import state_keys
from scaleup.training.failures import last_good
from scaleup.training.graphs import StepGraphs
from scaleup.training.random_states import random_states
from scaleup.training.sampler import ResumableSampler, stream_loader
from scaleup.training.saving import SavingTrainer

ITEMS = "num_items_in_batch"
BATCHES = 1 << 20  # more than the batches of one optimizer step


class RunTrainer(SavingTrainer):
    """A Trainer that counts tokens, logs gates, refuses bad losses and can be stopped."""

    def __init__(
        self, run: Run, gate_statistics: GateStatistics, shutdown: GracefulShutdown, **kwargs
    ):
        super().__init__(run, gate_statistics, shutdown, **kwargs)
        self.tokens = torch.zeros((), device=self.args.device)
        self.since = time.perf_counter()
        self.graphs: StepGraphs | None = None
        self.batch = (0, 0)  # optimizer step, forward pass within it
        self.optimizer_keys: set[str] | None = None  # parts of its state; None: not known
        # The first bad loss, as step * BATCHES + pass.
        self.first_bad = torch.full((), -1, device=self.args.device, dtype=torch.long)

    def try_out(self) -> None:
        """Make data loader, optimizer and schedule once; libraries raise if settings are bad."""
        loader = self.get_train_dataloader()
        if not self.run.settings.data.streaming and not len(loader):
            rows, batch = len(self.train_dataset), self.args.train_batch_size
            problem = f"{rows} rows are less than a batch of {batch} for each process"
            raise ConfigError(
                f"train.dataloader_drop_last: {problem}, so that nothing is left to train on;"
                " lower train.per_device_train_batch_size, or leave it out"
            )
        self.lengths = self.set_initial_training_values(self.args, loader)
        *_, steps = self.lengths
        own_optimizer = own_schedule = True
        if self.is_deepspeed_enabled:
            # A copy, because Trainer fills it in once more and refuses what is filled in already.
            config = copy.deepcopy(self.args.hf_deepspeed_config)
            config.trainer_config_finalize(self.args, self.model, steps)
            own_optimizer = config.get_value("optimizer") is None
            own_schedule = own_optimizer and config.get_value("scheduler") is None
        if own_optimizer:
            self.optimizer_keys = state_keys(self.create_optimizer(), self.is_deepspeed_enabled)
        if own_schedule:
            self.create_scheduler(steps, self.optimizer)  # type: ignore[has-type]
            json.dumps(self.lr_scheduler.state_dict())  # type: ignore[has-type]
        self.optimizer = self.lr_scheduler = None

    def refuse_late_evaluation(self) -> None:
        """Raise ConfigError if training ends before the first evaluation. Call `try_out` first."""
        _, steps_of_epoch, *_, steps = self.lengths
        epochs = steps / steps_of_epoch
        end, unit = (steps, "steps") if self.args.eval_strategy == "steps" else (epochs, "epochs")
        delay = self.args.eval_delay
        if delay > end:
            problem = f"{delay:g} {unit}, but training ends after {end:g}"
            raise ConfigError(
                f"train.eval_delay: {problem}, so there would be no evaluation; lower it"
            )

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

    def _wrap_model(self, model: nn.Module, training: bool = True, *args, **kwargs) -> nn.Module:
        wrapped = super()._wrap_model(model, training, *args, **kwargs)
        if training and wrapped is self.model and self.run.settings.train.fsdp is not None:
            return fsdp.wrap(self.accelerator, wrapped)
        return wrapped

    def _run_epoch(self, *args, **kwargs) -> None:
        """Stop a resumed run that is at its end already. Trainer would take one more step."""
        at_end = 0 < self.state.max_steps <= self.state.global_step
        if at_end or self.control.should_training_stop:  # a repeated evaluation may have stopped it
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict, *args, **kwargs) -> torch.Tensor:
        # Packed rows have no attention mask.
        counted = inputs.get("attention_mask", inputs["input_ids"] >= 0)
        self.tokens += counted.sum().to(self.tokens.device)
        loss = self._pass(model, inputs, *args, **kwargs)
        step = self.state.global_step + 1
        self.batch = (step, self.batch[1] + 1 if self.batch[0] == step else 1)
        # Recorded on the device, and read only where the process waits for the device anyway.
        bad = ~torch.isfinite(loss.detach()) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, step * BATCHES + self.batch[1], self.first_bad)
        return loss

    def _pass(
        self, model: nn.Module, inputs: dict, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the forward and the backward pass of a batch, as a CUDA graph if they are recorded.

        Returns:
            The loss.
        """
        if not self.run.settings.train.cuda_graphs:
            return super().training_step(model, inputs, num_items_in_batch)
        if self.graphs is None:
            self.graphs = StepGraphs(
                model.parameters(), functools.partial(self._tensors_pass, model)
            )
        inputs = self._prepare_inputs(inputs)
        if num_items_in_batch is not None:  # not the same number at every step
            inputs |= {ITEMS: torch.as_tensor(num_items_in_batch, device=self.args.device)}
        return self.graphs(inputs)

    def _tensors_pass(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        kept = {name: value for name, value in inputs.items() if name != ITEMS}
        return super().training_step(model, kept, inputs.get(ITEMS))

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler:
        grouped = self.args.train_sampling_strategy == "group_by_length"
        lengths = self.train_dataset[self.args.length_column_name][:] if grouped else None
        return ResumableSampler(
            count=len(self.train_dataset),
            seed=self.args.seed,
            epoch=lambda: int((self.state.epoch or 0.0) + 1e-6),  # tolerates rounding
            lengths=lengths,
            batch_size=self.length_group,
        )

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Let the first process read a stream, and give each process its part of every batch."""
        if not self.run.settings.data.streaming:
            return super().get_train_dataloader()
        return stream_loader(
            self.train_dataset, self.data_collator, self.args.train_batch_size, self.run.world
        )

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs) -> None:
        """Log, evaluate and save. If a signal ends the evaluation, save that it must be repeated.

        Reading data draws from the random state, which is restored, so that a resumed run equals an
        uninterrupted one.
        """
        random_state = torch.get_rng_state()
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except Preempted:
            torch.set_rng_state(random_state)
            self._save_checkpoint(model, trial)  # with control.should_evaluate
            self.control.should_evaluate = self.control.should_save = False
            self.control.should_training_stop = True

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler: bool = False) -> dict:
        """Evaluate. At the start of a resumed run, repeat the evaluation that a signal ended."""
        if not self.repeats_evaluation:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        self.repeats_evaluation = self.args.eval_on_start = False
        self._load_rng_state(str(self.out / f"checkpoint-{self.state.global_step}"))
        self.control.should_evaluate = self.control.should_save = True
        self._maybe_log_save_evaluate(
            self._tr_loss, None, self.model, trial, self.state.epoch, ignore_keys_for_eval, None
        )
        self.random_states = random_states()  # the evaluation has drawn from them
        return {}

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
            f" {last_good(self.out)}. Try a lower train.learning_rate, or look at the step's data"
        )

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Add speed and gates to a log entry. Every rank must call this to sum the tokens."""
        if "train_loss" in logs:  # the summary, for which Trainer forgets earlier steps
            logs["train_loss"] += self.earlier_loss / max(self.state.global_step, 1)
        if "loss" in logs:
            self.refuse_bad_loss()
            assert math.isfinite(logs["loss"])
            tokens = self.accelerator.reduce(self.tokens, reduction="sum").item()
            self.tokens = torch.zeros_like(self.tokens)
            logs["tokens_per_second"] = round(tokens / (time.perf_counter() - self.since), 1)
        if "loss" in logs or any(key.startswith("eval_") for key in logs):
            self.since = time.perf_counter()  # evaluation does not count as training time
            self.gate_statistics.drain()
            logs.update(self.gate_statistics.scalars("" if "loss" in logs else "eval_"))
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        self.gate_statistics.drain()  # the gates logged with dev scores are those of dev examples
        return super().evaluate(*args, **kwargs)
