"""Sentence Transformers with an adapter, as docs/clients.md shows it."""

import pytest
import torch
from transformers import AutoModel

pytest.importorskip(
    "sentence_transformers",
    reason="Sentence Transformers is not installed; `make test-clients` runs these tests",
)

from sentence_transformers import SentenceTransformer
from sentence_transformers.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

import scaleup

TEXTS = ["fine film", "the cold plot", "great", "a dull scene the actor"]


def test_an_added_adapter_trains_saves_and_loads(encoder, run, training):
    variables = run("Sentence Transformers")
    trained, loaded = variables["trainer"].model, variables["model"]
    assert trained is not loaded
    training.check(trained[0].model, AutoModel.from_pretrained("backbone"))
    expected = torch.tensor(trained.encode(TEXTS))
    torch.testing.assert_close(torch.tensor(loaded.encode(TEXTS)), expected)
    bare = torch.tensor(SentenceTransformer("backbone").encode(TEXTS))
    assert (bare - expected).abs().max() > 1e-3


def test_the_loss_falls_also_with_gradient_checkpointing(encoder, run):
    arguments = (
        "model=model,\n    args=SentenceTransformerTrainingArguments('runs', learning_rate=5e-3, "
        "logging_steps=1, num_train_epochs=6, gradient_checkpointing={}),"
    )
    name = "SentenceTransformerTrainer\n"
    imports = {name: "SentenceTransformerTrainer, SentenceTransformerTrainingArguments\n"}
    runs = []
    for checkpointing in (False, True):
        replace = imports | {"model=model,": arguments.format(checkpointing)}
        history = run("Sentence Transformers", replace=replace)["trainer"].state.log_history
        runs.append([entry["loss"] for entry in history if "loss" in entry])
    assert sum(runs[0][-5:]) < 0.9 * sum(runs[0][:5])
    assert runs[0] == pytest.approx(runs[1], abs=1e-4)


def test_the_cached_loss_gives_the_gradients_of_the_plain_one(encoder, monkeypatch):
    monkeypatch.chdir(encoder)
    torch.manual_seed(0)
    model = SentenceTransformer("backbone")
    model.add_adapter(scaleup.UniPeltConfig(task_type="FEATURE_EXTRACTION"))
    features = [model.preprocess(TEXTS), model.preprocess(TEXTS[::-1])]
    gradients = []
    for loss in (
        MultipleNegativesRankingLoss(model),
        CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
    ):
        model.zero_grad()
        loss([dict(part) for part in features], None).backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)
