"""Measures what each process holds and sends: frozen weights per rank and bytes of communication per step, by ZeRO stage.

    python launch/measure.py --processes 2 --output results/zero/measured.json [section.key=value …]

A backbone of BERT-base geometry with random weights (or model.name=… of your own) trains for four steps under every stage,
with bfloat16 and with 8-bit frozen weights. Writes the JSON and a Markdown table beside it. Works on CPU (gloo) and GPUs.

load: growth of a process's private memory (RssAnon) while it loads its share under ZeRO-3, sampled every 2 ms, in fresh processes.
frozen: bytes of frozen weights that this rank keeps between steps. linear: of those, the layers that 8 bit quantises.
sent: bytes of the tensors handed to each collective in one step; theory: the trained parameters, in the type they are reduced in.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import threading

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.cases import command, run_cases
from scaleup import errors

STAGES = ("none", "zero1", "zero2", "zero3")
KINDS = ("none", "8bit", "nf4")


def frozen_bytes(model) -> dict[str, int]:
    """Bytes of frozen weights in this process; a share counts as a share, a second copy as a second one."""
    from torch import nn

    heads = tuple(
        name
        for name, _ in model.named_modules()
        if name.endswith(("modules_to_save", "original_module"))
    )
    totals = {"frozen": 0, "linear": 0}
    for name, module in model.named_modules():
        if name.startswith(heads):
            continue
        tensors = {}
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.requires_grad:
                held = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data
                tensors[held.data_ptr()] = held
        state = getattr(module, "state", None)  # bitsandbytes' second reference to 8-bit weights
        for tensor in (getattr(state, "CB", None), getattr(state, "SCB", None)):
            if tensor is not None and tensor.numel():
                tensors[tensor.data_ptr()] = tensor
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        totals["frozen"] += size
        totals["linear"] += size if isinstance(module, nn.Linear) else 0
    return totals


class PeakMemory:
    """Largest growth of private memory between `start` and `stop`, bytes. Mapped files do not count."""

    def start(self) -> None:
        self.begin, self.most, self.running = self.now(), 0, threading.Event()
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()

    def sample(self) -> None:
        while not self.running.wait(0.002):
            self.most = max(self.most, self.now() - self.begin)

    def stop(self) -> int:
        self.running.set()
        self.thread.join()
        return self.most

    @staticmethod
    def now() -> int:
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(
            next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))
        )


def worker(path: pathlib.Path) -> None:
    """Under torchrun: every case of the file, one JSON line each from rank 0."""
    import deepspeed.comm
    import torch
    from transformers import TrainerCallback

    from scaleup.training import distributed as runtime

    class Meter(TrainerCallback):
        """Reads the counters between the third and the fourth step."""

        def __init__(self) -> None:
            self.before: dict = {}
            self.found: dict = {}

        def counts(self) -> dict[str, int]:
            logger = deepspeed.comm.comm.comms_logger
            return (
                {}
                if logger is None
                else {
                    op: sum(size * entry[0] for size, entry in sizes.items())
                    for op, sizes in logger.comms_dict.items()
                }
            )

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 3:
                self.before = self.counts()

        def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
            if state.global_step == 4:
                sent = {op: count - self.before.get(op, 0) for op, count in self.counts().items()}
                trained = sum(
                    p.ds_numel if hasattr(p, "ds_numel") else p.numel()
                    for p in model.parameters()
                    if p.requires_grad
                )
                kind = next(p.dtype for p in model.parameters() if p.requires_grad)
                self.found = {
                    **frozen_bytes(model),
                    "sent": {op: n for op, n in sent.items() if n},
                    "trained": trained,
                    "trained_dtype": str(kind),
                }

    cases = json.loads(path.read_text(encoding="utf-8"))
    meters = {name: Meter() for name in cases}
    refused = {
        name: words
        for name, words in run_cases(cases, lambda name: [meters[name]]).items()
        if words is not None
    }
    if refused:
        sys.exit(f"refused: {refused}")
    every = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(
        every, {name: meter.found for name, meter in meters.items()}
    )
    if os.environ["RANK"] == "0":
        path.with_suffix(".done.json").write_text(json.dumps(every), encoding="utf-8")
    runtime.leave()


def load_worker(kind: str, folder: str, name: str) -> None:
    """Under torchrun: loads the backbone under ZeRO-3, one JSON line from each rank into its own file."""
    import bitsandbytes  # noqa: F401 (its own memory is not the model's)
    import deepspeed  # noqa: F401
    import torch
    from transformers import AutoModelForSequenceClassification, TrainingArguments

    from scaleup.backbone import loading as backbone
    from scaleup.settings import schema as config
    from scaleup.training import distributed as runtime

    world = runtime.start(True)
    preset = str(
        pathlib.Path(__file__).resolve().parents[1]
        / "scaleup"
        / "settings"
        / "deepspeed"
        / "zero3.json"
    )
    kept = TrainingArguments(  # noqa: F841 (tells transformers of ZeRO-3 as long as it lives)
        output_dir=folder,
        deepspeed=preset,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        accelerator_config={"use_configured_state": True},
    )
    model = config.ModelSettings(name=name, quantization=kind)
    memory = PeakMemory()
    memory.start()
    loaded, _ = backbone.load_model(
        model,
        backbone.load_config(model),
        AutoModelForSequenceClassification,
        torch.bfloat16,
        world.device,
        True,
    )
    peak = memory.stop()
    sizes = [
        (p.ds_tensor.numel() * p.ds_tensor.element_size(), p.ds_numel * p.ds_tensor.element_size())
        for p in loaded.parameters()
    ]
    row = {
        "peak": peak,
        "after": memory.now() - memory.begin,
        "share": sum(s for s, _ in sizes),
        "whole": sum(w for _, w in sizes),
    }
    pathlib.Path(folder, f"load-{kind}-{world.rank}.json").write_text(json.dumps(row))
    runtime.gather(world, None)
    runtime.leave()


def prepare(folder: pathlib.Path) -> list[str]:
    """A BERT-base with random weights in bfloat16 and forty sentences."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "plot"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "bert-base")
    BertForSequenceClassification(BertConfig()).to(torch.bfloat16).save_pretrained(
        folder / "bert-base"
    )
    rows = [f"{random.choice(words[7:])} {label},{label}" for label in ("good", "bad") * 30]
    (folder / "train.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    return [
        f"model.name={folder / 'bert-base'}",
        f"data.train_file={folder / 'train.csv'}",
        "data.k=40",
        "data.dev_size=8",
    ]


def table(rows: dict[str, list[dict]], loads: dict[str, list[dict]], processes: int) -> str:
    """Markdown: stage × quantisation, per rank."""
    mib = 2**20
    reference = max(rank["linear"] for rank in rows["zero3-none"])
    lines = [
        f"{processes} processes, MiB per rank (the largest rank). `of bf16 ZeRO-3`: linear layers against bfloat16 under ZeRO-3.",
        "",
        "| stage | frozen weights | all frozen | linear layers | of bf16 ZeRO-3 |",
        "|---|---|---|---|---|",
    ]
    for name, ranks in rows.items():
        stage, kind = name.split("-")
        frozen, linear = (max(rank[key] for rank in ranks) for key in ("frozen", "linear"))
        lines.append(
            f"| {stage} | {'bfloat16' if kind == 'none' else kind} | {frozen / mib:.1f} | {linear / mib:.1f} | {linear / reference:.3f} |"
        )
    lines += [
        "",
        "Loading under ZeRO-3, MiB of private memory per rank (the largest rank).",
        "",
        "| frozen weights | whole backbone | share | peak while loading | after |",
        "|---|---|---|---|---|",
    ]
    for kind, ranks in loads.items():
        cells = [
            f"{max(rank[key] for rank in ranks) / mib:.0f}"
            for key in ("whole", "share", "peak", "after")
        ]
        lines.append(f"| {'bfloat16' if kind == 'none' else kind} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Bytes handed to collectives in one step, per rank; trained parameters in the type they are reduced in beside it.",
        "",
        "| stage | frozen weights | trained parameters, bytes | collectives, bytes |",
        "|---|---|---|---|",
    ]
    for name, ranks in rows.items():
        stage, kind = name.split("-")
        first = ranks[0]
        trained = first["trained"] * (2 if "bfloat16" in first["trained_dtype"] else 4)
        sent = (
            ", ".join(f"{op} {count:,}" for op, count in first["sent"].items())
            or "not counted (torch DDP)"
        )
        lines.append(
            f"| {stage} | {'bfloat16' if kind == 'none' else kind} | {trained:,} | {sent} |"
        )
    return "\n".join(lines) + "\n"


def start(arguments: list[str], processes: int) -> None:
    """This script under torchrun. Ends with one line where it fails; what failed stands above."""
    if subprocess.run(command(pathlib.Path(__file__), arguments, processes)).returncode:
        sys.exit("measure.py: the processes failed; see above")


def main() -> None:
    """Command line."""
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        worker(pathlib.Path(sys.argv[2]))
        return
    if len(sys.argv) == 5 and sys.argv[1] == "--load-worker":
        load_worker(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()

    from scaleup.settings import schema as config

    root = pathlib.Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="measure-") as name:
        folder = pathlib.Path(name)
        shared = [
            *prepare(folder),
            "train.bf16=true",
            "train.max_steps=4",
            "train.per_device_train_batch_size=2",
            "train.eval_strategy=steps",
            "train.eval_steps=4",
            "train.disable_tqdm=true",
            "train.logging_steps=1",
        ]
        comms = {
            "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False}
        }
        cases = {}
        for stage in STAGES:
            path = folder / f"{stage}.json"
            if stage != "none":
                preset = json.loads(
                    (root / "scaleup" / "settings" / "deepspeed" / f"{stage}.json").read_text(
                        encoding="utf-8"
                    )
                )
                path.write_text(json.dumps(preset | comms))
            for kind in KINDS:
                key = f"{stage}-{kind}"
                deepspeed = [] if stage == "none" else [f"train.deepspeed={path}"]
                cases[key] = [
                    *shared,
                    f"model.quantization={kind}",
                    f"train.output_dir={folder / key}",
                    *deepspeed,
                    *options.overrides,
                ]
        (folder / "cases.json").write_text(json.dumps(cases))
        try:
            backbone = config.load(None, cases["zero3-none"]).model.name
        except errors.ConfigError as error:
            sys.exit(str(error))
        loads = {}
        for kind in ("none", "8bit"):
            start(["--load-worker", kind, str(folder), backbone], options.processes)
            loads[kind] = [
                json.loads(path.read_text()) for path in sorted(folder.glob(f"load-{kind}-*.json"))
            ]
        start(["--worker", str(folder / "cases.json")], options.processes)
        every = json.loads((folder / "cases.done.json").read_text(encoding="utf-8"))
    rows = {name: [rank[name] for rank in every] for name in every[0]}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        json.dumps({"processes": options.processes, "rows": rows, "loads": loads}, indent=1) + "\n",
        encoding="utf-8",
    )
    options.output.with_suffix(".md").write_text(
        table(rows, loads, options.processes), encoding="utf-8"
    )
    print(table(rows, loads, options.processes))


if __name__ == "__main__":
    main()
