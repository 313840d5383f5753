"""Turn chats into tokens, and tell the tokens that the loss counts.

The tokens are those of the tokenizer's chat template. With data.train_on=last, the loss counts the
last answer: what follows the prompt that ends with the template's generation prompt. With `all` it
counts every assistant turn. If the template marks what the assistant writes ({% generation %}), its
marks decide. Otherwise an earlier answer begins where its prompt ends, and ends with the text that
closes the last answer. A chat where this cannot be told is refused.
"""

import bisect
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from scaleup.errors import ConfigError, one_line
from scaleup.settings.data import DataSettings

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
KEY = "data.messages_column"
Turns = list[dict[str, Any]]


@dataclasses.dataclass
class Chat:
    """The tokens of one chat."""

    ids: list[int]
    counted: list[bool]  # per token: whether the loss counts it
    answer: int  # where the last answer begins in `ids`
    prompt: list[int]  # tokens of everything before the last answer, as `generate` gets them


def encode_chats(
    turns: list[Turns], tokenizer: PreTrainedTokenizerBase, data: DataSettings
) -> list[Chat]:
    """Encode chats that end with the assistant.

    Raises:
        ConfigError: the chat template refuses a chat, or an answer cannot be told from its prompt.
    """
    prompts = _rendered(tokenizer, [chat[:-1] for chat in turns], add_generation_prompt=True)
    if data.train_on == "all" and MARKS.search(str(tokenizer.chat_template)):
        return _marked(turns, prompts, tokenizer)
    texts = _rendered(tokenizer, turns)
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    offsets = encoded.get("offset_mapping") or [None] * len(texts)
    tail_ids = functools.cache(lambda text: tuple(_plain(tokenizer, text)))
    splitting = {i for i, token in tokenizer.added_tokens_decoder.items() if not token.normalized}
    chats = []
    for i, (chat, ids, where) in enumerate(zip(turns, encoded["input_ids"], offsets)):
        prompt = None
        if where and texts[i].startswith(prompts[i]):
            prompt = _shared_prompt(prompts[i], ids, where, splitting, tail_ids)
        prompt = prompt or _plain(tokenizer, prompts[i])
        if ids[: len(prompt)] != prompt:
            raise _unclear("a chat does not begin with its prompt")
        counted = [False] * len(prompt) + [True] * (len(ids) - len(prompt))
        if data.train_on == "all" and (earlier := _answers(chat)):
            if where is None:
                raise ConfigError(
                    f"data.train_on: the tokenizer of {tokenizer.name_or_path} is written in "
                    "Python and does not tell where its tokens are in the text; use "
                    "data.train_on=last"
                )
            closing = _closing(texts[i][len(prompts[i]) :], chat[-1]["content"])
            spans = [_span(tokenizer, texts[i], chat, turn, closing) for turn in earlier]
            _count(counted, where, spans)
        chats.append(Chat(ids, counted, len(prompt), prompt))
    return chats


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _shared_prompt(
    prompt: str,
    ids: list[int],
    offsets: list[tuple[int, int]],
    splitting: set[int],
    tail_ids: Callable[[str], tuple[int, ...]],
) -> list[int] | None:
    """Return the tokens of a prompt, without tokenizing all of it again, or None.

    A tokenizer splits a text at special tokens first. What stands before the last one of the prompt
    has the same tokens in the prompt and in the chat, so only the rest is tokenized. That is often
    the same text, like "<|im_start|>assistant".

    Args:
        ids: tokens of the chat, which begins with the prompt.
        offsets: begin and end of each token in the chat, characters.
        splitting: the tokens at which the tokenizer splits a text.
        tail_ids: returns the tokens of a text.
    """
    last = bisect.bisect_left(offsets, len(prompt), key=lambda offset: offset[0]) - 1
    while last >= 0 and (ids[last] not in splitting or offsets[last][1] > len(prompt)):
        last -= 1
    if last < 0:
        return None
    tail = tail_ids(prompt[offsets[last][0] :])
    whole = [*ids[:last], *tail]
    return whole if ids[: len(whole)] == whole else None


def _rendered(tokenizer: PreTrainedTokenizerBase, chats: list[Turns], **options: Any) -> Any:
    """Return chats as the template writes them, or what else `options` ask for."""
    try:
        return tokenizer.apply_chat_template(chats, **({"tokenize": False} | options))
    except (ValueError, TemplateError) as error:
        problem = f"the tokenizer's chat template refuses a chat: {one_line(error, 200)}"
        raise ConfigError(f"{KEY}: {problem}") from None


def _unclear(problem: str, advice: str = "") -> ConfigError:
    return ConfigError(
        f"{KEY}: with this tokenizer's chat template {problem}, so the answer cannot be told from "
        f"it{advice}"
    )


def _marked(
    turns: list[Turns], prompts: list[str], tokenizer: PreTrainedTokenizerBase
) -> list[Chat]:
    """Encode chats whose template marks what the assistant writes."""
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = _rendered(tokenizer, turns, **options)
    chats = []
    for ids, mask, prompt in zip(encoded["input_ids"], encoded["assistant_masks"], prompt_ids):
        counted = [bool(mark) for mark in mask]
        if not any(counted):
            raise ConfigError(
                "data.train_on: the chat template marks nothing in a chat as written by the "
                "assistant; use data.train_on=last"
            )
        end = len(counted) - counted[::-1].index(True)
        answer = end
        while answer and counted[answer - 1]:
            answer -= 1
        chats.append(Chat(ids, counted, answer, prompt))
    return chats


def _answers(chat: Turns) -> list[int]:
    """Return the positions of the assistant's turns before the last turn."""
    return [i for i, turn in enumerate(chat[:-1]) if turn["role"] == "assistant"]


def _closing(last: str, content: str) -> str:
    """Return the text that the template puts after the last answer."""
    content = content.strip()
    start = last.rfind(content) if content else -1
    if start < 0:
        problem = "the last answer is not in the chat as it was written"
        raise _unclear(problem, "; use data.train_on=last")
    return last[start + len(content) :]


def _span(
    tokenizer: PreTrainedTokenizerBase, text: str, chat: Turns, turn: int, closing: str
) -> tuple[int, int]:
    """Return where an earlier answer begins and ends in a chat, in characters."""
    content = chat[turn]["content"].strip()
    if turn:
        (prompt,) = _rendered(tokenizer, [chat[:turn]], add_generation_prompt=True)
        begin = len(prompt) if text.startswith(prompt) else -1
    else:  # no template writes an empty chat
        longer, shorter = (
            _rendered(tokenizer, [chat[:1]], add_generation_prompt=asked)[0]
            for asked in (True, False)
        )
        header = longer[len(shorter) :]
        begin = text.find(header) + len(header) if header in text else -1
    answer = text[begin:]
    end = len(content) + (len(answer) - len(answer.lstrip()) if content else 0)
    if begin < 0 or answer[:end].strip() != content or not answer.startswith(closing, end):
        problem = "an earlier answer is not written like the last one"
        raise _unclear(problem, "; use data.train_on=last")
    return begin, begin + end + len(closing)


def _count(
    counted: list[bool], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]
) -> None:
    """Mark the tokens inside the spans, which are in order."""
    token = 0
    for begin, end in spans:
        while token < len(offsets) and offsets[token][0] < begin:
            if offsets[token][1] > begin:
                raise _unclear(
                    "a token belongs to a prompt and its answer", "; use data.train_on=last"
                )
            token += 1
        while token < len(offsets) and offsets[token][0] < end:
            counted[token] = True
            token += 1
