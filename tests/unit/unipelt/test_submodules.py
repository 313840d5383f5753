"""What holds for every submodule in the list, alone and together with the others."""

import dataclasses

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from scaleup import UniPeltConfig, parameter_counts
from scaleup.export import calibrate, fold
from scaleup.unipelt.layers import SiteLayer
from scaleup.unipelt.model import submodule_of
from scaleup.unipelt.site_types import BlockSite
from scaleup.unipelt.sites import find_sites
from scaleup.unipelt.submodule import Submodule
from scaleup.unipelt.submodules import SUBMODULES, register
from tests.utils.exports import exported
from tests.utils.tiny import adapt, backbone, inputs, logits, same

FAMILIES = ("bert", "bart", "t5", "llama", "gpt2")
families = pytest.mark.parametrize("family", FAMILIES)
SUBSETS = [[name] for name in SUBMODULES] + [list(SUBMODULES)]
subsets = pytest.mark.parametrize("submodules", SUBSETS, ids="+".join)


@families
@subsets
def test_all_parameters_of_a_submodule_train_and_are_counted(family, submodules):
    model = adapt(backbone(family), submodules=submodules, gates="learned")
    model(**inputs(model, labels=True)).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    parts = {submodule_of(name) for name in trained if ".modules_to_save." not in name}
    assert parts == {*submodules, "gates"}
    counts = parameter_counts(model)["submodules"]
    assert {name for name, count in counts.items() if count} == {*submodules, "gates"}


@families
@subsets
def test_a_saved_submodule_loads_with_the_same_logits(family, submodules, tmp_path):
    model = adapt(backbone(family), submodules=submodules)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone(family), tmp_path).eval()
    assert same(logits(loaded), logits(model))


@families
@subsets
def test_unloading_gives_the_bare_backbone_back(family, submodules):
    model = adapt(backbone(family), submodules=submodules)
    bare = backbone(family)
    unloaded = model.unload()
    names = [name for name, _ in unloaded.named_modules() if "unipelt" in name]
    assert names == [] and type(unloaded) is type(bare)
    hidden = [m.base_model(**inputs(m))[0] for m in (unloaded.eval(), bare)]
    assert same(*hidden)


@families
@subsets
def test_a_standalone_folder_gives_the_same_logits(family, submodules, tmp_path):
    model = adapt(backbone(family), submodules=submodules)
    gates = None
    if len(submodules) == 1:
        gates = fold.constant_gates(model.peft_config["default"], *find_sites(backbone(family)))
    assert same(logits(exported(model, family, tmp_path, gates)), logits(model))


@families
@subsets
def test_measured_gates_and_effects_cover_every_site_and_pruning_leaves_sites_out(
    family, submodules, tmp_path
):
    """The folder equals the trained model with the same constants and the same sites left out."""
    model = adapt(backbone(family), submodules=submodules, gates="learned")
    sites = find_sites(backbone(family))
    batch = inputs(model, labels=True)
    writes = batch["labels"].dim() > 1
    observer = calibrate.observe_gates(model, [batch], 3, torch.device("cpu"), writes=writes)
    gates = {key: mean for key, (mean, _) in observer.gates().items()}
    expected = {
        (path, name)
        for name in submodules
        for path in SUBMODULES[name].paths(model.peft_config["default"], *sites)
    }
    assert {key for key in gates if key[1] != "value"} == expected
    prunable = {key for key in expected if SUBMODULES[key[1]].prunable}
    effects = observer.effects()
    assert set(effects) == prunable and all(effect > 0 for effect in effects.values())
    dropped = {max(keys) for name in submodules if (keys := [k for k in prunable if k[1] == name])}
    folder_model = exported(model, family, tmp_path, gates, frozenset(dropped))
    calibrate.freeze(model, gates, dropped)
    assert same(logits(folder_model), logits(model))


class Shift(Submodule):
    """A vector that is added to the output of every block: a submodule from outside the package."""

    name = "shift"
    parameters = (".unipelt_shift.",)

    class Layer(SiteLayer):
        adapter_layer_names = ("unipelt_shift", "unipelt_gate")

        def after_block(self, block, args, output):
            vector = self.active("unipelt_shift")
            if vector is None:
                return output
            z_BTD = output[0] if isinstance(output, tuple) else output
            gates, _ = self.evaluate(z_BTD, [])
            z_BTD = z_BTD + gates["shift"] * vector.bias
            return (z_BTD, *output[1:]) if isinstance(output, tuple) else z_BTD

    def paths(self, config, attentions, blocks: list[BlockSite]) -> list[str]:
        return [f"{site.name}.shift" for site in blocks]

    def attach(self, attachment) -> None:
        for site in attachment.blocks:
            block, passes = (
                attachment.model.get_submodule(site.name),
                attachment.passes[site.parent],
            )
            reference = next(m for m in block.modules() if isinstance(m, nn.Linear))
            layer = attachment.child(
                block,
                "unipelt_shift_layer",
                lambda reference=reference, passes=passes: self.Layer(reference, passes),
                {"after": "after_block"},
            )
            vector = nn.Linear(1, site.hidden_size)
            vector.weight = None
            path = f"{site.name}.shift"
            gate = attachment.gate(layer, path, (self.name,), site.hidden_size, site.causal)
            layer.add(attachment.adapter_name, unipelt_shift=vector, unipelt_gate=gate)


@pytest.fixture
def shift():
    register(Shift())
    yield
    del SUBMODULES["shift"]


def test_a_submodule_from_outside_trains_saves_and_loads(shift, tmp_path):
    model = adapt(backbone("bert"), submodules=["shift", "lora"])
    before = logits(model)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    model(**inputs(model, labels=True)).loss.backward()
    vectors = [p for n, p in model.named_parameters() if ".unipelt_shift." in n]
    assert len(vectors) == 3 and all(p.grad.abs().max() > 0 for p in vectors)
    optimizer.step()
    after = logits(model)
    assert not same(after, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone("bert"), tmp_path).eval()
    assert same(logits(loaded), after)
    assert parameter_counts(model)["submodules"]["shift"] == 3 * 32


def test_two_submodules_cannot_have_one_name(shift):
    with pytest.raises(ValueError, match="a submodule named shift exists already"):
        register(Shift())


def test_every_option_belongs_to_the_config_and_to_one_submodule():
    fields = {field.name for field in dataclasses.fields(UniPeltConfig)}
    options = [f.name for s in SUBMODULES.values() for f in dataclasses.fields(s.options)]
    assert len(options) == len(set(options)) and set(options) <= fields


def test_a_config_that_names_an_unknown_submodule_is_refused():
    with pytest.raises(ValueError, match="submodules must name adapter, .* each at most once"):
        get_peft_model(backbone("bert"), UniPeltConfig(submodules=["unknown"]))
