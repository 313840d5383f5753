"""Time the steps of several variants fairly on a machine that other programs disturb.

All variants are timed in rounds: each does one step per round, and the order rotates from round to
round. A variant's time is compared with the reference's time of the same round. On a CPU, variants
also hand over to each other after every few layers (`PausingStep`), so that a disturbance slows all
of them alike.

The environment of the baseline library loads this file too, so it imports only torch and
transformers.
"""

import concurrent.futures
import queue
import statistics
import threading
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

# Layers per piece. Handing over after every layer would leave the caches cold: a fifth of the time.
LAYERS = 4
WARM_UP_ROUNDS = 2

# Work on the next piece of a step. Returns whether the step is complete, and the piece's seconds.
Worker = Callable[[], tuple[bool, float]]


class PausingStep:
    """A step in pieces: it runs in its own thread, only while `resume` waits for it.

    A piece ends before every `LAYERS`-th layer of the forward pass and after the backward pass of
    the same layers. On a CPU, autograd works in the thread that called `backward`, so that thread
    can pause inside the backward pass as well.
    """

    def __init__(self, step: Callable[[], object], model: nn.Module):
        self._step, self._began, self._pausing = step, 0.0, True
        self._running: concurrent.futures.Future[None] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._go, self._paused = threading.Semaphore(0), queue.SimpleQueue[tuple[bool, float]]()
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self._hooks = [
            layer.register_forward_pre_hook(self._before_layer) for layer in layers[::LAYERS]
        ]

    def _before_layer(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._pause()
        if args[0].requires_grad:  # the hook runs when the backward pass of the piece is over
            args[0].register_hook(lambda gradient: self._pause())

    def _pause(self) -> None:
        if self._pausing:
            self._paused.put((False, time.perf_counter() - self._began))
            self._go.acquire()
            self._began = time.perf_counter()

    def _run(self) -> None:
        self._began = time.perf_counter()
        try:
            self._step()
        finally:
            self._paused.put((True, time.perf_counter() - self._began))

    def resume(self) -> tuple[bool, float]:
        """Start the next step or continue it by one piece. Raise what the step raises."""
        if self._running is None:
            self._running = self._thread.submit(self._run)
        else:
            self._go.release()
        done, seconds = self._paused.get()
        if done:
            step, self._running = self._running, None
            step.result()
        return done, seconds

    def close(self) -> None:
        """Let a step that waits run to its end, and stop pausing."""
        self._pausing = False
        self._go.release()
        for hook in self._hooks:
            hook.remove()


def step_seconds(step: Callable[[], object], device: str) -> float:
    """Time one step, up to the end of the work that it gave to a GPU."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - began


def whole_step(step: Callable[[], object], device: str) -> tuple[bool, float]:
    """Do a step in one piece, as a `Worker` does."""
    return True, step_seconds(step, device)


def time_rounds(workers: Mapping[str, Worker], rounds: int) -> dict[str, list[list[float]]]:
    """Time one step of every worker per round, after two rounds to warm up.

    Only one worker works at a time. The result has the seconds of each piece of each round.
    """
    names = list(workers)
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    for number in range(rounds + WARM_UP_ROUNDS):
        first = number % len(names)
        unfinished = names[first:] + names[:first]
        pieces: dict[str, list[float]] = {name: [] for name in names}
        while unfinished:
            for name in list(unfinished):
                done, piece_seconds = workers[name]()
                pieces[name].append(piece_seconds)
                if done:
                    unfinished.remove(name)
        if number >= WARM_UP_ROUNDS:
            for name in names:
                seconds[name].append(pieces[name])
    return seconds


def compare(pieces: dict[str, list[list[float]]], reference: str) -> dict[str, dict]:
    """Compare the times of `time_rounds` with the reference's times of the same rounds.

    Returns:
        For each variant: `ratio` and `quartiles`, the median and quartiles of the paired ratios;
        `best`, the ratio of the steps made up of each piece's shortest time; `milliseconds`, the
        median step.
    """
    steps = {name: [sum(step) for step in rounds] for name, rounds in pieces.items()}
    best = {name: sum(map(min, zip(*rounds))) for name, rounds in pieces.items()}
    rows = {}
    for name, seconds in steps.items():
        ratios = [one / other for one, other in zip(seconds, steps[reference])]
        several = ratios if len(ratios) > 1 else ratios * 2
        low, middle, high = statistics.quantiles(several, n=4, method="inclusive")
        rows[name] = {
            "ratio": round(middle, 4),
            "quartiles": [round(low, 4), round(high, 4)],
            "best": round(best[name] / best[reference], 4),
            "milliseconds": round(1000 * statistics.median(seconds), 2),
        }
    return rows
