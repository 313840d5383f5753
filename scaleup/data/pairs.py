"""Keep the two texts of a pair apart."""

from tokenizers import processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from scaleup.errors import ConfigError

PROBE = ("A", "B")  # any two texts that have tokens


def separate_pairs(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that separates the two texts of a pair.

    Tokenizers of encoders put special tokens between the texts and are returned as they are. Most
    tokenizers of decoders put nothing there: "a dog" and "Russia says" become "a dogRussia says".
    For these the result is a copy that puts the tokenizer's separator token there, or a newline if
    it has none. Truncation never removes the separator, and the copy keeps it when it is saved.

    Raises:
        ConfigError: the tokenizer joins the texts without a separator, and cannot be changed.
    """
    text, other = (_tokens(tokenizer, text) for text in PROBE)
    around_pair = _around(tokenizer(*PROBE)["input_ids"], text + other)
    if around_pair is None:
        return tokenizer
    around_text = _around(tokenizer(PROBE[0])["input_ids"], text) or ([], [])
    has_separator = tokenizer.sep_token_id is not None
    separator = [tokenizer.sep_token_id] if has_separator else _tokens(tokenizer, "\n")
    if not separator or not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"data.text_pair_column: the tokenizer of {tokenizer.name_or_path} joins the texts of "
            "a pair without a separator; join them in the data, and leave the setting out"
        )
    # Classes like GPTNeoXTokenizer write their own template when they are loaded. This one does
    # not.
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        name_or_path=tokenizer.name_or_path,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )
    names = ("begin", "end", "pair_begin", "separator", "pair_end")
    pieces = dict(zip(names, (*around_text, around_pair[0], separator, around_pair[1])))
    pieces = {name: ids for name, ids in pieces.items() if ids}

    def template(*parts: str) -> list[str]:
        return [part for part in parts if part in pieces or part.startswith("$")]

    copy.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template("begin", "$A:0", "end"),
        pair=template("pair_begin", "$A:0", "separator", "$B:1", "pair_end"),
        special_tokens=[
            {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}
            for name, ids in pieces.items()
        ],
    )
    return copy


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _around(ids: list[int], inner: list[int]) -> tuple[list[int], list[int]] | None:
    """Return the tokens before and after `inner`, None if `ids` does not contain it in one run."""
    for start in range(len(ids) - len(inner) + 1):
        end = start + len(inner)
        if ids[start:end] == inner:
            return ids[:start], ids[end:]
    return None
