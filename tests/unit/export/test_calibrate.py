"""Gates are measured on examples, not on the padding of a batch."""

import pytest
import torch
from transformers import BartForConditionalGeneration

from scaleup.data.metrics import IGNORED
from scaleup.export.calibrate import observe_gates
from scaleup.export.measure import Job, measure
from scaleup.unipelt.layers import SiteLayer
from scaleup.unipelt.sites import find_sites
from tests.utils.tiny import LABELS, TARGETS, adapt, backbone, batch

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


def test_effects_are_those_on_the_examples_of_the_calibration_alone():
    """What a process measures afterwards adds nothing to them, and is not slowed down."""
    model = adapt(backbone("bert"), submodules=["adapter", "prefix", "lora"])
    first, second = (batch(seed=seed) | {"labels": LABELS} for seed in (3, 4))
    observer = observe_gates(model, [first, second], 3, CPU, writes=False)
    effects = observer.effects()
    assert all(m.observer is None for m in model.modules() if isinstance(m, SiteLayer))
    fields = {"generate": None, "offload": "", "memory": None}
    job = Job(batches="", output="", writes=False, outputs=["logits"], **fields)
    measure(model, [first, second], job, CPU)
    assert observer.effects() == effects


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "mpnet"])
def test_the_effect_of_a_prefix_is_the_change_of_the_output_of_its_attention(family):
    model = adapt(backbone(family), submodules=["prefix"], gates="learned")
    inputs = batch()
    effects = observe_gates(model, [inputs | {"labels": LABELS}], 3, CPU, writes=False).effects()
    site = find_sites(model.get_base_model())[0][0]
    assert len(effects) == len(find_sites(model.get_base_model())[0])
    outputs = []
    if site.output is None:
        attention = model.get_base_model().get_submodule(site.name)
        attention.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    else:
        projection = model.get_base_model().get_submodule(site.output)
        projection.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    with torch.no_grad():
        model(**inputs)
        with model.disable_adapter():
            model(**inputs)
    real = inputs["attention_mask"].bool()
    # The first attention has the same input without the prefix.
    whole, without = (output[real] for output in (outputs[0], outputs[len(outputs) // 2]))
    expected = (whole - without).norm() / whole.norm()
    assert effects[site.name, "prefix"] == pytest.approx(expected.item(), rel=1e-4)
