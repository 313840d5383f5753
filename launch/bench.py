"""Times contenders side by side: one process, interleaved rounds, each round's time over the reference's of the same round.

    python launch/bench.py inference --geometry bert-base --batch 16 --length 128 --output results/bench/inference.json
    python launch/bench.py training  --geometry bert-base --batch 16 --length 32 --reference floor --output results/bench/training.json
    python launch/bench.py ragged    --texts cola ../shared/data/glue quickstart/model     examples of many lengths: padding and length groups
    python launch/bench.py memory    --geometry bart-large                                 peak of a training step, in fresh processes

On a CPU contenders change hands after every few layers, forwards and backwards, so that all share what else happens on the machine.
Prints and writes the median of the paired ratios with quartiles, and beside it what does not swing: floating point operations, calls of
torch operations, trained parameters; and tokens per second and the share of the rate that a large product of matrices reaches. Threads: OMP_NUM_THREADS, else all cores. Exit code 2: an argument must change.
"""

import argparse
import dataclasses
import gc
import json
import multiprocessing
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import tempfile


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from scaleup import errors, io  # noqa: E402
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# One arena of large pages that keeps what it has: glibc otherwise gives large tensors back to the system and fetches them again, page by page,
# whenever its heuristics of the moment say so, which falls on contenders at random (up to a tenth of a forward pass).
STEADY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def measure(contenders: dict, rounds: int, device: str) -> dict[str, list[list[float]]]:
    """Seconds of each step by contender, as a list of one piece; the order turns round by round, so that nobody always follows the same one."""
    from scaleup.experiments import meter

    names, found = list(contenders), {name: [] for name in contenders}
    for number in range(rounds + 2):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken = meter.seconds(contenders[name].step, device)
            if number >= 2:  # two rounds to warm up
                found[name].append([taken])
    return found


def measure_in_turns(contenders: dict, rounds: int) -> dict[str, list[list[float]]]:
    """As `measure`, but all do their step at once and hand over after some layers, a piece: what slows the machine for a second slows everybody.

    One works at a time, the others wait; only what is worked is counted.
    """
    from benchmarks.turns import InTurns

    workers = {
        name: contender.step
        if isinstance(contender.step, PeerStep)
        else InTurns(contender.step, contender.model)
        for name, contender in contenders.items()
    }
    names, found = list(workers), {name: [] for name in workers}
    try:
        for number in range(rounds + 2):
            turn, worked = number % len(names), {name: [] for name in names}
            working = names[turn:] + names[:turn]
            while working:
                for name in list(working):
                    done, seconds = workers[name].resume()
                    worked[name].append(seconds)
                    if done:
                        working.remove(name)
            if number >= 2:  # two rounds to warm up
                for name in names:
                    found[name].append(worked[name])
    finally:
        for worker in workers.values():
            worker.leave_alone()
    return found


class Peer:
    """launch/bench_peer.py in another environment."""

    def __init__(self, python: str, what: str, geometry: str, file: str):
        command = [
            python,
            str(pathlib.Path(__file__).with_name("bench_peer.py")),
            what,
            geometry,
            file,
        ]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            first = self.process.stdout.readline()
        except OSError as error:
            raise OSError(
                f"--peer: {python} cannot be started ({error.strerror}); make bench-peer makes an environment for it"
            ) from None
        if not first:
            raise OSError(
                f"--peer: {python} could not run bench_peer.py; make bench-peer makes an environment for it"
            )
        self.trained = json.loads(first)


@dataclasses.dataclass(frozen=True)
class PeerStep:
    """A step of one of the peer's contenders, whole when called, in pieces as `InTurns`."""

    peer: Peer
    name: str

    def resume(self) -> tuple[bool, float]:
        """A piece: whether the step is at its end, and the seconds worked. Raises OSError if the peer has ended."""
        self.peer.process.stdin.write(self.name + "\n")
        self.peer.process.stdin.flush()
        answer = self.peer.process.stdout.readline()
        if not answer:
            raise OSError("bench_peer.py has ended; what it printed last says why")
        return tuple(json.loads(answer))

    def __call__(self) -> None:
        while not self.resume()[0]:
            pass

    def leave_alone(self) -> None:
        """Nothing: it ends with this process."""


def at_least_one(word: str) -> int:
    """Of a command line. Raises ArgumentTypeError for anything but 1, 2, …"""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} is no number from 1 on")
    return int(word)


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=("inference", "training", "ragged", "memory"))
    parser.add_argument(
        "--geometry",
        choices=("bert-base", "bart-large", "bert-narrow", "llama-8b"),
        default="bert-base",
        help="bert-narrow: BERT-base without its width, for the time of Python alone; llama-8b: with --dtype bfloat16",
    )
    parser.add_argument("--batch", type=at_least_one, default=16)
    parser.add_argument("--length", type=at_least_one, default=128)
    parser.add_argument(
        "--ragged", action="store_true", help="inference, training: half of all tokens are padding"
    )
    parser.add_argument(
        "--texts",
        nargs=3,
        metavar=("TASK", "DATA", "TOKENIZER"),
        help="ragged: lengths of a GLUE task's texts (default: half padding)",
    )
    parser.add_argument("--examples", type=at_least_one, help="ragged: how many (default 256)")
    parser.add_argument(
        "--rounds", type=at_least_one, help="inference, training, ragged: default 15"
    )
    parser.add_argument("--only", nargs="*", default=[], help="these contenders")
    parser.add_argument("--reference", help="contender to divide by (default: the first)")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=("default", "reduce-overhead"),
        metavar="MODE",
        help="inference, training: each model through torch.compile; reduce-overhead: as CUDA graphs",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="inference, training: the time of each operation instead of whole steps",
    )
    parser.add_argument(
        "--peer",
        metavar="PYTHON",
        help="interpreter of an environment with the library adapters: its UniPELT takes part",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16: frozen weights in it, what is trained in float32, autocast",
    )
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    if options.profile and (options.peer or options.compile):
        parser.error(
            "--profile looks into models of this process as they are; leave out --peer and --compile"
        )
    if options.peer and (options.device == "cuda" or options.dtype != "float32" or options.compile):
        parser.error(
            "--peer works on the CPU, in float32 and as it is; leave out --device, --dtype and --compile"
        )
    if options.geometry == "llama-8b" and options.dtype == "float32":
        parser.error("--geometry llama-8b would take 32 GB in float32; add --dtype bfloat16")
    if options.ragged and (options.batch < 2 or options.length < 8):
        parser.error(
            "--ragged spreads lengths over a batch; give it --batch 2 and --length 8 or more"
        )
    if options.compile == "reduce-overhead" and options.device == "cpu":
        parser.error(
            "--compile reduce-overhead makes CUDA graphs, a CPU has none; leave out the mode"
        )
    steps = ("ragged", "compile", "profile", "peer")  # of one batch
    alone = ("texts", "examples")  # of what is ragged
    without_effect = {
        "inference": alone,
        "training": alone,
        "ragged": ("only", *steps),
        "memory": (*alone, "rounds", "reference", *steps),
    }
    idle = [f"--{name}" for name in without_effect[options.what] if getattr(options, name)]
    if idle:
        parser.error(f"{', '.join(idle)} would have no effect on {options.what}; leave it out")
    options.examples, options.rounds = options.examples or 256, options.rounds or 15
    if options.output is not None:  # known before anything is measured
        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            new = not options.output.exists()
            options.output.open("a").close()
            if new:  # a benchmark that is stopped leaves no empty one
                options.output.unlink()
        except OSError as error:
            parser.error(f"--output: {options.output} cannot be written: {error.strerror}")
    return options


def text_lengths(task: str, data: str, tokenizer: str, count: int, most: int) -> list[int]:
    """Tokens of `count` training texts, as a run with data.max_length=`most` would cut them."""
    from transformers import AutoTokenizer

    from scaleup.data import classification as texts
    from scaleup.settings import loading as yamlfile
    from scaleup.settings import schema as config

    try:
        settings = config.load(
            None,
            [
                yamlfile.override("data.path", data),
                yamlfile.override("data.name", task),
                f"data.max_length={most}",
                f"data.k={count}",
                "data.dev_size=1",
                "model.name=unused",
            ],
        ).data
        found = texts.load(settings)
    except errors.ConfigError as error:
        raise ValueError(f"--texts, --examples: {'; '.join(error.problems)}") from None
    try:
        words = AutoTokenizer.from_pretrained(tokenizer)
    except OSError:
        raise ValueError(
            f"--texts: no tokenizer {tokenizer}; give a model's folder, or its name where the hub can be reached"
        ) from None
    return list(texts.tokenize(found, words, settings).train["length"])


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for what the geometry or the machine does not have."""
    import torch

    from scaleup.experiments import bench

    positions = bench.GEOMETRIES[options.geometry]().max_position_embeddings
    if options.length > positions:
        raise ValueError(
            f"--length: {options.geometry} has {positions} positions, {options.length} do not fit"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; leave it out")


def timed(options: argparse.Namespace) -> dict[str, dict]:
    """A row for each contender. Raises ValueError for names that no contender has."""
    import torch

    from scaleup.experiments import bench, meter

    size, length, vocabulary = (
        options.batch,
        options.length,
        bench.GEOMETRIES[options.geometry]().vocab_size,
    )
    dtype = getattr(torch, options.dtype)
    if options.what == "ragged":
        lengths = (
            text_lengths(*options.texts, options.examples, length)
            if options.texts
            else bench.half_padding(options.examples, length)
        )
        contenders = bench.ragged(
            options.geometry,
            random.Random(0).sample(lengths, len(lengths)),
            size,
            length,
            options.device,
            dtype,
        )
    else:
        lengths = bench.half_padding(size, length) if options.ragged else [length] * size
        given = bench.batch(lengths, length, vocabulary)
        make = {"inference": bench.inference, "training": bench.training}[options.what]
        contenders = make(
            options.geometry, given, options.device, options.only, options.compile, dtype
        )
    if options.peer is not None:
        contenders |= peers(options, given)
    reference = options.reference or next(iter(contenders))
    if reference not in contenders:
        raise ValueError(f"--reference: {reference} is none of {', '.join(contenders)}")
    gc.collect()
    gc.disable()  # a collection would fall on whoever is running
    if options.profile:
        return profiled(contenders, options.rounds, reference)
    in_turns = options.what != "ragged" and options.device == "cpu" and not options.compile
    pieces = (
        measure_in_turns(contenders, options.rounds)
        if in_turns
        else measure(contenders, options.rounds, options.device)
    )
    seconds = {name: [sum(step) for step in steps] for name, steps in pieces.items()}
    best = {
        name: sum(map(min, zip(*steps))) for name, steps in pieces.items()
    }  # each piece's shortest time
    rows, rate = {}, meter.matmul_rate(options.device, dtype)
    for name, times in seconds.items():
        ratios = [own / other for own, other in zip(times, seconds[reference])]
        low, middle, high = (
            statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        )
        rows[name] = {
            "ratio": round(middle, 4),
            "quartiles": [round(low, 4), round(high, 4)],
            "best": round(best[name] / best[reference], 4),
        }
        rows[name] |= {
            "milliseconds": round(1000 * statistics.median(times), 2),
            "trained": contenders[name].trained,
        }
        rows[name]["tokens_per_second"] = round(sum(lengths) / statistics.median(times))
        if contenders[name].model is not None and not options.compile:
            rows[name] |= meter.counted(contenders[name].step)
            rows[name]["of_matmul_rate"] = round(
                rows[name]["gflop"] / statistics.median(times) / rate, 4
            )
    return rows


def profiled(contenders: dict, rounds: int, reference: str) -> dict[str, dict]:
    """Sum of all operations' shortest times, and the thirty longest."""
    from scaleup.experiments import meter

    found = {
        name: meter.operations(contender.step, rounds) for name, contender in contenders.items()
    }
    sums = {name: sum(ms for *_, ms in entries) for name, entries in found.items()}
    return {
        name: {
            "ratio": round(sums[name] / sums[reference], 4),
            "milliseconds": round(sums[name], 1),
            "operations": entries[:30],
        }
        for name, entries in found.items()
    }


def peers(options: argparse.Namespace, given: dict) -> dict:
    """The contenders of launch/bench_peer.py."""
    import torch

    from scaleup.experiments import bench

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = f"{folder}/batch.pt"
        torch.save(given, file)
        peer = Peer(options.peer, options.what, options.geometry, file)
    return {
        name: bench.Variant(PeerStep(peer, name), trained, None)
        for name, trained in peer.trained.items()
    }


def remembered(options: argparse.Namespace) -> dict[str, dict]:
    """Memory of each contender, in a fresh process each, over the first one's."""
    import torch

    from scaleup.experiments import bench

    given = bench.batch(
        [options.length] * options.batch,
        options.length,
        bench.GEOMETRIES[options.geometry]().vocab_size,
    )
    rows = {}
    for name in bench.chosen(bench.MEMORY, options.only):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows[name] = pool.apply(
                bench.memory,
                (name, options.geometry, given, options.device, getattr(torch, options.dtype)),
            )
        rows[name] = {
            "ratio": round(rows[name]["peak"] / next(iter(rows.values()))["peak"], 4)
        } | rows[name]
    return rows


def shown(name: str, row: dict, width: int) -> str:
    """A line of the screen."""
    if "peak" in row:
        return f"{name:<{width}}  {row['ratio']:.3f}  peak {row['peak'] / 2**20:8.0f} MiB  between steps {row['rest'] / 2**20:8.0f} MiB  {row['trained']:>12,} trained"
    if "operations" in row:
        lines = [
            f"{ms:10.1f} ms {calls:5d} x {kind} {shapes[: 160 - len(kind)]}"
            for kind, shapes, calls, ms in row["operations"][:20]
        ]
        return "\n".join(
            [
                f"{name:<{width}}  {row['ratio']:.3f}  {row['milliseconds']:9.1f} ms in all operations",
                *lines,
            ]
        )
    inside = (
        f"{row['gflop']:9.1f} GFLOP ({row['of_matmul_rate']:.2f} of a product's rate)  {row['calls']:6d} calls"
        if "calls" in row
        else " " * 56
    )
    low, high = row["quartiles"]
    return f"{name:<{width}}  {row['ratio']:.3f}  [{low:.3f}, {high:.3f}]  best {row['best']:.3f}  {row['milliseconds']:9.1f} ms  {row['tokens_per_second']:8,} tokens/s  {inside}  {row['trained']:>12,} trained"


def main() -> int:
    """Command line; the exit code."""
    options = arguments()
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        check(options)
        rows = remembered(options) if options.what == "memory" else timed(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    reference = options.reference or next(iter(rows))
    asked = {
        key: value for key, value in vars(options).items() if key not in ("output", "only")
    } | {"reference": reference}
    machine = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
    }
    rounds = "" if options.what == "memory" else f", {options.rounds} rounds"
    rounds += {None: "", "default": ", compiled", "reduce-overhead": ", compiled, as CUDA graphs"}[
        options.compile
    ]
    print(
        f"{options.what}, {options.geometry}, {options.batch} x {options.length}{' half padding' if options.ragged else ''}{rounds}, "
        f"{machine['gpu'] or str(machine['threads']) + ' threads'}, {options.dtype}; over {reference}"
    )
    width = max(map(len, rows))
    for name, row in rows.items():
        print(shown(name, row, width))
    if options.output is not None:
        try:
            io.write_json(options.output, {"settings": asked, "machine": machine, "rows": rows})
        except OSError as error:
            print(
                f"error: --output: {options.output} cannot be written: {error.strerror}",
                file=sys.stderr,
            )
            return 2
    return 0


if __name__ == "__main__":
    if not STEADY.keys() <= os.environ.keys():  # read by the C library when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], STEADY | os.environ)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
