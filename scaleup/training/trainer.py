"""The training loop: HF Trainer with checkpoints that are whole or not there, and what stops a run in good order.

With scaleup.training.run, which assembles a run, the only file that knows Trainer.
"""

import json
import math
import pathlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator

import torch
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import get_length_grouped_indices

from scaleup.errors import RunError
from scaleup.training import distributed as runtime
from scaleup.training import resume, watchdog
from scaleup.training.checkpoint import (
    commit_checkpoint,
    create_staging_folder,
    expected_tensors,
    staging_folder,
)
from scaleup.training.console import GateStatistics, rewind

BATCHES = 1 << 20  # more than a step ever has
FOR_WRITING = (
    "prompt",
    "prompt_mask",
    "reference",
)  # what a batch has for its answers, and models do not take


class ResumableSampler(torch.utils.data.Sampler):
    """The order of examples, from seed and epoch alone, so that a run resumed in the middle of an epoch meets the same batches.

    transformers' length groups take their order from the global random state; and on several processes, with some batches
    skipped, Accelerate does not tell the sampler the epoch (it sits two wrappers too deep). So this one asks for it.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        epoch: Callable[[], int],
        lengths: list[int] | None,
        batch_size: int,
    ):
        """`lengths`: of each example in tokens, to put similar ones into a batch; None: any order."""
        self.count, self.seed, self.epoch, self.lengths, self.batch_size = (
            count,
            seed,
            epoch,
            lengths,
            batch_size,
        )

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        if self.lengths is None:
            return iter(torch.randperm(self.count, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class RunTrainer(Trainer):
    """Trainer that counts tokens, logs gates, seals every checkpoint and keeps the last weights beside the best.

    `shared`: whether all hosts see one output folder. `writes`: this process writes the files of its output folder (rank 0, or
    one process per host where hosts do not share it).
    """

    def __init__(
        self,
        *args,
        gate_log: GateStatistics,
        out: pathlib.Path,
        about: dict,
        keep: int,
        world: runtime.World,
        shared: bool,
        token_mean: bool = False,
        generation: dict[str, int] | None = None,
        **kwargs,
    ):
        """token_mean, generation: see scaleup.data.tasks."""
        super().__init__(*args, **kwargs)
        # Most losses are means over the batch and ignore the count of items that Trainer passes; it would then leave out the
        # division by the accumulation steps: loss and gradient times that number.
        self.model_accepts_loss_kwargs = token_mean
        self.generation = generation
        self.gate_log, self.out, self.about, self.keep = gate_log, out, about, keep
        self.world, self.shared, self.writes = world, shared, world.writes(shared)
        self.tokens = torch.zeros((), device=self.args.device)
        self.since = time.perf_counter()
        self.batch = (0, 0)  # step, forward pass within it
        self.first_bad = torch.full(
            (), -1, device=self.args.device, dtype=torch.long
        )  # step * BATCHES + pass
        self.stopping: str | None = None

    def try_out(self) -> None:
        """Makes once what `train` will make, where it costs nothing, so that what the libraries refuse is known before anything is
        written. Raises whatever they raise."""
        self.get_train_dataloader()
        if self.is_deepspeed_enabled:
            self.args.hf_deepspeed_config.trainer_config_finalize(self.args, self.model, 1000)
        else:
            self.create_optimizer_and_scheduler(1000)
            self.optimizer = self.lr_scheduler = None

    def _run_epoch(self, *args, **kwargs) -> None:
        """Trainer's, which looks whether it is done after a step: a run that went on at its very end, in the middle of an epoch, would take one more."""
        if 0 < self.state.max_steps <= self.state.global_step:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict, *args, **kwargs) -> torch.Tensor:
        counted = inputs.get("attention_mask", inputs["input_ids"] >= 0)  # packed rows have no mask
        self.tokens += counted.sum().to(self.tokens.device)
        loss = super().training_step(model, inputs, *args, **kwargs)
        step = self.state.global_step + 1
        self.batch = (step, self.batch[1] + 1 if self.batch[0] == step else 1)
        # Noted on the device; read where there is a synchronisation anyway.
        bad = ~torch.isfinite(loss.detach()) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, step * BATCHES + self.batch[1], self.first_bad)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict, *args, **kwargs) -> torch.Tensor:
        kept = {name: value for name, value in inputs.items() if name not in FOR_WRITING}
        if (
            inputs["labels"].dim() > 1
        ):  # a label per token: with a cache, texts packed into one row would see each other
            kept["use_cache"] = False
        return super().compute_loss(model, kept, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple:
        """Trainer's; where text is to be written: (loss, tokens written [B, T], number of the reference [B])."""
        if "reference" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        if self.generation is None:
            return loss, None, None
        prompt, mask = (
            inputs.get("prompt", inputs["input_ids"]),
            inputs.get("prompt_mask", inputs.get("attention_mask")),
        )
        with self.compute_loss_context_manager(), self.gate_log.paused(), torch.no_grad():
            written = self.accelerator.unwrap_model(model).generate(
                input_ids=prompt,
                attention_mask=mask,
                do_sample=False,
                use_cache=True,
                pad_token_id=self.processing_class.pad_token_id,
                **self.generation,
            )
        return (
            loss,
            written[:, prompt.shape[1] :] if "prompt" in inputs else written,
            inputs["reference"],
        )

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler:
        grouped = self.args.train_sampling_strategy == "group_by_length"
        lengths = list(self.train_dataset[self.args.length_column_name]) if grouped else None
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ResumableSampler(
            len(self.train_dataset), self.args.seed, self.current_epoch, lengths, batch_size
        )

    def _get_eval_sampler(self, eval_dataset) -> torch.utils.data.Sampler | list[int] | None:
        """The longest examples first, so that what does not fit in memory is known at once. Trainer's groups are fifty batches' lengths drawn
        at random: a small set then has no groups at all, and half of a batch is padding."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        lengths = eval_dataset[self.args.length_column_name]
        return sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def current_epoch(self) -> int:
        """Whole epochs behind us; what is left over by rounding is no epoch."""
        return int((self.state.epoch or 0.0) + 1e-6)

    def refuse_bad_loss(self) -> None:
        """Raises RunError, on every rank, if a loss was not a number; names the first step and batch."""
        found = self.accelerator.gather(self.first_bad.reshape(1)).tolist()
        bad = [(where, rank) for rank, where in enumerate(found) if where >= 0]
        if not bad:
            return
        where, rank = min(bad)
        step, batch = divmod(where, BATCHES)
        raise RunError(
            f"the loss is not a number at step {step} (its batch {batch}, rank {rank}). {self._last_good()}."
            " Try a lower train.learning_rate, or look at the data of that step"
        )

    def _last_good(self) -> str:
        kept = resume.checkpoints(self.out)
        return f"The last good checkpoint is {kept[-1] if kept else 'none'}"

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Adds speed and gates to a training log. Runs on every rank: the token count is summed over them."""
        if "loss" in logs:
            self.refuse_bad_loss()
            assert math.isfinite(logs["loss"])
            tokens, self.tokens = (
                self.accelerator.reduce(self.tokens, reduction="sum"),
                torch.zeros_like(self.tokens),
            )
            logs["tokens_per_second"] = round(tokens.item() / (time.perf_counter() - self.since), 1)
        if "loss" in logs or any(key.startswith("eval_") for key in logs):
            self.since = time.perf_counter()  # evaluation does not count as training time
            self.gate_log.drain()
            logs.update(self.gate_log.scalars())
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        self.gate_log.drain()  # the gates logged with dev scores are those of dev examples
        return super().evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, whole on every host that has its own output folder: under ZeRO-3 only rank 0 ever holds whole tensors."""
        super().save_model(output_dir, _internal_call)
        if not self.shared and is_deepspeed_zero3_enabled():
            runtime.copy_from_first(self.world, pathlib.Path(output_dir or self.args.output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.world.main or not is_deepspeed_zero3_enabled():
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if (
            not self.shared and self.is_deepspeed_enabled
        ):  # the one file that DeepSpeed leaves on the first host only
            runtime.copy_from_first(self.world, pathlib.Path(output_dir), "latest")

    def save_bundle(self, name: str) -> None:
        """`out/name`: the model as it is now. Every rank takes part; those that write seal."""
        folder = self.out / name
        if self.writes:
            create_staging_folder(folder)
        self.accelerator.wait_for_everyone()
        self._write(folder, lambda: self.save_model(str(staging_folder(folder))))
        self._seal(folder)

    def _write(self, folder: pathlib.Path, save) -> None:
        """Calls `save`; a disk that does not take it ends the run in one line. torch says RuntimeError for a full disk."""
        try:
            save()
        except (OSError, RuntimeError, SafetensorError) as error:
            if watchdog.is_lost(error):
                raise
            cause = (
                error.strerror
                if isinstance(error, OSError) and error.strerror
                else " ".join(str(error).split())[:200]
            )
            if shutil.disk_usage(self.out).free < 2**20:  # torch says "unexpected pos"
                cause = "the disk is full"
            shutil.rmtree(staging_folder(folder), ignore_errors=True)
            raise RunError(
                f"{folder} could not be written: {cause}. {self._last_good()}"
            ) from error

    def _seal(self, folder: pathlib.Path) -> None:
        self.accelerator.wait_for_everyone()
        if self.writes:
            (staging_folder(folder) / "README.md").unlink(
                missing_ok=True
            )  # PEFT's model card, with nothing filled in
            expected = expected_tensors(self.accelerator.unwrap_model(self.model))
            self._write(
                folder,
                lambda: commit_checkpoint(staging_folder(folder), folder, expected, self.about),
            )
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: object) -> str:
        """Where Trainer puts checkpoint-N: into the draft of ours."""
        return str(staging_folder(self.out / f"checkpoint-{self.state.global_step}"))

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """checkpoint-N, written under a temporary name, sealed, and only then one of the checkpoints."""
        folder = self.out / f"checkpoint-{self.state.global_step}"
        self.refuse_bad_loss()
        if self.writes:
            create_staging_folder(folder)
        self.accelerator.wait_for_everyone()
        self._write(folder, lambda: super(RunTrainer, self)._save_checkpoint(model, trial))
        self.accelerator.wait_for_everyone()
        inner = staging_folder(folder) / folder.name
        best = f"checkpoint-{self.state.best_global_step}" if self.state.best_global_step else None
        assert (
            best is None or best == folder.name or (self.out / best).is_dir() or not self.writes
        ), f"{best} was never saved"
        self.state.best_model_checkpoint = str(self.out / best) if best else None
        if self.writes:
            self._write(folder, lambda: self.state.save_to_json(str(inner / "trainer_state.json")))
            for path in list(inner.iterdir()):
                path.rename(staging_folder(folder) / path.name)
            inner.rmdir()
        self._seal(folder)
        if self.writes:
            resume.keep_newest(self.out, self.keep, self.state.best_global_step)

    def _load_callback_state(self) -> None:
        """Trainer calls it when it has read a checkpoint's state: early stopping goes on counting, the best one is found again
        wherever the run's folder is now."""
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(
                self.out / f"checkpoint-{self.state.best_global_step}"
            )
        count = resume.patience_used(self.state.stateful_callbacks)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = count

    def _load_best_model(self) -> None:
        if self.stopping is not None:
            return
        self.save_bundle("final")
        super()._load_best_model()


class GracefulShutdown(TrainerCallback):
    """SIGTERM (preemption, `scancel`, a pod's eviction) and SIGUSR1: finish the step, save, stop. All ranks stop at the same step.

    Also logs whenever it saves, so that a resumed run's log has the same windows as an uninterrupted one's.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.group = None
        self.trainer: RunTrainer | None = None

    def install(self) -> None:
        """Takes the signals over. Only the main thread of a process may."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.signal = number

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # A group of its own on the CPU: the answer must not wait for the GPU.
        if args.world_size > 1 and self.group is None:
            self.group = torch.distributed.new_group(backend="gloo")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        number = torch.tensor(self.signal or 0)
        if self.group is not None:
            torch.distributed.all_reduce(
                number, op=torch.distributed.ReduceOp.MAX, group=self.group
            )
        if number.item():
            self.trainer.stopping = signal.Signals(int(number.item())).name
            control.should_save, control.should_training_stop = True, True
        control.should_log |= control.should_save

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if self.trainer.stopping is not None and abs(state.epoch - round(state.epoch)) > 1e-6:
            # Trainer ends an epoch when it stops, too. The run that goes on will score this one where it really ends.
            control.should_save = control.should_evaluate = control.should_log = False
        control.should_log |= control.should_save


class JsonlLogger(TrainerCallback):
    """log.jsonl and the one progress bar, on the processes that write."""

    def __init__(self, path: pathlib.Path, metric: str, gate_log: GateStatistics, writes: bool):
        self.path, self.metric, self.gate_log, self.writes = path, metric, gate_log, writes
        self.bar: tqdm | None = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self.writes:
            rewind(self.path, state.global_step)
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                disable=args.disable_tqdm,
            )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """One line of log.jsonl, and the newest numbers behind the bar."""
        if not self.writes:
            return
        line = {
            "step": state.global_step,
            **{k: v for k, v in logs.items() if not k.startswith("gates/")},
        }
        if "loss" in logs or "eval_loss" in logs:
            line["gates"] = self.gate_log.last
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if "loss" in logs:
            self.shown["loss"] = f"{logs['loss']:.3f}"
        if f"eval_{self.metric}" in logs:
            self.shown[f"dev {self.metric}"] = f"{logs[f'eval_{self.metric}']:.3f}"
        if self.bar is not None:
            self.bar.set_postfix(self.shown)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
