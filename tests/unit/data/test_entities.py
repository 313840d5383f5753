"""The scores of entities are those of seqeval 1.2.2, whose output is recorded here."""

import random

import pytest

from scaleup.data.metrics import entities, entity_scores

TAGS = ["O", "O", "B-A", "I-A", "B-B", "I-B"]
# seqeval.metrics.{f1,precision,recall,accuracy}_score(truths, guesses) of `drawn(seed, right)`.
RECORDED = {
    (0, 0.9): (0.9146005509641874, 0.9222222222222223, 0.907103825136612, 0.9317507418397626),
    (1, 0.6): (0.6352941176470588, 0.6467065868263473, 0.6242774566473989, 0.7064846416382252),
    (2, 0.3): (0.39067055393586, 0.39880952380952384, 0.38285714285714284, 0.4931972789115646),
    (3, 0.0): (0.19251336898395724, 0.19148936170212766, 0.1935483870967742, 0.20241691842900303),
}


def drawn(seed: int, right: float) -> tuple[list[list[str]], list[list[str]]]:
    """Return random guesses and truths, also such as IOB2 does not allow."""
    draw = random.Random(seed)
    truths = [draw.choices(TAGS, k=draw.randint(1, 12)) for _ in range(50)]
    guesses = [
        [tag if draw.random() < right else draw.choice(TAGS) for tag in truth] for truth in truths
    ]
    return guesses, truths


@pytest.mark.parametrize("case", RECORDED)
def test_the_scores_equal_those_of_seqeval(case):
    f1, precision, recall, accuracy = RECORDED[case]
    assert entity_scores(*drawn(*case)) == pytest.approx(
        {"f1": f1, "precision": precision, "recall": recall, "accuracy": accuracy}, abs=1e-12
    )


def test_an_entity_ends_where_another_begins_or_its_type_changes():
    assert entities(["B-A", "I-A", "B-A", "I-B", "O", "I-A"]) == {
        ("A", 0, 1),
        ("A", 2, 2),
        ("B", 3, 3),
        ("A", 5, 5),
    }


def test_without_entities_the_scores_are_zero_and_the_accuracy_counts():
    found = entity_scores([["O", "O"]], [["O", "O"]])
    assert found == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0}
