"""What a model gives for prepared batches: logits, written text, loss, time. Imports nothing of scaleup.

    python -I scaleup/fresh.py JOB.json          loads an exported folder as its user would, where scaleup and PEFT do not exist

JOB: folder, auto (name of a transformers class), attention, batches (a file), generate (arguments or null), output (a file).
"""

import json
import resource
import sys
import time

import torch
import transformers
from torch import nn

COMPARED = 16  # examples whose logits are kept where each of their tokens has some
FOR_WRITING = ("prompt", "prompt_mask", "reference")  # of a batch, for its answers


def peak_mib() -> float:
    """Most memory this process has had. Not from getrusage where the kernel says it better: there a process starts with its parent's peak."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(
    model: nn.Module, batches: list[dict[str, torch.Tensor]], generate: dict | None
) -> dict:
    """logits: float32, [examples, classes], or [label tokens of the first examples, words]. written: tokens of each example. loss:
    mean over label tokens, None in a classification. seconds: of each batch."""
    device = next(model.parameters()).device
    logits, written, seconds, seen, loss, weight = [], [], [], 0, 0.0, 0
    writes = batches[0]["labels"].dim() > 1
    with torch.inference_mode():
        for batch in [batches[0], *batches]:  # the first one twice: it warms up
            batch = {name: value.to(device) for name, value in batch.items()}
            inputs = {
                name: value
                for name, value in batch.items()
                if name not in FOR_WRITING and (writes or name != "labels")
            }
            began = time.perf_counter()
            out = model(**inputs, **({"use_cache": False} if writes else {}))
            found = out.logits.float().cpu()
            seconds.append(time.perf_counter() - began)
            if len(seconds) == 1:
                continue
            if not writes:
                logits.append(found.reshape(len(found), -1))
                continue
            labels = batch["labels"].cpu()
            if not model.config.is_encoder_decoder:  # logits at a token are for the next one
                found, labels = found[:, :-1], labels[:, 1:]
            tokens = int((labels != -100).sum())
            loss, weight = loss + out.loss.item() * tokens, weight + tokens
            keep = max(0, min(len(labels), COMPARED - seen))
            seen += keep
            logits.append(found[:keep][labels[:keep] != -100])
            if generate is not None:
                prompt = batch.get("prompt", batch["input_ids"])
                mask = batch.get("prompt_mask", batch.get("attention_mask"))
                tokens_BT = model.generate(
                    input_ids=prompt, attention_mask=mask, do_sample=False, **generate
                ).cpu()
                written += [
                    row.tolist()
                    for row in (tokens_BT[:, prompt.shape[1] :] if "prompt" in batch else tokens_BT)
                ]
    return {
        "logits": torch.cat(logits),
        "written": written,
        "loss": loss / weight if weight else None,
        "seconds": seconds[1:],
        "peak_mib": peak_mib(),
    }


def main() -> None:
    """Command line: the job's file."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    sys.modules["scaleup"] = sys.modules["peft"] = None  # importing them fails from here on
    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, job["auto"]).from_pretrained(
        job["folder"], trust_remote_code=True, attn_implementation=job["attention"]
    )
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    torch.save(measure(model, torch.load(job["batches"]), job["generate"]), job["output"])


if __name__ == "__main__":
    main()
