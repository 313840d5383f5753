"""The section `data` of a config: where examples come from and how they become batches."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from scaleup.io import expand_home
from scaleup.settings.data_rules import TASKS
from scaleup.settings.derived import MOST, Section

GLUE_TASKS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")

Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes
Count = Annotated[int, Field(ge=1, le=MOST)]
Path = Annotated[str, pydantic.BeforeValidator(expand_home)]


def _one_placeholder(template: str) -> str:
    if template.count("{text}") != 1:
        raise ValueError("should contain {text} once")
    return template


class DataSource(Section):
    """One of several sources of training data."""

    file: Path | None = None
    """A file, or instead of it:"""
    path: str | None = None
    """Id of a data set on the hub."""
    subset: str | None = None
    """Name of a configuration of the data set on the hub."""
    split: str = "train"
    """Split of the data set on the hub."""
    revision: str | None = None
    """Branch, tag or commit of the data set on the hub."""
    weight: float = Field(1.0, gt=0, le=1000)
    """How often its rows are seen in an epoch; 0.5: half of them, drawn by data.seed."""
    text_column: str | None = None
    """Column of this source, where it has another name than in the others."""
    text_pair_column: str | None = None
    """The same for the second text of a pair."""
    label_column: str | None = None
    """The same for the label."""
    target_column: str | None = None
    """The same for the target."""
    messages_column: str | None = None
    """The same for chats."""
    labels_column: str | None = None
    """The same for lists of labels."""
    tokens_column: str | None = None
    """The same for lists of words."""
    tags_column: str | None = None
    """The same for the tags of the words."""
    question_column: str | None = None
    """The same for the question."""
    context_column: str | None = None
    """The same for the text that holds the answer."""
    answers_column: str | None = None
    """The same for the answers."""

    @pydantic.model_validator(mode="after")
    def _check_place(self) -> "DataSource":
        if (self.file is None) == (self.path is None):
            raise ValueError("should have file or path, and not both")
        return self


class DataSettings(Section):
    """Where examples come from and how they become batches."""

    name: Literal[GLUE_TASKS] | None = None  # type: ignore[valid-type]
    """Name of a GLUE task; leave it out for your own files."""
    task: Literal[TASKS] | None = None  # type: ignore[valid-type]
    """Kind of task. multi_label_classification: any number of labels for a text.
    token_classification: a tag for each word. question_answering: the part of a text that answers
    a question. seq2seq: write a target for a text (encoder-decoder models). causal_lm: complete a
    prompt or a chat (decoders). Default: that of the GLUE task, else sequence_classification."""
    path: Path | None = None
    """Id of a data set on the hub. For a GLUE task also a local folder with
    <task>/{train,validation}.parquet or with these files themselves; default: nyu-mll/glue."""
    subset: str | None = None
    """Name of a configuration of data.path on the hub."""
    revision: str | None = None
    """Branch, tag or commit of data.path on the hub."""
    train_split: str = Field("train", min_length=1)
    """Split of data.path to train on, such as train or train[:10%]."""
    validation_split: str | None = None
    """Split of data.path for development."""
    test_split: str | None = None
    """Split of data.path for the test, scored once at the end."""
    sources: list[DataSource] | None = None
    """Several sources of training data instead of data.path or data.train_file, each with file or
    path, and if needed weight, split, subset, revision and columns."""
    train_file: Path | None = None
    """Your own training data: .csv, .tsv, .jsonl, .json (lines) or .parquet."""
    validation_file: Path | None = None
    """Your own development data, with the same columns."""
    test_file: Path | None = None
    """Your own test data, with the same columns; scored once, at the end."""
    text_column: str = Field("text", min_length=1)
    """Column of your own files with the text."""
    text_pair_column: str | None = None
    """Column of your own files with the second text of a pair."""
    label_column: str = Field("label", min_length=1)
    """Column of your own files with class name or number."""
    labels_column: str = Field("labels", min_length=1)
    """multi_label_classification: column with the list of the labels of a text, which may be
    empty."""
    tokens_column: str = Field("tokens", min_length=1)
    """token_classification: column with the list of the words of a text."""
    tags_column: str = Field("tags", min_length=1)
    """token_classification: column with the list of their tags in the IOB2 scheme: O, B-<type> for
    the first word of an entity, I-<type> for its others."""
    question_column: str = Field("question", min_length=1)
    """question_answering: column with the question."""
    context_column: str = Field("context", min_length=1)
    """question_answering: column with the text that holds the answer."""
    answers_column: str = Field("answers", min_length=1)
    """question_answering: column with the answers as in SQuAD: {text: [...], answer_start: [...]};
    empty lists for a question without an answer."""
    target_column: str = Field("target", min_length=1)
    """Column with the text to write, for seq2seq and causal_lm."""
    prompt_template: Annotated[str, pydantic.AfterValidator(_one_placeholder)] = "{text}"
    """The input of seq2seq or the prompt of causal_lm, with {text} in place of the text. A
    completion follows its prompt directly, unless the template ends in a line break, for example.
    Chats use the tokenizer's chat template instead."""
    messages_column: str | None = None
    """causal_lm: column with chats, which are lists of {role, content} that end with the
    assistant, instead of text and target."""
    train_on: Literal["all", "last"] = "all"
    """Assistant turns of a chat that the loss counts: all of them, as the chat template marks them
    if it does, or the last one."""
    streaming: bool = False
    """Read and tokenize the training data while training, without a copy on the disk (seq2seq and
    causal_lm). It needs train.max_steps and data for development."""
    shuffle_buffer: Count = 10_000
    """streaming: number of rows in memory, of which one at random is the next."""
    k: Count | Literal["all"] = "all"
    """Number of training examples: the first K of the shuffled training set (low-resource
    protocol), or all."""
    dev_size: Count = 1000
    """Number of development examples that are cut from the training set, after the first K. Has no
    effect with a validation set of your own, or with k all in a GLUE task."""
    test_size: Count | None = None
    """Largest number of test examples (seq2seq and causal_lm: of distinct sources). A larger test
    set is sampled, always to the same examples. Default: all."""
    seed: Seed = 0
    """Seed of the shuffle that picks the K training and the development examples, and of the order
    of a stream."""
    metric: (
        Literal[
            "accuracy",
            "f1",
            "macro_f1",
            "matthews",
            "spearman",
            "bleu",
            "rouge_l",
            "exact_match",
            "loss",
        ]
        | None
    ) = None
    """Metric that picks the best checkpoint. Default: that of the GLUE task; accuracy or
    spearman for your own files; f1 for multi_label_classification (micro-F1),
    token_classification (of entities) and question_answering (of the words of an answer); bleu
    for seq2seq; loss for causal_lm, where evaluation writes texts only if another metric asks for
    it."""
    max_length: Count = 128
    """Longest input in tokens; longer ones are cut. causal_lm: prompt and completion together.
    question_answering: length of a window."""
    window_overlap: int | None = Field(None, ge=0, le=MOST)
    """question_answering: number of tokens that neighbouring windows of a long context share, less
    than half of max_length. Default: a third of max_length."""
    max_target_length: Count = 128
    """Longest target of seq2seq, and largest number of tokens that evaluation writes."""
    num_beams: int = Field(1, ge=1, le=1000)
    """Number of beams with which evaluation writes texts; 1: greedy."""
    packing: bool = False
    """causal_lm: join texts in rows of max_length tokens; they do not see each other."""
    pad_to_max_length: bool = False
    """Pad every batch to max_length (paper) instead of to its longest example."""
    cache_dir: Path | None = None
    """Folder of prepared data, which runs share. Default: scaleup/ in the cache of Hugging Face
    datasets."""
    workers: Count | None = None
    """Number of processes that tokenize. Default: one per CPU core."""

    @property
    def has_validation(self) -> bool:
        """Return whether a development set is named."""
        return self.validation_file is not None or self.validation_split is not None

    @property
    def resolved_overlap(self) -> int:
        """`window_overlap`, or its default."""
        return self.max_length // 3 if self.window_overlap is None else self.window_overlap

    @property
    def resolved_task(self) -> str:
        """`task`, or its default."""
        return self.task or ("regression" if self.name == "stsb" else "sequence_classification")
