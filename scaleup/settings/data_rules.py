"""Rules between the settings of `data`, by the task. They need no files."""

from typing import Any

METRICS = {
    "sequence_classification": ("accuracy", "f1", "matthews"),
    "regression": ("spearman",),
    "multi_label_classification": ("f1", "macro_f1"),
    "token_classification": ("f1", "accuracy"),
    "question_answering": ("f1", "exact_match"),
    "seq2seq": ("bleu", "rouge_l", "exact_match", "loss"),
    "causal_lm": ("loss", "bleu", "rouge_l", "exact_match"),
}
GENERATES = ("seq2seq", "causal_lm")
# Task → the columns of the user's own files that it reads, as the settings <role>_column name them.
COLUMNS = {
    "sequence_classification": ("text", "text_pair", "label"),
    "regression": ("text", "text_pair", "label"),
    "multi_label_classification": ("text", "text_pair", "labels"),
    "token_classification": ("tokens", "tags"),
    "question_answering": ("question", "context", "answers"),
    "seq2seq": ("text", "target", "messages"),  # `data_problems` refuses messages
    "causal_lm": ("text", "target", "messages"),
}
ROLES = tuple(dict.fromkeys(role for roles in COLUMNS.values() for role in roles))
TASKS = tuple(COLUMNS)


def idle_data(data: Any) -> dict[str, str]:
    """Return each setting of `data` that nothing reads in this run → the reason."""
    own_files = (
        "train_file validation_file test_file sources subset train_split validation_split "
        "test_split"
    )
    of_generation = "train_on prompt_template max_target_length num_beams packing"
    task, generates = data.task or "sequence_classification", data.task in GENERATES
    idle: dict[str, str] = {}
    if data.name is not None:
        columns = [f"{role}_column" for role in COLUMNS[task]]
        idle |= dict.fromkeys([*own_files.split(), *columns], f"data.name is {data.name}")
    elif data.path is None:
        of_hub = ("subset", "revision", "train_split", "validation_split", "test_split")
        idle |= dict.fromkeys(of_hub, "data.path is not set")
    keys = [f"{role}_column" for role in ROLES if role not in COLUMNS[task]]
    keys += [] if generates else of_generation.split()
    keys += [] if task == "question_answering" else ["window_overlap"]
    idle |= dict.fromkeys(keys, f"data.task is {task}")
    if not data.streaming:
        idle["shuffle_buffer"] = "data.streaming is off"
    if generates and data.messages_column is None:
        idle["train_on"] = "data.messages_column is not set"
    if generates and data.messages_column is not None:
        of_texts = ("text_column", "target_column", "prompt_template")
        idle |= dict.fromkeys(of_texts, "data.messages_column is set")
    by_loss = data.metric == "loss" or (data.metric is None and task == "causal_lm")
    if generates and by_loss:
        idle["num_beams"] = "data.metric is loss: nothing is written"
        if task == "causal_lm":
            idle["max_target_length"] = "data.metric is loss: nothing is written"
    own_validation = data.name is None and data.has_validation
    if data.k == "all" and (data.name is not None or own_validation):
        idle["dev_size"] = "with data.k all, the validation set is the development set"
        drawn = any(part.weight % 1 for part in data.sources or ())
        if not data.streaming and not drawn:
            idle["seed"] = "with data.k all, nothing is sampled"
    if data.name is not None and data.k == "all":
        idle["test_size"] = "with data.k all, the development set is the test set"
    elif data.name is None and data.test_file is None and data.test_split is None:
        idle["test_size"] = "data.test_file is not set"
    if own_validation:
        key = "validation_file" if data.validation_file is not None else "validation_split"
        idle["dev_size"] = f"data.{key} is the development set"
    return idle


def data_problems(data: Any, method: Any) -> list[str]:
    """Return one sentence for each combination of settings of `data` that cannot work."""
    problems = []
    places = [key for key in ("train_file", "path", "sources") if getattr(data, key)]
    if data.name is None and not places:
        problems.append(
            "data: set data.name (a GLUE task), data.train_file (your own data), data.path (a data "
            "set on the hub) or data.sources (several of them)"
        )
    if data.name is None and len(places) > 1:
        problems.append(f"data.{places[1]}: data.{places[0]} is set, too; leave one of them out")
    for split in ("validation", "test"):
        if getattr(data, f"{split}_file") and getattr(data, f"{split}_split"):
            problems.append(
                f"data.{split}_split: data.{split}_file is set, too; leave one of them out"
            )
    default_task = "regression" if data.name == "stsb" else "sequence_classification"
    task = data.resolved_task
    if data.name is not None and task != default_task:
        return [f"data.task: {data.task} does not fit data.name {data.name}; leave it out"]
    if data.metric is not None and data.metric not in METRICS[task]:
        subject, advice = f"data.name {data.name}", "leave it out"
        if data.name is None:
            subject, advice = f"data.task {task}", f"choose from {', '.join(METRICS[task])}"
        problems.append(f"data.metric: {data.metric} does not fit {subject}; {advice}")
    problems += source_problems(data)
    if data.messages_column is not None and task == "seq2seq":
        problems.append(
            "data.messages_column: chats are for data.task causal_lm; seq2seq takes text_column "
            "and target_column"
        )
    if task == "question_answering":
        problems += overlap_problems(data)
    if data.packing and task == "seq2seq":
        problems.append("data.packing: texts are packed with data.task causal_lm only")
    if data.packing and data.pad_to_max_length:
        problems.append("data.pad_to_max_length: packed rows need no padding; leave it out")
    learned = method is not None and method.name == "unipelt" and method.resolved_gates == "learned"
    if learned and method.gate_pooling == "paper" and task in GENERATES:
        problems.append(
            "method.gate_pooling: with paper, the gates of a decoder see later tokens; use auto "
            f"for data.task {task}"
        )
    return problems


def source_problems(data: Any) -> list[str]:
    """Return which settings of single sources nothing would read."""
    task, problems = data.resolved_task, []
    chats = data.messages_column is not None
    unread = ("text", "target") if chats else ("messages",)
    used = [role for role in COLUMNS[task] if task not in GENERATES or role not in unread]
    for number, part in enumerate(data.sources or ()):
        reasons: dict[str, str] = {}
        for key in ("subset", "revision", "split"):
            if part.file is not None and getattr(part, key) != type(part).model_fields[key].default:
                reasons[key] = "the source is a file"
        for role in ROLES:
            key = f"{role}_column"
            if getattr(part, key) is None:
                continue
            if role not in COLUMNS[task]:
                reasons[key] = f"data.task is {task}"
            elif role not in used:
                state = "set" if chats else "not set"
                reasons[key] = f"data.messages_column is {state}"
            elif getattr(data, key) is None:
                reasons[key] = f"data.{key} is not set; set it, too"
        problems += [
            f"data.sources[{number}].{key}: has no effect here ({reason})"
            for key, reason in reasons.items()
        ]
    return problems


def overlap_problems(data: Any) -> list[str]:
    """Return why windows of data.max_length cannot overlap by data.window_overlap."""
    if 2 * data.resolved_overlap < data.max_length:
        return []
    return [
        f"data.window_overlap: {data.window_overlap} tokens; windows of {data.max_length} tokens "
        "(data.max_length) may share less than half of them"
    ]


def streaming_problems(data: Any, train: Any) -> list[str]:
    """Return why training data cannot be streamed in this run."""
    if data.task not in GENERATES:
        return [
            "data.streaming: reads texts for data.task seq2seq and causal_lm only; leave it out"
        ]
    problems = []
    if not data.has_validation:
        problems.append(
            "data.streaming: nothing can be cut from a stream for development; give "
            "data.validation_file or data.validation_split"
        )
    if data.k != "all":
        problems.append(f"data.k: {data.k} rows cannot be drawn from a stream; use all")
    if train is not None and train.max_steps < 1:
        problems.append("data.streaming: a stream has no end; set train.max_steps")
    if train is not None and train.eval_strategy != "steps":
        problems.append(
            "data.streaming: a stream has no epochs; set train.eval_strategy=steps and "
            "train.eval_steps"
        )
    if train is not None and train.dataloader_num_workers:
        problems.append(
            "train.dataloader_num_workers: the run itself reads a stream; use 0 with data.streaming"
        )
    return problems


def smoothing_problems(data: Any) -> list[str]:
    """Return why train.label_smoothing_factor cannot be used with a task."""
    reasons = {
        "regression": "there are no classes to smooth in a regression; leave it out",
        "multi_label_classification": "Trainer smooths one class per text; leave it out with "
        "data.task multi_label_classification",
        "question_answering": "Trainer takes the answers away before the model can read them; "
        "leave it out with data.task question_answering",
        "seq2seq": "Trainer takes the targets away before the decoder can read them; leave it out "
        "with data.task seq2seq",
    }
    reason = reasons.get(data.resolved_task)
    return [] if reason is None else [f"train.label_smoothing_factor: {reason}"]


def head_bias_problems(model: Any, data: Any) -> list[str]:
    """Return why a head cannot start from the shares of its classes."""
    if model.head_bias == "default" or data.resolved_task in (
        "sequence_classification",
        "regression",
        *GENERATES,  # `without_effect` reports these
    ):
        return []
    problem = "is for sequence_classification and regression"
    return [f"model.head_bias: {model.head_bias} {problem}; leave it out"]
