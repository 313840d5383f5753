"""torch.compile takes the whole adapted model: no graph break is ours."""

import pytest
import torch

from tests.tiny import adapt, backbone, inputs


@pytest.mark.parametrize("family", ["bert", "bart", "llama"])
def test_the_whole_model_is_one_graph_and_gives_the_same_logits(family):
    model = adapt(backbone(family), prefix_reparameterization="none")
    given = inputs(model) | ({} if family in ("bert", "bart") else {"use_cache": False})
    with torch.no_grad():
        expected = model(**given).logits
        torch._dynamo.reset()
        # The graph is what can break; a backend that generates code would only take time here.
        found = torch.compile(model, fullgraph=True, backend="eager")(**given).logits
    assert (found - expected).abs().max() < 1e-5
