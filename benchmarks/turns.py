"""A step that is done in pieces: `InTurns` works for a few layers, forwards or backwards, and waits there to be resumed.

For launch/bench.py and for its worker in another environment (bench_peer.py), so this file imports torch and transformers alone.
"""

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

LAYERS = 4  # of a piece: half a second of the larger steps; after each layer, cold caches would make up a fifth of what is to be measured


class InTurns:
    """`step` of `model` in a thread of its own, which works only while `resume` waits for it.

    On a CPU autograd works in the thread that called `backward`, so that thread can wait between the backward passes of two layers, too.
    """

    def __init__(self, step: Callable[[], object], model: nn.Module):
        self._step, self._running, self._began = step, None, 0.0
        self._thread, self._pausing = concurrent.futures.ThreadPoolExecutor(1), True
        self._go, self._paused = threading.Semaphore(0), queue.SimpleQueue()
        found = [
            module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
        ]
        self._hooks = [
            layer.register_forward_pre_hook(self._before_layer) for layer in found[::LAYERS]
        ]

    def _before_layer(self, module: nn.Module, args: tuple) -> None:
        self._pause()
        if args[0].requires_grad:
            args[0].register_hook(
                lambda gradient: self._pause()
            )  # called when the backward pass of the piece is over

    def _pause(self) -> None:
        if self._pausing:
            self._paused.put((False, time.perf_counter() - self._began))
            self._go.acquire()
            self._began = time.perf_counter()

    def _whole(self) -> None:
        self._began = time.perf_counter()
        try:
            self._step()
        finally:
            self._paused.put((True, time.perf_counter() - self._began))

    def resume(self) -> tuple[bool, float]:
        """Begins the next step, or goes on with it, by a piece: whether it is at its end, and the seconds worked. Raises what the step raises."""
        if self._running is None:
            self._running = self._thread.submit(self._whole)
        else:
            self._go.release()
        done, seconds = self._paused.get()
        if done:
            step, self._running = self._running, None
            step.result()
        return done, seconds

    def leave_alone(self) -> None:
        """The model's layers do not pause any more; a step that waits goes on to its end."""
        self._pausing = False
        self._go.release()
        for hook in self._hooks:
            hook.remove()
