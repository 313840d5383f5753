"""The parallel adapter against its formula, written out with hooks on the bare backbone."""

import pytest
import torch

from scaleup.unipelt.sites import find_sites
from tests.utils.tiny import FAMILIES, MIXED, NO_SDPA, adapt, backbone, inputs, logits, same

# family → the first and the last projection of its feed-forward sublayers, by hand
FEED_FORWARD = {
    "bert": ("intermediate.dense", "output.dense"),
    "roberta": ("intermediate.dense", "output.dense"),
    "bart": ("fc1", "fc2"),
    "t5": ("DenseReluDense.wi", "DenseReluDense.wo"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "opt": ("fc1", "fc2"),
    "llama": ("mlp.gate_proj", "mlp.down_proj"),
    "phi3": ("mlp.gate_up_proj", "mlp.down_proj"),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "distilbert": ("ffn.lin1", "ffn.lin2"),
    "albert": ("ffn", "ffn_output"),
    "modernbert": ("mlp.Wi", "mlp.Wo"),
    "qwen3_5_text": ("mlp.gate_proj", "mlp.down_proj"),
    "lfm2": ("feed_forward.w1", "feed_forward.w2"),
} | dict.fromkeys(("qwen3_moe", "mixtral", "gpt_oss", "qwen3_next"), (".mlp", ".mlp"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_feed_forward_sublayer_in_every_block(family):
    blocks = find_sites(backbone(family))[1]
    assert blocks and all(block.feed_forward is not None for block in blocks)
    if family in FEED_FORWARD:
        for block in blocks:
            first, last = block.feed_forward
            assert first.endswith(FEED_FORWARD[family][0])
            assert last.endswith(FEED_FORWARD[family][1])


@pytest.mark.parametrize(
    "family",
    ["bert", "bart", "t5", "llama", "gpt2", "phi3", "albert", "gpt_oss", "qwen3_next", "glm4_moe"],
)
def test_the_output_of_the_sublayer_grows_by_the_gated_bottleneck_of_its_input(family):
    """Causal gates are the running mean over real tokens; the others average over real tokens."""
    model = adapt(backbone(family), submodules=["parallel_adapter"], gates="learned")
    state = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    bare = backbone(family).double()
    if family in MIXED:  # the usual products of experts take no float64
        for part in (model.get_base_model(), bare):
            part.set_experts_implementation("eager")
    given = inputs(model)
    mask = given["attention_mask"].double()
    kept: dict[str, torch.Tensor] = {}

    def reference(block):
        first, last = block.feed_forward
        mine = f"{last}.unipelt_parallel."

        def weight(name: str) -> torch.Tensor:
            return state[f"{mine}{name}"].double()

        def keep(module, args):
            kept[last] = args[0]

        def add(module, args, out):
            x = kept[last]
            parts = "unipelt_parallel_adapter.default."
            down = x @ weight(f"{parts}down.weight").T + weight(f"{parts}down.bias")
            up = down.relu() @ weight(f"{parts}up.weight").T + weight(f"{parts}up.bias")
            gate = torch.sigmoid(
                x @ weight("unipelt_gate.default.weight").T + weight("unipelt_gate.default.bias")
            )
            # The decoder of an encoder-decoder model gets no mask here: all its tokens are real.
            real = torch.ones(x.shape[:2]).double() if "decoder." in last else mask
            real = real.unsqueeze(2)
            if block.causal:
                mean = (gate * real).cumsum(1) / real.cumsum(1).clamp(min=1)
            else:
                mean = (gate * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
            if isinstance(out, tuple):  # the experts' scores are behind it
                return (out[0] + mean * up, *out[1:])
            return out + mean * up

        bare.get_submodule(first).register_forward_pre_hook(keep)
        bare.get_submodule(last).register_forward_hook(add)

    for block in find_sites(backbone(family))[1]:
        reference(block)
    model = model.double()
    heads = {n: p for n, p in state.items() if ".modules_to_save." in n}
    for name, parameter in heads.items():
        module, _, rest = name.partition(".modules_to_save.default.")
        bare.get_submodule(module).get_parameter(rest).data = parameter.data.double()
    assert same(logits(model, given), logits(bare, given))


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_gradient_checkpointing_changes_no_gradient(family):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        values = backbone(family).config.to_dict().items()
        chances = {n: 0.0 for n, v in values if isinstance(v, float) and "dropout" in n}
        model = adapt(backbone(family, **chances), submodules=["parallel_adapter", "lora"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs(model, labels=True)).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert all(same(recomputed[name], gradient) for name, gradient in plain.items())


def test_a_block_without_a_feed_forward_sublayer_is_refused(monkeypatch):
    from scaleup.unipelt import sites

    monkeypatch.setattr(sites, "feed_forward", lambda *_: None)
    with pytest.raises(ValueError, match="found no feed-forward sublayer in bert.encoder.layer.0"):
        adapt(backbone("bert"), submodules=["parallel_adapter"])


def test_families_without_sdpa_work_too():
    for family in NO_SDPA:
        model = adapt(backbone(family), submodules=["parallel_adapter", "prefix"])
        assert torch.isfinite(logits(model)).all()


def test_examples_of_a_sublayer_that_gets_all_tokens_as_one_row_keep_their_own_gates():
    model = adapt(backbone("opt"), submodules=["parallel_adapter"], gates="learned")
    assert all(block.flat for block in find_sites(backbone("opt"))[1])
    given = inputs(model)
    together = logits(model, given)
    for row, tokens in enumerate(given["attention_mask"].sum(dim=1)):
        alone = {name: value[row : row + 1, :tokens] for name, value in given.items()}
        assert same(logits(model, alone), together[row : row + 1, :tokens])
    with model.disable_adapter():
        assert not same(logits(model, given), together)
