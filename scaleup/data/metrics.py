"""The metrics of every task.

A metric that `data.metric` may name is also listed in `scaleup.settings.data_rules.METRICS` and in
the type of `scaleup.settings.data.DataSettings.metric`; `make schema docs-pages` follows.
"""

import collections
import itertools
import re
import string
from collections.abc import Callable
from typing import Any

import numpy as np
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from sklearn import metrics
from transformers import EvalPrediction, PreTrainedTokenizerBase

from scaleup.data.examples import Examples

IGNORED = -100  # label of tokens that the loss leaves out


def _correlations(outputs: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return both correlations of outputs [examples, 1]; 0 if they are undefined."""
    if not np.isfinite(outputs).all() or np.ptp(outputs) == 0 or np.ptp(truth) == 0:
        return {"spearman": 0.0, "pearson": 0.0}
    values = outputs[:, 0], truth
    both = {"spearman": stats.spearmanr(*values), "pearson": stats.pearsonr(*values)}
    return {name: float(np.nan_to_num(result.statistic)) for name, result in both.items()}


def label_metrics(
    examples: Examples, tokenizer: PreTrainedTokenizerBase
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a function that computes the main metric and its companions, as shares of 1.

    f1 and matthews come with accuracy; spearman comes with pearson. F1 is that of class id 1; with
    more than two classes it is the macro average over the classes that occur. NaN among the outputs
    of an example makes it wrong. In a regression NaN makes both correlations 0, as constant outputs
    do.
    """

    def score(prediction: EvalPrediction) -> dict[str, float]:
        outputs = prediction.predictions
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        truth = np.asarray(prediction.label_ids).reshape(-1)
        outputs = np.asarray(outputs, dtype=np.float64).reshape(len(truth), -1)
        if examples.task == "regression":
            return _correlations(outputs, truth)
        guess = np.where(np.isnan(outputs).any(axis=1), -1, outputs.argmax(axis=1))
        scores = {"accuracy": float(metrics.accuracy_score(truth, guess))}
        if examples.metric == "f1":
            binary = examples.labels is not None and len(examples.labels) == 2
            classes = [1] if binary else sorted(set(truth) | set(guess) - {-1})
            options = {"labels": classes, "average": "macro", "zero_division": 0}
            scores["f1"] = float(metrics.f1_score(truth, guess, **options))
        if examples.metric == "matthews":
            scores["matthews"] = float(metrics.matthews_corrcoef(truth, guess))
        return scores

    return score


def decode(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> list[str]:
    """Return generated texts without special tokens and surrounding blanks."""
    tokens = np.where(tokens == IGNORED, tokenizer.pad_token_id, tokens)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def score(written: list[str], references: list[list[str]]) -> dict[str, float]:
    """Compute BLEU (sacrebleu, corpus), ROUGE-1, -2 and -L (F1) and exact matches, as shares of 1.

    ROUGE is the mean over examples. With several references BLEU uses all of them; the other
    metrics use the best one.
    """
    columns: Any = list(itertools.zip_longest(*references))
    scores = {"bleu": sacrebleu.corpus_bleu(written, columns).score / 100}
    kinds = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    scorer = RougeScorer(list(kinds.values()), use_stemmer=False)
    rouge = [scorer.score_multi(refs, text) for text, refs in zip(written, references)]
    for name, kind in kinds.items():
        scores[name] = float(np.mean([row[kind].fmeasure for row in rouge]))
    exact = [text in {ref.strip() for ref in refs} for text, refs in zip(written, references)]
    return scores | {"exact_match": float(np.mean(exact))}


def text_metrics(
    examples: Examples, tokenizer: PreTrainedTokenizerBase
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a function that scores tokens. Its label_ids are indices into `references`."""

    def score_texts(prediction: EvalPrediction) -> dict[str, float]:
        assert examples.references is not None
        rows = np.asarray(prediction.label_ids).reshape(-1)
        references = [examples.references[int(row)] for row in rows]
        return score(decode(tokenizer, prediction.predictions), references)

    return score_texts


def entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """Return type, first word and last word of each entity, as seqeval does by default.

    An I-tag that continues no entity of its type begins one.
    """
    found, start = set(), 0
    for i, (before, tag, after) in enumerate(zip(["O", *tags], tags, [*tags[1:], "O"])):
        if tag == "O":
            continue
        if tag[0] == "B" or before[1:] != tag[1:]:
            start = i
        if after[0] != "I" or after[1:] != tag[1:]:
            found.add((tag[2:], start, i))
    return found


def entity_scores(guesses: list[list[str]], truths: list[list[str]]) -> dict[str, float]:
    """Return F1, precision and recall of entities (micro averages, by seqeval's default rules), and
    the accuracy of words, as shares of 1."""
    right = guessed = true = 0
    for guess, truth in zip(guesses, truths):
        of_guess, of_truth = entities(guess), entities(truth)
        right += len(of_guess & of_truth)
        guessed, true = guessed + len(of_guess), true + len(of_truth)
    same = [a == b for guess, truth in zip(guesses, truths) for a, b in zip(guess, truth)]
    return {
        "f1": 2 * right / max(guessed + true, 1),
        "precision": right / max(guessed, 1),
        "recall": right / max(true, 1),
        "accuracy": float(np.mean(same)),
    }


_ARTICLES, _PUNCTUATION = re.compile(r"\b(a|an|the)\b"), str.maketrans("", "", string.punctuation)


def _normalised(answer: str) -> list[str]:
    """Return the words of an answer, as SQuAD's script compares them."""
    return _ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split()


def answer_scores(answers: list[str], references: list[list[str]]) -> dict[str, float]:
    """Return exact match and F1 as SQuAD 2's script computes them, as shares of 1.

    An answer counts with the best of its references. A question without references has the answer
    "".
    """
    totals = np.zeros(2)
    for answer, texts in zip(answers, references):
        guess = _normalised(answer)
        truths = [words for words in map(_normalised, texts) if words] or [[]]
        totals += (
            max(float(guess == truth) for truth in truths),
            max(_word_f1(guess, truth) for truth in truths),
        )
    exact, f1 = totals / max(len(answers), 1)
    return {"f1": float(f1), "exact_match": float(exact)}


def _word_f1(guess: list[str], truth: list[str]) -> float:
    if not guess or not truth:
        return float(guess == truth)
    same = sum((collections.Counter(guess) & collections.Counter(truth)).values())
    return 2 * same / (len(guess) + len(truth))
