"""The heads of the library `adapters`, and the transformers classes that have the same ones.

A checkpoint comes from a transformers class (BertForSequenceClassification) or from an AdapterModel
(BertAdapterModel), whose heads are lists of layers. With the default settings, these are the heads
of transformers classes under other names.
"""

import dataclasses
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from scaleup.backbone.weights import Weights, checkpoint_folder
from scaleup.errors import ConfigError
from scaleup.export.adapterhub.checkpoint import Checkpoint, Head, Tensors


@dataclasses.dataclass(frozen=True)
class Task:
    """What a head does.

    Attributes:
        auto: name of transformers' class that loads such models.
        peft: PEFT's name of the task.
    """

    auto: str
    peft: str


GENERATION = "ConditionalGeneration"
# The end of a class's name, as in BertForSequenceClassification → the task.
TASKS = {
    "SequenceClassification": Task("AutoModelForSequenceClassification", "SEQ_CLS"),
    "TokenClassification": Task("AutoModelForTokenClassification", "TOKEN_CLS"),
    "QuestionAnswering": Task("AutoModelForQuestionAnswering", "QUESTION_ANS"),
    GENERATION: Task("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "": Task("AutoModel", "FEATURE_EXTRACTION"),
}
FLEXIBLE = {  # head_type of an AdapterModel → the end of a class's name
    "classification": "SequenceClassification",
    "multilabel_classification": "SequenceClassification",
    "tagging": "TokenClassification",
    "question_answering": "QuestionAnswering",
    "seq2seq_lm": GENERATION,
}
# Heads with two linear layers and Tanh between them: model type and end of the class's name → the
# modules of the layers in transformers. BERT's pooler is the first layer of such a head.
TWO_LAYERS = {
    ("bert", "SequenceClassification"): ("bert.pooler.dense", "classifier"),
    ("roberta", "SequenceClassification"): ("classifier.dense", "classifier.out_proj"),
    ("xlm-roberta", "SequenceClassification"): ("classifier.dense", "classifier.out_proj"),
    ("bart", "SequenceClassification"): (
        "classification_head.dense",
        "classification_head.out_proj",
    ),
    ("t5", "SequenceClassification"): ("classification_head.dense", "classification_head.out_proj"),
}
ONE_LAYER = {"TokenClassification": ("classifier",), "QuestionAnswering": ("qa_outputs",)}
POOLED = {("bert", "SequenceClassification"): ("classifier",)}  # use_pooler=True


def ending(checkpoint: Checkpoint) -> str:
    """Return the end of the name of the transformers class that has the head of a checkpoint.

    Raises:
        ConfigError: if there is none.
    """
    head = checkpoint.head
    if head is not None and head.config is not None:
        kind = str(head.config.get("head_type"))
        if kind not in FLEXIBLE:
            raise ConfigError(f"DIR: no transformers class has the same head ({kind})")
        return FLEXIBLE[kind]
    name = checkpoint.model_class.partition("For")[2]
    if name not in TASKS:
        raise ConfigError(
            f"DIR: models of the class {checkpoint.model_class} are not supported; save the "
            "adapter from a model for sequence or token classification, question answering or "
            "conditional generation"
        )
    return name


def task_of(name: str) -> tuple[Task, Any]:
    """Return the task of an end of a class's name, and the class that loads its models."""
    task = TASKS[name]
    return task, getattr(transformers, task.auto)


def saved_modules(checkpoint: Checkpoint) -> list[str]:
    """Return the modules of the backbone that a head replaces: BERT's pooler."""
    head = checkpoint.head
    if head is None or head.config is None or ending(checkpoint) == GENERATION:
        return []
    modules = _places(checkpoint, head)
    return [name.removesuffix(".dense") for name in modules if ".pooler." in name]


def tensors_of(checkpoint: Checkpoint, model: PreTrainedModel, backbone: str) -> Tensors:
    """Return the tensors of a checkpoint's head by their names in a model.

    Args:
        checkpoint: the checkpoint.
        model: an empty model of the class that has the head.
        backbone: folder or hub id of the backbone. Output embeddings are not trained; they must be
            those of the backbone.

    Raises:
        ConfigError: if the model cannot have the same head.
    """
    head = checkpoint.head
    if head is None:
        return {}
    outer = (f"{model.base_model_prefix}.", "prefix_tuning.", "encoder.", "decoder.", "shared.")
    tensors = {name: t for name, t in head.tensors.items() if not name.startswith(outer)}
    if model.get_output_embeddings() is not None:
        _check_output(checkpoint, tensors, model, backbone)
        return {}
    if head.config is None:
        return tensors
    layers, places = _layers(head), _places(checkpoint, head)
    renamed = {f"{name}.": f"{place}." for name, place in zip(layers, places, strict=True)}
    result = {}
    for name, tensor in tensors.items():
        layer = next(layer for layer in renamed if name.startswith(layer))
        result[renamed[layer] + name.removeprefix(layer)] = tensor
    return result


def _layers(head: Head) -> list[str]:
    """Return the paths of the linear layers of an AdapterModel's head, in their order."""
    names = {name.rpartition(".")[0] for name in head.tensors if name.startswith("heads.")}
    return sorted(names, key=lambda name: int(name.rpartition(".")[2]))


def _places(checkpoint: Checkpoint, head: Head) -> tuple[str, ...]:
    """Return the modules of a transformers model that the linear layers of a head become."""
    config: Any = head.config
    name, layers = ending(checkpoint), len(_layers(head))
    place = checkpoint.model_type, name
    pooled = bool(config.get("use_pooler"))
    tanh = config.get("activation_function") == "tanh"
    places: tuple[str, ...] | None = None
    if layers == 2 and tanh and not pooled:
        places = TWO_LAYERS.get(place)
    elif layers == 1:
        places = POOLED.get(place) if pooled else ONE_LAYER.get(name)
    if places is None or not config.get("bias", True):
        raise ConfigError(
            f"DIR: no transformers class for {checkpoint.model_type} has the same head "
            f"({config.get('head_type')} with layers={config.get('layers')}, activation_function="
            f"{config.get('activation_function')}, use_pooler={pooled})"
        )
    return places


def _check_output(
    checkpoint: Checkpoint, tensors: Tensors, model: PreTrainedModel, backbone: str
) -> None:
    """Check that an output embedding, and the bias behind it, are those of the backbone."""
    places = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    files = Weights(model, checkpoint_folder(backbone, None))
    for name, tensor in tensors.items():
        known = name if name in places else f"{_output_name(model)}.{name.rpartition('.')[2]}"
        aliases = [other for other, place in places.items() if place is places.get(known)]
        stored = files.get(aliases)
        stored = torch.zeros_like(tensor) if stored is None else stored.float()
        if stored.shape != tensor.shape or not torch.equal(stored, tensor):
            raise ConfigError(
                f"DIR: the output embedding {name} of {checkpoint.folder} is not that of "
                f"{backbone}, and scaleup does not train it; name the backbone with --model"
            )


def _output_name(model: PreTrainedModel) -> str:
    output = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is output)
