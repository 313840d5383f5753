"""The two texts of a pair are kept apart."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    CTRLTokenizer,
    MPNetTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    T5Tokenizer,
)

from scaleup.data import classification as data
from scaleup.data.pairs import separate_pairs
from scaleup.errors import ConfigError
from tests.utils.decoders import CLASSES, END, byte_level, make_tokenizer
from tests.utils.examples import settings, write_jsonl

WORDS = ["good", "bad", "film", "the"]


def word_level(*special: str, **tokens: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=special[0], **tokens)


def encode(tokenizer, text: str, other: str, **fields) -> list[int]:
    """Return the tokens of a pair as a run makes them."""
    write_jsonl("pairs.jsonl", [{"text": text, "other": other, "label": i} for i in (0, 1)])
    file = {"train_file": "pairs.jsonl", "validation_file": "pairs.jsonl"}
    chosen = settings(**file, text_pair_column="other", **fields)
    return data.tokenize(data.load(chosen), tokenizer, chosen).train[0]["input_ids"]


def reloaded(tokenizer, folder) -> PreTrainedTokenizerFast:
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", CLASSES)
def test_the_texts_of_a_pair_are_separated_by_a_newline(in_tmp, family):
    tokenizer = make_tokenizer(family, pad_token=END)
    glued = "thin Russia" if family == "llama" else "thinRussia"
    assert tokenizer.decode(tokenizer("it is thin", "Russia says")["input_ids"]).count(glued) == 1
    ids = encode(tokenizer, "it is thin", "Russia says")
    newline = " \n " if family == "llama" else "\n"  # Llama's begins every text with a space
    assert tokenizer.decode(ids) == f"it is thin{newline}Russia says"


@pytest.mark.parametrize("family", CLASSES)
def test_the_separator_is_the_tokenizers_own_if_it_has_one(in_tmp, family):
    tokenizer = make_tokenizer(family, pad_token=END, sep_token=END)
    ids = encode(tokenizer, "it is thin", "Russia says")
    assert ids.count(tokenizer.sep_token_id) == 1
    plain = [tokenizer(text)["input_ids"] for text in ("it is thin", "Russia says")]
    assert ids == [*plain[0], tokenizer.sep_token_id, *plain[1]]


@pytest.mark.parametrize("family", CLASSES)
def test_a_saved_tokenizer_joins_pairs_as_in_training(in_tmp, tmp_path, family):
    tokenizer = make_tokenizer(family, pad_token=END)
    again = reloaded(separate_pairs(tokenizer), tmp_path / "saved")
    assert separate_pairs(again) is again
    ids = encode(tokenizer, "it is thin", "Russia says")
    assert again("it is thin", "Russia says")["input_ids"] == ids
    assert again("it is thin")["input_ids"] == tokenizer("it is thin")["input_ids"]
    for name in ("special_tokens_map", "padding_side", "model_input_names"):
        assert getattr(again, name) == getattr(tokenizer, name)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_separator_survives_truncation_and_the_longer_text_is_cut(in_tmp, family, side):
    tokenizer = make_tokenizer(family, pad_token=END, truncation_side=side)
    long, short = "the actor is bad and " * 9, "it is thin"
    parts = [tokenizer(text)["input_ids"] for text in (long, short)]
    separator = tokenizer("\n")["input_ids"]
    room = 24 - len(separator) - len(parts[1])
    cut = parts[0][-room:] if side == "left" else parts[0][:room]
    assert encode(tokenizer, long, short, max_length=24) == [*cut, *separator, *parts[1]]
    assert encode(tokenizer, short, long, max_length=24) == [*parts[1], *separator, *cut]
    halves = encode(tokenizer, long, long, max_length=23 + len(separator))
    cuts = {n: parts[0][-n:] if side == "left" else parts[0][:n] for n in (11, 12)}
    assert halves in [[*cuts[n], *separator, *cuts[23 - n]] for n in cuts]


def test_special_tokens_around_a_pair_stay_where_they_are():
    tokenizer = word_level("<unk>", "<s>", "</s>", "<sep>", sep_token="<sep>", bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer.decode(tokenizer("good", "film")["input_ids"]) == "<s> good film </s>"
    separating = separate_pairs(tokenizer)
    assert separating.decode(separating("good", "film")["input_ids"]) == "<s> good <sep> film </s>"
    assert separating.decode(separating("good")["input_ids"]) == "<s> good"
    assert separating.decode(separating([""], [""])["input_ids"][0]) == "<s> <sep> </s>"


def roberta(cls=RobertaTokenizer):
    vocabulary, merges = byte_level()
    for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>"):
        vocabulary[token] = len(vocabulary)
    return cls(vocab=vocabulary, merges=merges)


def encoders() -> dict[str, PreTrainedTokenizerFast]:
    """Return tokenizers that put something between the texts of a pair."""
    begins = word_level("<unk>", "<s>", bos_token="<s>")
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    bert = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    mpnet = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>", *WORDS]
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>", *"▁ABgodbadilmthe")]
    return {
        "bert": BertTokenizer(vocab={word: i for i, word in enumerate(bert)}),
        "roberta and bart": roberta(),
        "mpnet": MPNetTokenizer(vocab={word: i for i, word in enumerate(mpnet)}),
        "t5": T5Tokenizer(vocab=list(dict(pieces).items())),
        "llama with a beginning for each text": begins,
    }


@pytest.mark.parametrize("kind", encoders())
def test_tokenizers_that_separate_pairs_are_left_as_they_are(in_tmp, kind):
    tokenizer = encoders()[kind]
    assert separate_pairs(tokenizer) is tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    assert encode(tokenizer, "good film", "bad") == tokenizer("good film", "bad")["input_ids"]


def test_a_tokenizer_without_anything_to_separate_pairs_is_refused(in_tmp):
    tokenizer = word_level("<unk>", "<pad>", pad_token="<pad>")  # it drops newlines
    with pytest.raises(ConfigError, match="data.text_pair_column: .* without a separator"):
        encode(tokenizer, "good film", "bad")
    write_jsonl("one.jsonl", [{"text": "good film", "label": i} for i in (0, 1)])
    chosen = settings(train_file="one.jsonl", validation_file="one.jsonl")
    assert data.tokenize(data.load(chosen), tokenizer, chosen).train[0]["input_ids"] == [2, 4]


def test_a_tokenizer_in_python_that_joins_pairs_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"<unk>": 0, "A": 1, "B": 2, "\\n": 3}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    with pytest.raises(ConfigError, match="data.text_pair_column: .* without a separator"):
        separate_pairs(tokenizer)
