"""Measure a model over prepared batches: logits, generated text, loss, time and memory.

    python -I scaleup/export/measure.py JOB.json

This command loads an exported folder as its user does, in a process without scaleup, and without
PEFT unless the export is a LoRA adapter. This file therefore imports nothing of scaleup.

Shapes: B examples, T tokens, V words of the vocabulary.
"""

import dataclasses
import json
import pathlib
import resource
import sys
import time
from typing import Any, Self

import torch
import transformers
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import get_max_memory
from safetensors import safe_open

ROOM = 0.8  # share of the free memory that weights may take
COMPARED = 16  # number of examples whose logits are kept if every token has logits
FOR_SCORES = ("prompt", "prompt_mask", "reference")  # entries of a batch that are not model inputs


@dataclasses.dataclass(kw_only=True)
class Job:
    """What a process measures; it is passed to the process as a JSON file.

    Attributes:
        batches: file with the batches, written by torch.save.
        output: file for the measurements.
        writes: the model generates text.
        outputs: names of the outputs of the model that are scored.
        generate: arguments of `generate`, None if the metric needs no text.
        offload: folder for weights that fit neither on the device nor in the memory of the host.
        memory: bytes of weights that may be on the device; None: most of what is free there.
    """

    batches: str
    output: str
    writes: bool
    outputs: list[str]
    generate: dict[str, int] | None
    offload: str
    memory: int | None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


@dataclasses.dataclass(kw_only=True)
class FolderJob(Job):
    """The job of measuring an exported folder.

    Attributes:
        folder: the folder.
        auto: name of transformers' AutoModelFor… class.
        attention: the attention implementation.
        adapter: a folder with a LoRA adapter of PEFT for the model in `folder`, None without one.
        settings: entries of the model's config that the adapter needs.
    """

    folder: str
    auto: str
    attention: str
    adapter: str | None = None
    settings: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(kw_only=True)
class Measurements:
    """What a process measured.

    Attributes:
        logits: float32, [examples, classes]; for text, [label tokens of the first examples, V]; for
            tasks with outputs for each token, [tokens without padding, classes].
        written: generated tokens of each example; empty if nothing is generated.
        loss: mean over label tokens, None for tasks without text.
        seconds: duration of the forward pass of each batch.
        peak_mib: largest memory of the process.
    """

    logits: torch.Tensor
    written: list[list[int]]
    loss: float | None
    seconds: list[float]
    peak_mib: float

    def save(self, path: str) -> None:
        torch.save(vars(self), path)

    @classmethod
    def load(cls, path: str) -> Self:
        return cls(**torch.load(path))


def peak_mib() -> float:
    """Return the largest memory that this process has had, in MiB.

    The kernel's VmHWM is preferred, because getrusage begins with the peak of the parent process.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(
    model: Any, batches: list[dict[str, torch.Tensor]], job: Job, device: torch.device
) -> Measurements:
    """Run a model, which computes on `device`, over batches."""
    is_text = job.writes
    logits, written, seconds, loss, label_tokens, compared = [], [], [], 0.0, 0, 0
    with torch.inference_mode():
        for i, cpu_batch in enumerate([batches[0], *batches]):  # the first batch is the warm-up too
            batch = {name: value.to(device) for name, value in cpu_batch.items()}
            excluded = FOR_SCORES if is_text else (*FOR_SCORES, "labels")
            inputs = {name: value for name, value in batch.items() if name not in excluded}
            began = time.perf_counter()
            out = model(**inputs, **({"use_cache": False} if is_text else {}))
            scored = [out[name].float().cpu() for name in job.outputs]
            if i == 0:
                continue
            seconds.append(time.perf_counter() - began)
            batch_logits = scored[0] if len(scored) == 1 else torch.stack(scored, dim=-1)
            if not is_text:
                by_token = batch_logits.dim() == 3
                logits.append(
                    batch_logits[cpu_batch["attention_mask"] != 0]
                    if by_token
                    else batch_logits.reshape(len(batch_logits), -1)
                )
                continue
            labels_BT = cpu_batch["labels"]
            if not model.config.is_encoder_decoder:  # the logits at a token predict the next one
                batch_logits, labels_BT = batch_logits[:, :-1], labels_BT[:, 1:]
            count = int((labels_BT != -100).sum())
            loss, label_tokens = loss + out.loss.item() * count, label_tokens + count
            keep = max(0, min(len(labels_BT), COMPARED - compared))
            compared += keep
            logits.append(batch_logits[:keep][labels_BT[:keep] != -100])
            if job.generate is not None:
                written += _generate(model, batch, job.generate)
    return Measurements(
        logits=torch.cat(logits),
        written=written,
        loss=loss / label_tokens if label_tokens else None,
        seconds=seconds,
        peak_mib=peak_mib(),
    )


def _generate(
    model: Any, batch: dict[str, torch.Tensor], generate: dict[str, int]
) -> list[list[int]]:
    """Return the tokens that the model generates for each example, without the prompt."""
    prompt_BT = batch.get("prompt", batch["input_ids"])
    mask_BT = batch.get("prompt_mask", batch.get("attention_mask"))
    tokens_BT = model.generate(
        input_ids=prompt_BT, attention_mask=mask_BT, do_sample=False, **generate
    )
    start = prompt_BT.shape[1] if "prompt" in batch else 0
    return tokens_BT[:, start:].tolist()


def _keep_own_tensors(model: Any, folder: pathlib.Path, device: torch.device) -> None:
    """Put the tensors of UniPELT on the device, where the others may wait elsewhere.

    Accelerate brings weights to modules that are called. Those of UniPELT are also read directly.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                owner, _, last = name.rpartition(".")
                module = model.get_submodule(owner) if "unipelt" in name else None
                if module is not None and module._parameters[last].device.type == "meta":
                    remove_hook_from_module(module)
                    tensor = file.get_tensor(name).to(device, module._parameters[last].dtype)
                    module._parameters[last] = torch.nn.Parameter(tensor, requires_grad=False)


def main() -> None:
    """Measure an exported folder. The argument is the file of a FolderJob."""
    job = FolderJob.from_json(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
    for name in ("scaleup", "peft") if job.adapter is None else ("scaleup",):
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it raises from here on
    transformers.utils.logging.disable_progress_bar()
    # Modules of UniPELT expect all inputs of a model on one device.
    home: int | str = 0 if torch.cuda.is_available() else "cpu"
    device, free = torch.device(home), get_max_memory()
    limits = {name: int(ROOM * free[name]) for name in (home, "cpu")}
    if job.memory is not None:
        limits[home] = job.memory
    model = getattr(transformers, job.auto).from_pretrained(
        job.folder,
        trust_remote_code=True,
        attn_implementation=job.attention,
        device_map="auto",
        max_memory=limits,
        offload_folder=job.offload,
        **job.settings,
    )
    if job.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job.adapter)
    _keep_own_tensors(model, pathlib.Path(job.folder), device)
    measure(model.eval(), torch.load(job.batches), job, device).save(job.output)


if __name__ == "__main__":
    main()
