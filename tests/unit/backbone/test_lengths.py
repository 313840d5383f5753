"""The number of tokens that the position embeddings of a model allow."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from scaleup.backbone.lengths import FROM_PADDING, position_limit
from tests.utils.tiny import backbone

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 60,
    "max_position_embeddings": 40,
    "pad_token_id": 3,
}
# What some models need besides.
MORE = {
    "esm": {"mask_token_id": 4},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 4},
    "lilt": {"channel_shrink_ratio": 1},
    "longformer": {"attention_window": [4]},
    "luke": {"entity_vocab_size": 5, "entity_emb_size": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}


def test_the_positions_of_bert_are_all_for_tokens():
    assert position_limit(backbone("bert").config) == 48


@pytest.mark.parametrize("kind", FROM_PADDING)
def test_models_that_count_positions_from_the_padding_have_fewer_for_tokens(kind):
    config = AutoConfig.for_model(kind, **SIZES, **MORE.get(kind, {}))
    model, limit = AutoModel.from_config(config).eval(), position_limit(config)
    assert limit == (38 if kind == "mpnet" else 36)
    with torch.no_grad():
        model(input_ids=torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            model(input_ids=torch.full((1, limit + 1), 5))
