"""Shard the frozen weights of a model with torch's FSDP2 (`fully_shard`).

Only frozen matrices are sharded. Everything else is whole on every process: vectors, because a copy
costs less than gathering them and the fast path reads them before a pass, and what is trained. DDP
averages the gradients of the latter as in a run without FSDP, so that checkpoints and optimizer
states are the same.

Accelerate's FSDP2 plugin cannot express this. It shards everything or leaves modules out of FSDP,
in which case nothing averages their gradients, and it needs the whole model on one process.

The blocks of a model are units: the weights of one are gathered before it runs in the forward and
in the backward pass, and freed afterwards. The root unit holds the other matrices, which are whole
from the beginning of a forward pass to the end of the backward pass.

A process reads only its own rows of the weight files.

This is the only file that calls `fully_shard`, and that tells DDP which parameters to leave out.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from scaleup.backbone.filling import TRIM_EVERY, Filler, names_of_parameters
from scaleup.backbone.int8 import Int8Linear
from scaleup.backbone.weights import Weights, return_freed_memory

AXIS = "fsdp"  # of the mesh


def make_mesh(mode: str, device: str, processes: int, per_host: int) -> DeviceMesh:
    """Return the processes among which weights are sharded. Every process must call this.

    Frozen weights have no gradients, so that hosts need not be a dimension of the mesh.

    Args:
        mode: `full` shards among all processes, `hybrid` among those of each host.
        device: type of the devices.
        per_host: processes on each host.
    """
    size = processes if mode == "full" else per_host
    # PEFT takes sharded weights under another name for those of tensor parallelism.
    return init_device_mesh(device, (processes // size, size), mesh_dim_names=("hosts", AXIS))[AXIS]


def units(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules whose weights are gathered together, except for the root.

    These are the blocks, which are the elements of the outermost module lists, and the input
    embedding if nothing else uses its weights: the backward pass does not need it.
    """
    found: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(module, nn.ModuleList):
                found.append(child)
            else:
                search(child)

    search(model)
    embedding: Any = model.get_input_embeddings()
    users = [m for m in model.modules() if m._parameters.get("weight") is embedding.weight]
    return [embedding, *found] if users == [embedding] else found


def stays_whole(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Return whether a frozen parameter is too small to be sharded."""
    row_scales = isinstance(module, Int8Linear) and parameter is module.scale
    return parameter.dim() < 2 and not row_scales


def _whole_parameters(
    model: PreTrainedModel, heads: Sequence[str], weights: Weights
) -> set[nn.Parameter]:
    """Return the parameters that are not sharded.

    These are also all parameters of a module that is not complete in the files, because it is
    initialised as a whole.
    """
    names, whole, shapes = names_of_parameters(model), set[nn.Parameter](), weights.shapes()
    for path, module in model.named_modules():
        scale = module.scale if isinstance(module, Int8Linear) else None
        own = [p for p in module._parameters.values() if p is not None]
        read = [p for p in own if p is not scale]
        in_head = any(path == head or path.startswith(f"{head}.") for head in heads)
        complete = all(p.shape in map(shapes.get, names[id(p)]) for p in read)
        whole |= {p for p in own if in_head or not complete or stays_whole(module, p)}
    return whole


class _RowFiller(Filler):
    """Fills the shards of this process."""

    def rows(self, empty: Any) -> slice | None:
        if not hasattr(empty, "device_mesh"):
            return None
        mesh = empty.device_mesh
        count = -(-len(empty) // mesh.size())  # of the first processes; the last may have fewer
        start = min(mesh.get_local_rank() * count, len(empty))
        return slice(start, min(start + count, len(empty)))

    def make_parameter(self, empty: Any, value: torch.Tensor) -> Any:
        if not hasattr(empty, "device_mesh"):
            return super().make_parameter(empty, value)
        from torch.distributed.tensor import DTensor

        assert value.shape == empty.to_local().shape
        shard = DTensor.from_local(
            value.to(self.device),
            empty.device_mesh,
            empty.placements,
            run_check=False,
            shape=empty.shape,
            stride=empty.stride(),
        )
        return nn.Parameter(shard, requires_grad=False)


def load_fsdp(
    model: PreTrainedModel,
    weights: Weights,
    device: torch.device,
    mesh: DeviceMesh,
    heads: Sequence[str],
) -> dict[str, set[str]]:
    """Shard a model of meta tensors, and fill the shards of this process.

    Args:
        heads: names of the modules that stay whole because they may be trained.

    Returns:
        `Filler.info`.
    """
    from torch.distributed.fsdp import fully_shard  # slow to import

    # It warns of blocks that return a view, to which nothing may be added in place. Hooks of
    # UniPELT compute in place only where no gradient is needed.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    whole = _whole_parameters(model, heads, weights)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter in whole)
    for unit in units(model):
        if any(p not in whole for p in unit.parameters()):
            fully_shard(unit, mesh=mesh, ignored_params=whole)
    root: Any = fully_shard(model, mesh=mesh, ignored_params=whole)
    filler, read = _RowFiller(model, weights, device), 0
    for prefix, module in model.named_modules():
        read += sum(p.numel() for p in filler.fill(prefix, module)) // mesh.size()
        if read > TRIM_EVERY:
            return_freed_memory()
            read = 0
    filler.finish()
    return_freed_memory()
    _watch_root(root)
    return filler.info


def _watch_root(root: Any) -> None:
    """Gather and free the weights of the root unit where FSDP2 does not.

    After an evaluation it would keep them until the next backward pass. If rank 0 saves a
    checkpoint in between, it frees them, and would gather them alone in the next forward pass.
    """

    def free(module: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            root.reshard()

    def gather(module: nn.Module, args: Any) -> None:
        root.unshard()

    root.register_forward_hook(free)
    if root.config.is_encoder_decoder:  # `generate` calls the encoder alone
        root.get_encoder().register_forward_pre_hook(gather, prepend=True)


def wrap(accelerator: Accelerator, model: nn.Module) -> DistributedDataParallel:
    """Prepare a model for training: mixed precision, and DDP for all that is not sharded.

    Accelerate itself refuses to wrap a model with sharded parameters in DDP.
    """
    names = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if hasattr(parameter, "device_mesh")
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    model = accelerator.prepare_model(model, evaluation_mode=True)  # without DDP
    handler, device = accelerator.ddp_handler, accelerator.device
    options = {} if handler is None else handler.to_kwargs()
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, **options)
