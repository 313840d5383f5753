"""torch.compile takes the whole adapted model: no graph break is ours."""

import pytest
import torch
from torch._dynamo.utils import counters

from scaleup.training.callbacks import GateStatistics
from tests.utils.tiny import adapt, backbone, inputs


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("family", ["bert", "bart", "llama"])
def test_the_whole_model_is_one_graph_and_gives_the_same_logits(family, kernels, monkeypatch):
    monkeypatch.setenv("SCALEUP_KERNELS", kernels)
    model = adapt(backbone(family), prefix_reparameterization="none")
    given = inputs(model) | ({} if family in ("bert", "bart") else {"use_cache": False})
    with torch.no_grad():
        expected = model(**given).logits
        torch._dynamo.reset()
        # The graph is what can break; a backend that generates code would only take time here.
        found = torch.compile(model, fullgraph=True, backend="eager")(**given).logits
    assert (found - expected).abs().max() < 1e-5


def test_a_run_that_logs_gates_is_one_graph_too_and_compiled_once():
    model = adapt(backbone("bert"))
    given, log = inputs(model, labels=True), GateStatistics(model, compiled=True)
    model(**given).loss.backward()
    expected = log.drain()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    addresses, graphs = (
        [gate.statistics.sums_3N.data_ptr() for _, gate in log.gates],
        counters["stats"]["unique_graphs"],
    )
    for _ in range(3):
        compiled(**given).loss.backward()
    found = log.drain()
    compiled(**given)
    assert counters["stats"]["unique_graphs"] == graphs + 1
    # CUDA graphs go on with the memory that they have seen.
    assert addresses == [gate.statistics.sums_3N.data_ptr() for _, gate in log.gates]
    assert found.keys() == expected.keys()
    for site, parts in expected.items():
        for part, values in parts.items():
            assert found[site][part] == pytest.approx(values, abs=2e-6)
