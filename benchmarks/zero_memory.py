"""Measure what each process holds and sends under every ZeRO stage.

    python -m benchmarks.zero_memory --output results/zero/measured.json [section.key=value …]

A model of BERT-base geometry with random weights (or your own: model.name=…) trains for four steps
under every stage, with frozen weights in bfloat16, int8 and nf4, on CPUs (gloo) or GPUs. The script
writes the JSON file and a Markdown table beside it:

- load: the growth of a process's private memory (RssAnon) while it loads its share under ZeRO-3,
  sampled every 2 ms in new processes.
- frozen: the bytes of frozen weights that the rank keeps between steps. linear: the part of them in
  the layers that quantisation applies to.
- sent: the bytes of the tensors that one step hands to each collective. Compare it with the trained
  parameters in the type in which they are reduced.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import threading

from benchmarks.cases import ROOT, argument_parser, command, run_cases, write_result

PRESETS = ROOT / "scaleup" / "settings" / "deepspeed"
STAGES = ("none", "zero1", "zero2", "zero3")
QUANTISATION = {"none": "bfloat16", "8bit": "int8", "nf4": "nf4"}  # setting → name in the tables
LOADED = ("none", "8bit")
COUNT_COLLECTIVES = {
    "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False}
}
SETTINGS = [
    "train.bf16=true",
    "train.max_steps=4",
    "train.per_device_train_batch_size=2",
    "train.eval_strategy=steps",
    "train.eval_steps=4",
    "train.disable_tqdm=true",
    "train.logging_steps=1",
    "data.k=40",
    "data.dev_size=8",
]
MIB = 2**20


def frozen_bytes(model) -> dict[str, int]:
    """Count the bytes of frozen weights in this process, without heads: `frozen` and `linear`.

    Of a sharded parameter only this rank's share counts. A second copy counts again.
    """
    from torch import nn

    from scaleup.backbone.sharded import stored_tensor

    wrappers = ("modules_to_save", "original_module")
    heads = tuple(name for name, _ in model.named_modules() if name.endswith(wrappers))
    totals = {"frozen": 0, "linear": 0}
    for name, module in model.named_modules():
        if name.startswith(heads):
            continue
        frozen = [p for p in module._parameters.values() if p is not None and not p.requires_grad]
        tensors = [stored_tensor(p) for p in frozen]
        state = getattr(module, "state", None)  # where bitsandbytes refers to int8 weights
        tensors += [getattr(state, key, None) for key in ("CB", "SCB")]
        distinct = {t.data_ptr(): t for t in tensors if t is not None and t.numel()}
        size = sum(t.numel() * t.element_size() for t in distinct.values())
        totals["frozen"] += size
        totals["linear"] += size if isinstance(module, nn.Linear) else 0
    return totals


class MemoryGrowth:
    """Sample the private memory of this process in a thread; mapped files do not count."""

    def __init__(self) -> None:
        self.begin, self.peak, self.stopped = private_bytes(), 0, threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def _sample(self) -> None:
        while not self.stopped.wait(0.002):
            self.peak = max(self.peak, private_bytes() - self.begin)

    def stop(self) -> int:
        """Return the largest growth in bytes."""
        self.stopped.set()
        self.thread.join()
        return self.peak


def private_bytes() -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def train_worker(path: pathlib.Path) -> None:
    """Run every case of the file under torchrun; rank 0 writes what all ranks measured."""
    import deepspeed.comm
    import torch
    from transformers import TrainerCallback

    from scaleup.backbone.sharded import whole_shape
    from scaleup.training import distributed

    class Meter(TrainerCallback):
        """Read the counters before and after the fourth step."""

        def __init__(self) -> None:
            self.before: dict[str, int] = {}
            self.row: dict = {}

        def sent_bytes(self) -> dict[str, int]:
            logger = deepspeed.comm.comm.comms_logger
            if logger is None:
                return {}
            return {
                collective: sum(size * entry[0] for size, entry in sizes.items())
                for collective, sizes in logger.comms_dict.items()
            }

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 3:
                self.before = self.sent_bytes()

        def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
            if state.global_step != 4:
                return
            sent = {key: n - self.before.get(key, 0) for key, n in self.sent_bytes().items()}
            trained = [p for p in model.parameters() if p.requires_grad]
            self.row = {
                **frozen_bytes(model),
                "sent": {key: n for key, n in sent.items() if n},
                "trained": sum(whole_shape(p).numel() for p in trained),
                "trained_dtype": str(trained[0].dtype),
            }

    cases = json.loads(path.read_text(encoding="utf-8"))
    meters = {name: Meter() for name in cases}
    errors = run_cases(cases, lambda name: [meters[name]])
    if any(errors.values()):
        sys.exit(f"refused: {errors}")
    every = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, {name: meter.row for name, meter in meters.items()})
    if os.environ["RANK"] == "0":
        write_result(path.with_suffix(".done.json"), every)
    distributed.leave()


def load_worker(quantisation: str, folder: str, name: str) -> None:
    """Load the backbone under torchrun and ZeRO-3; each rank writes a file with its memory."""
    # Imported first, so that the memory of the libraries themselves does not count.
    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401
    import torch
    from transformers import AutoModelForSequenceClassification, TrainingArguments

    from scaleup.backbone import loading
    from scaleup.backbone.sharded import stored_tensor, whole_shape
    from scaleup.settings import schema
    from scaleup.training import distributed

    world = distributed.start(True)
    arguments = TrainingArguments(  # noqa: F841 (while it exists, transformers loads for ZeRO-3)
        output_dir=folder,
        deepspeed=str(PRESETS / "zero3.json"),
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        accelerator_config={"use_configured_state": True},
    )
    settings = schema.ModelSettings(name=name, quantization=quantisation)
    config = loading.load_config(settings)
    growth = MemoryGrowth()
    model, _ = loading.load_model(
        settings, config, AutoModelForSequenceClassification, torch.bfloat16, world.device, True
    )
    peak = growth.stop()
    tensors = [(stored_tensor(p), whole_shape(p).numel()) for p in model.parameters()]
    row = {
        "peak": peak,
        "after": private_bytes() - growth.begin,
        "share": sum(t.numel() * t.element_size() for t, _ in tensors),
        "whole": sum(numel * t.element_size() for t, numel in tensors),
    }
    write_result(pathlib.Path(folder, f"load-{quantisation}-{world.rank}.json"), row)
    distributed.gather(world, None)
    distributed.leave()


def save_model_and_data(folder: pathlib.Path) -> list[str]:
    """Save a random BERT-base in bfloat16 and sixty sentences; return the overrides to use them."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "plot"]
    (folder / "vocab.txt").write_text("\n".join(words))
    model = folder / "bert-base"
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(model)
    BertForSequenceClassification(BertConfig()).to(torch.bfloat16).save_pretrained(model)
    rows = [f"{random.choice(words[7:])} {label},{label}" for label in ("good", "bad") * 30]
    (folder / "train.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    return [f"model.name={model}", f"data.train_file={folder / 'train.csv'}"]


def make_cases(folder: pathlib.Path, overrides: list[str]) -> dict[str, list[str]]:
    """Return the overrides of every stage and quantisation; the presets count collectives."""
    cases = {}
    for stage in STAGES:
        deepspeed = []
        if stage != "none":
            preset = json.loads((PRESETS / f"{stage}.json").read_text(encoding="utf-8"))
            (folder / f"{stage}.json").write_text(json.dumps(preset | COUNT_COLLECTIVES))
            deepspeed = [f"train.deepspeed={folder / stage}.json"]
        for quantisation in QUANTISATION:
            key = f"{stage}-{quantisation}"
            own = [f"model.quantization={quantisation}", f"train.output_dir={folder / key}"]
            cases[key] = [*SETTINGS, *own, *deepspeed, *overrides]
    return cases


def table(rows: dict[str, list[dict]], loads: dict[str, list[dict]], processes: int) -> str:
    """Make the Markdown tables, with the largest rank of each measurement."""
    reference = max(rank["linear"] for rank in rows["zero3-none"])
    memory, sending = [], []
    for key, ranks in rows.items():
        stage, quantisation = key.split("-")
        head, first = f"| {stage} | {QUANTISATION[quantisation]}", ranks[0]
        frozen, linear = (max(rank[name] for rank in ranks) for name in ("frozen", "linear"))
        ratio = linear / reference
        memory.append(f"{head} | {frozen / MIB:.1f} | {linear / MIB:.1f} | {ratio:.3f} |")
        trained = first["trained"] * (2 if "bfloat16" in first["trained_dtype"] else 4)
        sent = ", ".join(f"{name} {count:,}" for name, count in first["sent"].items())
        sending.append(f"{head} | {trained:,} | {sent or 'not counted (torch DDP)'} |")
    loading = []
    for quantisation, ranks in loads.items():
        keys = ("whole", "share", "peak", "after")
        cells = [f"{max(rank[key] for rank in ranks) / MIB:.0f}" for key in keys]
        loading.append(f"| {QUANTISATION[quantisation]} | {' | '.join(cells)} |")
    lines = [
        f"{processes} processes, MiB per rank (the largest rank). The last column compares the "
        "linear layers with bfloat16 under ZeRO-3.",
        "",
        "| stage | frozen weights | all frozen | linear layers | of bf16 ZeRO-3 |",
        "|---|---|---|---|---|",
        *memory,
        "",
        "Loading under ZeRO-3: MiB of private memory per rank (the largest rank).",
        "",
        "| frozen weights | whole backbone | share | peak while loading | after |",
        "|---|---|---|---|---|",
        *loading,
        "",
        "Bytes that one step hands to collectives, per rank, beside the trained parameters in the "
        "type in which they are reduced.",
        "",
        "| stage | frozen weights | trained parameters, bytes | collectives, bytes |",
        "|---|---|---|---|",
        *sending,
    ]
    return "\n".join(lines) + "\n"


def start_worker(arguments: list[str], processes: int) -> None:
    """Start this script as a worker under torchrun. Exit if it fails."""
    words = command("benchmarks.zero_memory", arguments, processes)
    if subprocess.run(words, cwd=ROOT).returncode:
        sys.exit("zero_memory: the worker processes failed; their output is above")


def main() -> None:
    """Measure all stages, or do the work of one process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.argv[1:2] == ["--train-worker"]:
        return train_worker(pathlib.Path(sys.argv[2]))
    if sys.argv[1:2] == ["--load-worker"]:
        return load_worker(*sys.argv[2:])
    parser = argument_parser(__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    loads = {}
    with tempfile.TemporaryDirectory(prefix="zero-") as name:
        folder = pathlib.Path(name)
        overrides = [*save_model_and_data(folder), *options.overrides]
        cases = make_cases(folder, overrides)
        model_names = [word for word in overrides if word.startswith("model.name=")]
        backbone = model_names[-1].partition("=")[2]
        for quantisation in LOADED:
            start_worker(["--load-worker", quantisation, name, backbone], options.processes)
            files = sorted(folder.glob(f"load-{quantisation}-*.json"))
            loads[quantisation] = [json.loads(path.read_text()) for path in files]
        write_result(folder / "cases.json", cases)
        start_worker(["--train-worker", str(folder / "cases.json")], options.processes)
        every = json.loads((folder / "cases.done.json").read_text(encoding="utf-8"))
    rows = {key: [rank[key] for rank in every] for key in every[0]}
    result = {"processes": options.processes, "rows": rows, "loads": loads}
    write_result(options.output, result)
    page = table(rows, loads, options.processes)
    options.output.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)
    return None


if __name__ == "__main__":
    main()
