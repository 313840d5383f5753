"""Training steps as CUDA graphs: `train.cuda_graphs`.

A step of a small batch takes as long as the host needs to launch its kernels one by one. A CUDA
graph records the launches of the forward and the backward pass once for each shape of a batch, and
repeats them with a single call. Batches are padded to multiples of BUCKET tokens, so that there are
few shapes. The first steps of a shape run without a graph, because libraries choose their kernels
then; they train as all others do.
"""

import collections
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from scaleup.settings.schema import Settings
from scaleup.training.distributed import World

BUCKET = 32  # tokens
WARM_UPS = 3  # steps of a shape before it is recorded
MOST_GRAPHS = 16  # shapes; each keeps the activations of a step in memory
LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")

Step = Callable[[dict[str, torch.Tensor]], torch.Tensor]
Replay = Callable[[], torch.Tensor]


def problems(settings: Settings, world: World, config: PretrainedConfig) -> list[str]:
    """Return why steps cannot be recorded on this machine or of this model, if they shall be."""
    if not settings.train.cuda_graphs:
        return []
    found = []
    if world.device.type != "cuda":
        found.append("it needs a CUDA GPU; leave it out")
    if world.size > 1:
        found.append(f"it works with one process, not with {world.size}; leave it out")
    dropped = [name for name in LAYER_DROPS if getattr(config, name, 0)]
    if dropped:
        found.append(
            f"the model leaves out layers at random ({', '.join(dropped)} in its config.json), "
            "which a recording cannot repeat; set it to 0 there"
        )
    return [f"train.cuda_graphs: {problem}" for problem in found]


def record_on_gpu(function: Replay) -> Replay:
    """Record the kernels of a function, and return one that repeats them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()

    def replay() -> torch.Tensor:
        graph.replay()
        return out.clone()  # the next replay overwrites it

    return replay


def run_beside(function: Replay) -> torch.Tensor:
    """Run a function on a stream of its own, as the warm-up of a recording has to run."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        out = function()
    current.wait_stream(stream)
    return out


class StepGraphs:
    """Runs the steps of one model, and repeats recorded ones.

    Args:
        parameters: the parameters that may get gradients.
        step: runs forward and backward passes of a batch, and returns the loss. It must not wait
            for the device, and adds to the parameters' gradients.
        record: records a step; the default needs CUDA.
        warm_up: runs a step that is not recorded.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        step: Step,
        record: Callable[[Replay], Replay] = record_on_gpu,
        warm_up: Callable[[Replay], torch.Tensor] = run_beside,
    ):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.step, self.record, self.warm_up = step, record, warm_up
        self.seen: collections.Counter[Any] = collections.Counter()
        self.recorded: dict[Any, tuple[dict[str, torch.Tensor], Replay]] = {}
        self.gradients: list[torch.Tensor] = []  # at fixed addresses

    def __call__(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run one step and return its loss."""
        key = tuple((name, tuple(x.shape), x.dtype) for name, x in sorted(inputs.items()))
        if key not in self.recorded:
            self.seen[key] += 1
            if self.seen[key] <= WARM_UPS or len(self.recorded) >= MOST_GRAPHS:
                return self.warm_up(lambda: self.step(inputs))
            self._fix_gradients()
            fixed = {name: x.clone() for name, x in inputs.items()}
            self.recorded[key] = fixed, self.record(lambda: self.step(fixed))
        fixed, replay = self.recorded[key]
        for name, x in inputs.items():
            fixed[name].copy_(x)
        self._fix_gradients()
        return replay()

    def _fix_gradients(self) -> None:
        """Let the gradients lie where the recorded steps add to them, with their values so far."""
        if not self.gradients:
            self.gradients = [torch.zeros_like(p) for p in self.parameters]
        missing = []
        for parameter, fixed in zip(self.parameters, self.gradients):
            if parameter.grad is None:
                missing.append(fixed)
            elif parameter.grad is not fixed:
                fixed.copy_(parameter.grad)
            parameter.grad = fixed
        if missing:
            torch._foreach_zero_(missing)
