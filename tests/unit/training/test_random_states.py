"""Random states are stored as tensors; another number of processes gets new ones."""

import random

import numpy as np
import torch

from scaleup.training.random_states import (
    check_random_states,
    random_states,
    seed_anew,
    set_random_states,
)


def draw() -> list[float]:
    return [random.gauss(0, 1), random.random(), np.random.randn(), torch.rand(()).item()]


def test_all_generators_go_on_where_they_were():
    draw()  # each gauss of Python and numpy keeps a second number
    states = random_states()
    check_random_states(states)
    expected = [draw() for _ in range(3)]
    draw()
    set_random_states(states)
    assert [draw() for _ in range(3)] == expected


def test_new_seeds_depend_on_seed_step_and_rank_alone():
    found = {}
    for key in [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3)]:
        seed_anew(*key)
        found[key] = draw()
    assert len({tuple(numbers) for numbers in found.values()}) == 4
    seed_anew(1, 2, 3)
    assert draw() == found[1, 2, 3]
