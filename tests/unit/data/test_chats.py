"""Chats: which tokens the loss counts, by the template's marks or by its text."""

import pytest
from transformers import BertTokenizerFast

from scaleup.data.chats import encode_chats
from scaleup.errors import ConfigError
from scaleup.settings.data import DataSettings

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>", "<s>", *"abcdefgh", ":", "#"]
WORDS += ["user", "assistant", "system"]
PLAIN = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }} </s>{% endgeneration %}{% else %}{{ m.content }} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
# Like Qwen 3: only the last answer has the place of its thoughts.
THINKING = (
    "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' and loop.last %}# # {% endif"
    " %}{{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture
def tokenizer():
    return made(BertTokenizerFast, PLAIN)


def made(cls, template):
    tokenizer = cls(
        vocab={word: i for i, word in enumerate(WORDS)}, eos_token="</s>", bos_token="<s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def settings(**values) -> DataSettings:
    return DataSettings(task="causal_lm", messages_column="m", train_file="x", **values)


def chat(*contents: str, system: bool = False) -> list[dict]:
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": text} for role, text in zip(roles, contents)]
    return [{"role": "system", "content": "h"}] * system + turns


def counted(tokenizer, turns, **values) -> str:
    (encoded,) = encode_chats([turns], tokenizer, settings(**values))
    pairs = zip(tokenizer.convert_ids_to_tokens(encoded.ids), encoded.counted)
    return " ".join(token for token, counts in pairs if counts)


@pytest.mark.parametrize("system", [False, True])
def test_all_answers_count_or_the_last_one(tokenizer, system):
    turns = chat("a", "b c", "d", "e", system=system)
    assert counted(tokenizer, turns) == "b c </s> e </s>"
    assert counted(tokenizer, turns, train_on="last") == "e </s>"


def test_a_chat_with_one_answer_is_the_same_either_way(tokenizer):
    turns = [chat("a b", "c d"), chat("e", "f", system=True)]
    assert encode_chats(turns, tokenizer, settings()) == encode_chats(
        turns, tokenizer, settings(train_on="last")
    )


def test_marks_of_the_template_decide(tokenizer):
    tokenizer.chat_template = MARKED
    turns = chat("a", "b c", "d", "e")
    assert counted(tokenizer, turns) == "b c </s> e </s>"
    tokenizer.chat_template = MARKED.replace(" </s>{% endgeneration %}", "{% endgeneration %} </s>")
    assert counted(tokenizer, turns) == "b c e", "without the end of the turn"
    assert counted(tokenizer, turns, train_on="last") == "e </s>", "what follows the prompt"


def test_marks_and_text_give_the_same_chat(tokenizer):
    turns = [chat("a", "b", "c", "d"), chat("e", "f g")]
    plain = encode_chats(turns, tokenizer, settings())
    tokenizer.chat_template = MARKED
    assert encode_chats(turns, tokenizer, settings()) == plain


def test_a_template_that_writes_the_last_answer_differently_is_understood(tokenizer):
    tokenizer.chat_template = THINKING
    assert counted(tokenizer, chat("a", "b", "c", "d")) == "b </s> # # d </s>"


@pytest.mark.parametrize(
    "template",
    [
        PLAIN.replace("{{ m.content }}", "{{ '#' if EARLIER else m.content }}"),
        PLAIN.replace("</s> {% endfor %}", "{{ '# ' if EARLIER else '</s> ' }}{% endfor %}"),
    ],
)
def test_an_earlier_answer_that_is_written_differently_is_refused(tokenizer, template):
    earlier = "(m.role == 'assistant' and not loop.last)"
    tokenizer.chat_template = template.replace("EARLIER", earlier)
    turns = chat("a", "b", "c", "d")
    with pytest.raises(ConfigError, match="an earlier answer is not written like.*train_on=last"):
        counted(tokenizer, turns)
    assert counted(tokenizer, turns, train_on="last") == "d </s>"


def test_marks_that_mark_nothing_are_refused(tokenizer):
    tokenizer.chat_template = PLAIN + "{% generation %}{% endgeneration %}"
    with pytest.raises(ConfigError, match="marks nothing.*data.train_on=last"):
        counted(tokenizer, chat("a", "b"))


def test_a_chat_that_does_not_begin_with_its_prompt_is_refused(tokenizer):
    tokenizer.chat_template = PLAIN.replace("assistant : {% endif %}", "user : {% endif %}")
    with pytest.raises(ConfigError, match="a chat does not begin with its prompt"):
        counted(tokenizer, chat("a", "b"))


def test_the_prompt_has_the_tokens_that_it_has_alone(tokenizer):
    turns = [chat("a b", "c", "d e", "f g"), chat("</s> a", "b"), chat("", "a")]
    for each, encoded in zip(turns, encode_chats(turns, tokenizer, settings())):
        text = tokenizer.apply_chat_template(each[:-1], tokenize=False, add_generation_prompt=True)
        assert encoded.prompt == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encoded.ids[: encoded.answer] == encoded.prompt


def test_an_assistant_may_speak_first_and_twice(tokenizer):
    turns = [{"role": "assistant", "content": text} for text in "ab"]
    turns += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    assert counted(tokenizer, turns) == "a </s> b </s> d </s>"
