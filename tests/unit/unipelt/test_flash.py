"""Flash attention: lengths of texts in place of masks, and what is refused."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BartForConditionalGeneration
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from scaleup.unipelt import flash
from scaleup.unipelt.attention import FLASH
from scaleup.unipelt.flash import check_flash, flash_lengths
from scaleup.unipelt.kernels import planned_for
from tests.unit.unipelt.kernels.test_lse_attention import Record
from tests.utils.tiny import EOS, adapt, backbone, inputs

FAMILIES = ("bert", "modernbert", "bart", "gpt2", "llama", "mistral", "gemma3_text", "phi")
PACKED = (5, 4, 2)  # texts in one row


def lengths(mask, queries: int, encoder: bool = False, **kwargs):
    function = bidirectional_mask_function if encoder else causal_mask_function
    mask = torch.tensor(mask)
    keys = mask.shape[1]
    offset = 0 if encoder else keys - queries
    return flash_lengths(len(mask), queries, keys, offset, 0, function, mask, **kwargs).tolist()


def test_padding_on_either_side_is_a_text_of_its_own():
    assert lengths([[0, 0, 1, 1], [1, 1, 1, 0]], 4) == [[0, 2, 4, 4, 4, 7, 8]] * 2


def test_the_last_query_after_cached_tokens_has_the_position_of_the_last_key():
    queries, keys = lengths([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], 2)
    assert queries == [0, 0, 2, 2, 2, 4, 4] and keys == [0, 2, 5, 5, 5, 10, 10]


def test_all_queries_of_an_encoder_see_the_real_keys():
    queries, keys = lengths([[1, 1, 0], [0, 0, 0]], 4, encoder=True)
    assert queries == [0, 0, 4, 4, 4, 8, 8] and keys == [0, 0, 2, 3, 6, 6, 6]


def test_there_are_no_lengths_where_nothing_is_padded():
    assert flash_lengths(1, 3, 3, attention_mask=torch.ones(1, 3)) is None
    assert flash_lengths(1, 3, 3) is None


def test_padding_between_tokens_is_refused():
    with pytest.raises(RuntimeError, match="padding between the tokens of a text"):
        lengths([[1, 0, 1]], 3)


def test_a_static_cache_is_refused():
    for offset in (0, torch.tensor(0)):
        with pytest.raises(ValueError, match="does not work with a static cache"):
            flash_lengths(1, 3, 8, offset)


def switched(family: str, attention: str, cls=None):
    return adapt(backbone(family, attention, cls)).double()


def batch(model, rows: str) -> dict[str, torch.Tensor]:
    given = inputs(model, labels=True)
    if rows in ("full", "packed"):
        given.pop("attention_mask")
        given["input_ids"] = given["input_ids"].clamp(min=4)
        given["input_ids"][:, -1] = EOS
    if rows == "packed":
        positions = torch.cat([torch.arange(length) for length in PACKED])
        given["position_ids"] = positions.expand(len(given["input_ids"]), -1)
        given["use_cache"] = False  # with a cache, transformers ignores the positions
    if rows == "left padding":
        for name in ("input_ids", "attention_mask"):
            given[name] = given[name].flip(1)
    return given


def results(model, given) -> dict[str, torch.Tensor]:
    out = model(**given)
    out.loss.backward()
    real = out.logits
    if "attention_mask" in given and real.shape[1:2] == given["input_ids"].shape[1:2]:
        real = real * given["attention_mask"].unsqueeze(2)
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": real.detach(), **grads}


def compare(found, expected) -> None:
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("rows", ["padding", "left padding", "full", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_sdpa(family, rows, monkeypatch):
    if rows == "packed" and family in ("bert", "modernbert", "bart"):
        pytest.skip("only rows of a decoder are packed")
    if rows == "left padding" and family == "modernbert":
        pytest.skip("its head reads the first position, which is padding")
    monkeypatch.setenv("SCALEUP_KERNELS", "off")
    model = switched(family, "sdpa")
    given = batch(model, rows)
    expected = results(model, given)
    monkeypatch.setenv("SCALEUP_KERNELS", "reference")
    compare(results(switched(family, FLASH), given), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_packed_rows_need_no_mask_with_sdpa_either(family, monkeypatch):
    model = switched(family, "sdpa")
    given, masks = batch(model, "packed"), []
    monkeypatch.setenv("SCALEUP_KERNELS", "off")
    expected = results(model, given)
    visible = flash.flash_visible

    def record(module, query, key, lengths, *rest):
        masks.append(lengths)
        return visible(module, query, key, lengths, *rest)

    monkeypatch.setattr("scaleup.unipelt.attention.flash_visible", record)
    monkeypatch.setenv("SCALEUP_KERNELS", "reference")
    model.zero_grad()
    compare(results(model, given), expected)
    if family == "mistral":  # its windows are in the mask
        assert not masks
    else:
        ends = torch.tensor([0, 5, 9, 11, 16, 20, 22, 27, 31, 33]).expand(2, -1)
        assert masks and all(torch.equal(lengths, ends.int()) for lengths in masks)


@pytest.mark.parametrize("rows", ["padding", "packed"])
def test_a_model_without_a_prefix_uses_it_too(rows, monkeypatch):
    model = backbone("llama", "sdpa").double()
    given = batch(model, rows)
    expected = results(model, given)
    monkeypatch.setenv("SCALEUP_KERNELS", "reference")
    compare(results(backbone("llama", FLASH).double(), given), expected)


@pytest.mark.parametrize("family", ["bart", "llama", "mistral"])
def test_generation_gives_the_same_tokens(family, monkeypatch):
    cls = BartForConditionalGeneration if family == "bart" else None
    tokens = []
    for attention in ("sdpa", FLASH):
        monkeypatch.setenv("SCALEUP_KERNELS", "off" if attention == "sdpa" else "reference")
        model = switched(family, attention, cls)
        given = {name: x.flip(1) for name, x in inputs(model).items() if "decoder" not in name}
        tokens.append(model.generate(**given, max_new_tokens=6, do_sample=False))
    assert torch.equal(*tokens)


def test_several_queries_after_cached_ones_see_what_they_would_see_in_one_pass(monkeypatch):
    monkeypatch.setenv("SCALEUP_KERNELS", "reference")
    model = switched("llama", FLASH)
    ids = inputs(model)["input_ids"][:1]
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, rtol=0, atol=1e-5)


def test_a_static_cache_is_refused_during_generation(monkeypatch):
    monkeypatch.setenv("SCALEUP_KERNELS", "reference")
    model = switched("llama", FLASH)
    with pytest.raises(ValueError, match="does not work with a static cache"):
        model.generate(**inputs(model), max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_it_is_refused_on_a_cpu(mode, monkeypatch):
    monkeypatch.setenv("SCALEUP_KERNELS", mode)
    model = switched("llama", FLASH)
    with pytest.raises(ValueError, match="model.attention: flash needs a GPU"):
        model(**inputs(model))


@pytest.mark.parametrize("family", ["t5", "deberta-v2", "mpnet", "gemma2"])
def test_models_that_need_more_than_the_kernel_has_are_refused(family):
    with pytest.raises(
        ValueError, match="^model.attention: flash: .*set model.attention=(sdpa|eager)$"
    ):
        check_flash(backbone(family))


def test_attention_sinks_are_refused_before_a_run():
    with pytest.raises(ValueError, match="gpt_oss has attention sinks; set model.attention=eager"):
        check_flash(backbone("gpt_oss"))


def test_masks_per_query_and_key_are_refused(monkeypatch):
    monkeypatch.setenv("SCALEUP_KERNELS", "reference")
    model = backbone("llama", FLASH)
    given = inputs(model)
    given["attention_mask"] = given["attention_mask"][:, None, None].expand(-1, -1, 11, -1).float()
    with pytest.raises(ValueError, match="takes no mask of its own"):
        model(**given)


@pytest.mark.parametrize("rows", ["padding", "full"])
def test_on_cuda_only_the_flash_kernel_runs_and_nothing_has_the_size_of_the_scores(rows):
    model = adapt(backbone("llama", FLASH, max_position_embeddings=512), randomise=False)
    model.to(torch.bfloat16).to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True), planned_for("cuda"):
        model.to_empty(device="cpu")
        ids = torch.zeros(2, 256, dtype=torch.long)
        given = {"input_ids": ids, "labels": ids}
        if rows == "padding":
            given["attention_mask"] = torch.ones_like(ids)
        with Record() as record:
            model(**given).loss.backward()
    assert {"_flash_attention_forward", "_flash_attention_backward"} <= record.names
    assert not any("efficient" in name for name in record.names)
    assert not any(sum(size >= 256 for size in shape) > 1 for shape in record.shapes)


@pytest.mark.parametrize("rows", ["padding", "full"])
def test_a_compiled_model_is_one_graph(rows, monkeypatch):
    monkeypatch.setenv("SCALEUP_KERNELS", "reference")
    model = switched("llama", FLASH)
    given = batch(model, rows) | {"use_cache": False}
    with torch.no_grad():
        expected = model(**given).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**given).logits
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-6)


def test_a_compiled_model_refuses_packed_rows(monkeypatch):
    monkeypatch.setenv("SCALEUP_KERNELS", "reference")
    model = switched("llama", FLASH)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match="take no packed rows"):
        compiled(**batch(model, "packed"))
