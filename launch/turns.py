"""A step that is done in pieces: `InTurns` works until the next layer begins, forwards or backwards, and waits there to be resumed.

For launch/bench.py and for its worker in another environment (bench_peer.py), so this file imports torch and transformers alone.
"""

import queue
import threading
import time
from collections.abc import Callable

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


class InTurns:
    """`step` of `model` in a thread of its own, which works only while `resume` waits for it.

    On a CPU autograd works in the thread that called `backward`, so that thread can wait between the backward passes of two layers, too.
    """

    def __init__(self, step: Callable[[], object], model: nn.Module):
        self._step, self._began = step, 0.0
        self._go, self._paused = threading.Semaphore(0), queue.SimpleQueue()
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._hooks = [layer.register_forward_pre_hook(self._before_layer) for layer in layers]
        threading.Thread(target=self._work, daemon=True).start()

    def _before_layer(self, module: nn.Module, args: tuple) -> None:
        self._pause()
        if args[0].requires_grad:
            args[0].register_hook(lambda gradient: self._pause())  # called when the layer's backward pass is over

    def _pause(self) -> None:
        self._paused.put((False, time.perf_counter() - self._began))
        self._go.acquire()
        self._began = time.perf_counter()

    def _work(self) -> None:
        while True:
            self._go.acquire()
            self._began = time.perf_counter()
            try:
                self._step()
            except BaseException as error:  # of whatever kind: `resume` raises it in the thread that waits
                self._paused.put(error)
            else:
                self._paused.put((True, time.perf_counter() - self._began))

    def resume(self) -> tuple[bool, float]:
        """Begins the next step, or goes on with it, up to the next layer: whether it is at its end, and the seconds worked. Raises what the step raises."""
        self._go.release()
        said = self._paused.get()
        if isinstance(said, BaseException):
            raise said
        return said

    def leave_alone(self) -> None:
        """The model's layers do not pause any more."""
        for hook in self._hooks:
            hook.remove()
