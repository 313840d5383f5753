"""Padding masks, beginnings of packed texts, and running means that continue from a cache."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from scaleup.unipelt.passes import Passes, RunningMean
from scaleup.unipelt.pooling import real_and_count, shares, text_starts
from tests.utils.tiny import backbone

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])


def test_masks_are_read_by_name_and_by_position():
    passes = Passes({"attention_mask": 1})
    passes.begin(passes, (torch.ones(3, 5), MASK), {})
    assert passes.current.mask_BT is MASK and passes.current.encoder_mask_BS is None
    passes.begin(passes, (), {"attention_mask": None, "encoder_attention_mask": MASK})
    assert passes.current.mask_BT is None and passes.current.encoder_mask_BS is MASK


@pytest.mark.parametrize("mask", [MASK.bfloat16(), MASK.bool(), MASK.byte(), 3 * MASK])
def test_neither_the_type_nor_the_numbers_of_a_mask_change_the_weights_of_tokens(mask):
    assert torch.equal(shares(mask), shares(MASK)) and shares(mask).dtype == torch.float32
    gates = torch.ones(3, 5, 1)
    for one, other in zip(real_and_count(gates, mask), real_and_count(gates, MASK), strict=True):
        assert torch.equal(one, other) and one.dtype == torch.float32


def test_in_a_mask_per_query_queries_that_see_no_key_are_padding():
    passes = Passes({})
    passes.kv_layers = 2  # as in a decoder
    seen = torch.ones(5, 5, dtype=torch.bool).tril() & MASK.bool()[:, None]
    for mask in (
        seen[:, None],
        torch.where(seen, 0.0, torch.finfo().min)[:, None],
        {"sliding": None, "full": seen[:, None]},
    ):
        passes.begin(passes, (), {"attention_mask": mask})
        assert torch.equal(passes.current.mask_BT, seen.any(-1))
    with pytest.raises(ValueError, match="padding mask of shape"):
        passes.begin(passes, (), {"attention_mask": torch.ones(1, 2, 3)})


def test_a_longer_mask_is_cut_to_the_tokens_of_the_pass():
    passes = Passes({})
    passes.begin(passes, (), {"attention_mask": MASK})
    assert torch.equal(passes.current.real(2), MASK[:, -2:]) and passes.current.real(5).shape == (
        3,
        5,
    )


def test_a_packed_text_begins_where_positions_do_not_increase_by_one():
    positions = torch.tensor([[0, 1, 2, 0, 1, 5, 6], [3, 4, 5, 6, 7, 8, 9]])
    assert text_starts(positions).tolist() == [[0, 0, 0, 3, 3, 5, 5], [0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("static", [False, True])
def test_a_running_mean_in_pieces_equals_that_of_the_whole(static):
    config = backbone("llama").config
    cache = StaticCache(config=config, max_cache_len=8) if static else DynamicCache(config=config)
    g, passes = torch.rand(3, 5, 2), Passes({})
    running = RunningMean(passes)
    passes.begin(passes, (), {"attention_mask": MASK})
    whole = running(g)
    passes.kv_layers = config.num_hidden_layers
    passes.new_slot(1)  # of a site that is not called
    running.slots[2] = passes.new_slot(2)
    pieces = []
    for start, end in ((0, 2), (2, 3), (3, 5)):
        passes.begin(passes, (), {"attention_mask": MASK[:, :end]})
        passes.note_cache(passes, (), {"past_key_values": cache})
        pieces.append(running(g[:, start:end]))
        for layer in cache.layers[: config.num_hidden_layers]:
            layer.update(torch.zeros(3, 2, end - start, 8), torch.zeros(3, 2, end - start, 8))
        passes.end(passes, (), g)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    order = torch.tensor([2, 0, 1])
    before = cache.layers[-1].last()[0].clone()
    cache.reorder_cache(order)
    assert torch.equal(cache.layers[-1].last()[0], before[order])
