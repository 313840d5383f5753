"""The loss of an evaluation is a mean over labels, whatever the batches are."""

import torch

from scaleup.data.metrics import IGNORED
from scaleup.training.evaluation import counted


def test_every_number_of_a_regression_is_a_label():
    assert counted(torch.tensor([float(IGNORED), 2.0])).item() == 2
    assert counted(torch.tensor([IGNORED, 2])).item() == 1
