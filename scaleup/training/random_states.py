"""The random states of a process as tensors, and what a process gets that had none before."""

import hashlib
import random
from typing import Any

import numpy as np
import torch
from transformers import set_seed

VERSION = 3  # of the state of Python's generator
WORDS = 624  # of the state of numpy's generator


def random_states() -> dict[str, torch.Tensor]:
    """Return the states of the generators of Python, numpy and torch, also of this GPU."""
    version, words, gauss = random.getstate()
    assert version == VERSION
    numpy_state: Any = np.random.get_state()
    _, keys, position, has_gauss, cached = numpy_state
    states = {
        "python": torch.tensor(words),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor(keys.tolist()),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def check_random_states(states: dict[str, torch.Tensor]) -> None:
    """Raise an error of some kind if these are not the states that `random_states` returns."""
    _python(states, random.Random())
    _numpy(states, np.random.RandomState())
    torch.Generator().set_state(states["cpu"])


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """Continue where `random_states` was called."""
    _python(states, random)
    _numpy(states, np.random)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _python(states: dict[str, torch.Tensor], generator: Any) -> None:
    gauss = states["python_gauss"].tolist()
    words = tuple(states["python"].tolist())
    generator.setstate((VERSION, words, gauss[0] if gauss else None))


def _numpy(states: dict[str, torch.Tensor], generator: Any) -> None:
    position, has_gauss, cached = states["numpy_rest"].tolist()
    keys = np.array(states["numpy"].tolist(), dtype=np.uint32)
    if keys.shape != (WORDS,):  # numpy would read beyond a shorter one
        raise ValueError(f"the state of numpy has {len(keys)} words")
    generator.set_state(("MT19937", keys, int(position), int(has_gauss), cached))


def seed_anew(seed: int, step: int, rank: int) -> None:
    """Set all generators of a process whose number of processes is another than before."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    set_seed(int.from_bytes(digest[:4], "little"))
