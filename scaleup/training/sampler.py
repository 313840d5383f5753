"""The order in which a run sees its training examples."""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from accelerate.data_loader import prepare_data_loader
from transformers.trainer_pt_utils import get_length_grouped_indices

from scaleup.training.distributed import World


@dataclasses.dataclass(eq=False)
class ResumableSampler(torch.utils.data.Sampler[int]):
    """Draw the order of examples from seed and epoch alone.

    A run that is resumed in the middle of an epoch therefore sees the same batches. transformers'
    length groups use the global random state instead. Accelerate does not pass the epoch on to a
    sampler once it skips batches on several processes, so this sampler asks for it.

    Args:
        count: number of examples.
        epoch: returns the number of finished epochs.
        lengths: tokens per example, to put examples of similar length into one batch. If None, the
            order is a plain permutation.
        batch_size: examples per optimizer step and process, used with `lengths`.
    """

    count: int
    seed: int
    epoch: Callable[[], int]
    lengths: list[int] | None
    batch_size: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        if self.lengths is None:
            return iter(torch.randperm(self.count, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def stream_loader(
    rows: torch.utils.data.IterableDataset,
    collate: Callable[[list], dict[str, torch.Tensor]],
    batch_size: int,
    world: World,
) -> torch.utils.data.DataLoader:
    """Return the batches of a stream. One process reads it, and each gets its part of a batch.

    The examples of an optimizer step therefore do not depend on the number of processes.

    Args:
        batch_size: examples per process.
    """
    loader = torch.utils.data.DataLoader(
        rows, batch_size=batch_size * world.size, collate_fn=collate, drop_last=True
    )
    return prepare_data_loader(
        loader,
        world.device,
        world.size,
        world.rank,
        split_batches=True,
        put_on_device=True,
        dispatch_batches=world.size > 1,
    )
