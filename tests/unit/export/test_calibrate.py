"""Gates are measured on examples, not on the padding of a batch."""

import pytest
import torch
from transformers import BartForConditionalGeneration

from scaleup.data.metrics import IGNORED
from scaleup.export.calibrate import observe_gates
from tests.utils.tiny import TARGETS, adapt, backbone, batch

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_the_padding_of_targets_changes_no_measured_gate(family):
    cls = BartForConditionalGeneration if family == "bart" else None
    model = adapt(backbone(family, cls=cls), submodules=["adapter", "prefix", "lora"])
    wider = torch.nn.functional.pad(TARGETS, (0, 5), value=IGNORED)
    one, other = (
        observe_gates(model, [batch() | {"labels": labels}], 3, CPU, writes=True)
        for labels in (TARGETS, wider)
    )
    assert any(abs(mean - 0.5) > 0.01 for mean, _ in one.gates().values())
    for key, values in one.gates().items():
        assert other.gates()[key] == pytest.approx(values, abs=2e-5), key
    assert other.effects() == pytest.approx(one.effects(), rel=1e-4)
