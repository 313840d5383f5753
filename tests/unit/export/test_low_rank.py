"""Updates that absorb UniPELT: their least squares, and a student that equals what it can equal."""

import pytest
import torch
from torch import nn

from scaleup.data.metrics import IGNORED
from scaleup.export import distill, least_squares
from scaleup.export.absorbed import target_modules
from scaleup.export.low_rank import LowRank, Regression, Student
from scaleup.unipelt.sites import linear_layers
from tests.utils.tiny import adapt, backbone, batch, task_type

CPU = torch.device("cpu")
APL = ["adapter", "prefix", "lora"]


def data(model, count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Batches of random tokens with padding."""
    kind, batches = task_type(model.get_base_model()), []
    for number in range(count):
        found = batch(seed=10 + number)
        labels = torch.zeros(3, dtype=torch.long)
        if kind == "SEQ_2_SEQ_LM":
            labels = batch((6, 6, 6), seed=50 + number)["input_ids"]
        elif kind == "CAUSAL_LM":
            labels = found["input_ids"].masked_fill(found["attention_mask"] == 0, IGNORED)
        batches.append({**found, "labels": labels})
    return batches


def predictions_of(model) -> distill.Predictions:
    return distill.Predictions(task_type(model.get_base_model()) != "SEQ_CLS")


def texts_of(model, batches) -> list[least_squares.Batch]:
    writes = predictions_of(model).writes
    return [distill.model_batch(model, one, writes, CPU) for one in batches]


def student_of(model, rank: int) -> Student:
    model.requires_grad_(False)
    names = [name for group in linear_layers(model.get_base_model()).values() for name in group]
    torch.manual_seed(0)
    return Student.untrained(model, names, rank, CPU)


def distance(student: Student, batches) -> float:
    """Mean difference between the predictions of the trained model and of its student."""
    total = 0.0
    for one in batches:
        predictions = predictions_of(student.model)
        inputs = distill.model_batch(student.model, one, predictions.writes, CPU)
        with torch.no_grad():
            wanted = predictions.of(student.model, inputs, one["labels"])
            with student.active():
                given = predictions.of(student.model, inputs, one["labels"])
        total += (wanted - given).abs().mean().item()
    return total / len(batches)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_regression_has_the_least_squared_error_of_its_rank(rank, monkeypatch):
    monkeypatch.setattr("scaleup.export.low_rank.RIDGE", 0.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    y = torch.randn(40, 9, generator=generator)
    sums = Regression.zeros(6, 9, CPU)
    for rows in (slice(0, 15), slice(15, 40)):
        sums.add(x[rows], y[rows])
    down, up = sums.solve(rank)
    assert down.shape == (rank, 6) and up.shape == (9, rank)
    # Independently: the best approximation of that rank of the projection of y on the columns of x.
    q, _ = torch.linalg.qr(x.double())
    projected = q @ q.t() @ y.double()
    left, size, right = torch.linalg.svd(projected, full_matrices=False)
    best = left[:, :rank] * size[:rank] @ right[:rank]
    torch.testing.assert_close(x @ down.t() @ up.t(), best.float(), atol=1e-3, rtol=1e-3)


def test_setting_an_update_keeps_its_product_and_nothing_leaves_it_untrained():
    update = LowRank(5, 4, 2, CPU)
    start = update.A_RI.clone()
    update.set(torch.zeros(2, 5), torch.ones(4, 2))
    assert torch.equal(update.A_RI, start) and not update.B_OR.any()
    down, up = torch.randn(2, 5) * 100, torch.randn(4, 2)
    update.set(down, up)
    torch.testing.assert_close(update.B_OR @ update.A_RI, up @ down)
    torch.testing.assert_close(update.B_OR.norm(dim=0), update.A_RI.norm(dim=1))


@pytest.mark.parametrize("family", ["bert", "bart", "t5", "gpt2", "llama", "albert"])
def test_least_squares_finds_an_ungated_lora_exactly(family, monkeypatch):
    """LoRA without gates is a low-rank update of the weights, so nothing may be left."""
    monkeypatch.setattr("scaleup.export.low_rank.RIDGE", 1e-9)
    model = adapt(backbone(family), submodules=["lora"], gates="none").eval()
    student, batches = student_of(model, 8), data(model, 8)
    before = distance(student, batches)
    texts = texts_of(model, batches)
    left = least_squares.fit(student, texts, 8, CPU)
    assert max(left.values()) < 1e-4, left
    assert before > 1e-3 and distance(student, batches) < 0.01 * before


@pytest.mark.parametrize("family", ["bert", "bart", "gpt2", "llama", "deberta-v2", "gemma2"])
def test_least_squares_and_predictions_bring_the_student_closer(family):
    model = adapt(backbone(family), submodules=APL).eval()
    student, batches = student_of(model, 16), data(model, 8)
    before = distance(student, batches)
    texts = texts_of(model, batches)
    left = least_squares.fit(student, texts, 16, CPU)
    assert sum(left.values()) / len(left) < 0.5, left
    fitted = distance(student, batches)
    assert fitted < 0.7 * before
    losses = distill.train(student, batches, predictions_of(model), 20, CPU)
    assert losses[-1] < losses[0] and distance(student, batches) < fitted


def test_without_epochs_least_squares_stays_as_it_is():
    model = adapt(backbone("bert"), submodules=["lora"]).eval()
    student, batches = student_of(model, 4), data(model, 1)
    least_squares.fit(student, texts_of(model, batches), 4, CPU)
    before = distance(student, batches)
    assert distill.train(student, batches, predictions_of(model), 0, CPU) == []
    assert distance(student, batches) == before


def test_the_student_is_gone_outside_its_block_and_the_hooks_of_the_fit_after_it():
    model = adapt(backbone("bert"), submodules=APL).eval()
    batches = data(model, 2)
    texts = texts_of(model, batches)
    with torch.no_grad():
        expected = model(**texts[0].inputs).logits
    student = student_of(model, 4)
    least_squares.fit(student, texts, 4, CPU)
    with torch.no_grad():
        assert torch.equal(model(**texts[0].inputs).logits, expected)
        with student.active():
            assert not torch.equal(model(**texts[0].inputs).logits, expected)


def test_few_sums_at_a_time_give_the_same_updates(monkeypatch):
    found = []
    for limit in (2**32, 1):
        monkeypatch.setattr(least_squares, "SUMS_BYTES", limit)
        model = adapt(backbone("llama"), submodules=["adapter"], gates="none").eval()
        student = student_of(model, 4)
        texts = texts_of(model, data(model, 2))
        least_squares.fit(student, texts, 4, CPU)
        found.append({name: u.B_OR @ u.A_RI for name, u in student.updates.items()})
    for name, product in found[0].items():
        torch.testing.assert_close(found[1][name], product, atol=1e-5, rtol=1e-4)


def test_target_modules_are_the_shortest_endings_that_match_no_other_layer():
    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList(
                nn.ModuleDict({"q": nn.Linear(2, 2), "dense": nn.Linear(2, 2)}) for _ in range(2)
            ),
            "dense": nn.Linear(2, 2),
        }
    )
    assert target_modules(model, {"layers.0.q", "layers.1.q"}) == ["q"]
    names = {"layers.0.dense", "layers.1.dense"}
    assert target_modules(model, names) == ["0.dense", "1.dense"]


def test_predictions_are_distributions_of_every_task():
    """Answers are places among real tokens, and each of several labels is a yes or a no."""

    class Model:
        config = None

        def __call__(self, **inputs):
            return {
                "start": torch.tensor([[1.0, 2, 3]]),
                "end": torch.tensor([[4.0, 5, 6]]),
                "tags": torch.arange(6.0).reshape(1, 3, 2),
                "labels": torch.tensor([[2.0, -1]]),
            }

    batch = least_squares.Batch({}, torch.tensor([[True, True, False]]))
    unused = torch.zeros(1)

    def found(**fields):
        return distill.Predictions(False, **fields).of(Model(), batch, unused).softmax(-1)

    answers = found(outputs=("start", "end"))
    assert answers[:, 2].tolist() == [0, 0]
    expected = torch.tensor([[1.0, 2], [4, 5]]).softmax(-1)
    torch.testing.assert_close(answers[:, :2], expected)
    expected = torch.tensor([[0.0, 1], [2, 3]]).softmax(-1)
    torch.testing.assert_close(found(outputs=("tags",)), expected)
    several = found(outputs=("labels",), several=True)
    torch.testing.assert_close(several[:, 0], torch.tensor([2.0, -1]).sigmoid())
