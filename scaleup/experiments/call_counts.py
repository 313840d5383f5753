"""Count the calls of torch operations that a layer makes, in models with almost no width.

On a GPU a call is one launch of a kernel or one allocation, and small steps take as long as their
list of calls. The number of calls does not depend on the width of a model. Those of a layer are
half of the difference between models with four layers and with two.

The environment of the baseline library loads this file too, so it imports only torch and
transformers.
"""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
)

FEW_LAYERS, MANY_LAYERS = 2, 4
VOCABULARY = 100


def _bert(layers: int) -> BertConfig:
    return BertConfig(
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=VOCABULARY,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )


def _bart(layers: int) -> BartConfig:
    return BartConfig(
        d_model=64,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        dropout=0.0,
        num_labels=2,
    )


def _llama(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        use_cache=False,
    )


def _t5(encoder_layers: int, decoder_layers: int) -> T5Config:
    return T5Config(
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=encoder_layers,
        num_decoder_layers=decoder_layers,
        num_heads=4,
        vocab_size=VOCABULARY,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )


def _gpt2(layers: int) -> GPT2Config:
    return GPT2Config(
        n_embd=64,
        n_layer=layers,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=64,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        use_cache=False,
    )


# name → transformers' auto class, and the config of a model with a number of layers
FAMILIES: dict[str, tuple[Any, Callable[[int], Any]]] = {
    "BERT": (AutoModelForSequenceClassification, _bert),
    "Llama": (AutoModelForCausalLM, _llama),
    "GPT-2": (AutoModelForCausalLM, _gpt2),
    "T5 encoder": (AutoModelForSeq2SeqLM, lambda layers: _t5(layers, FEW_LAYERS)),
    "T5 pair": (AutoModelForSeq2SeqLM, lambda layers: _t5(layers, layers)),
    "BART pair": (AutoModelForSequenceClassification, _bart),
}


class CallCounter(TorchDispatchMode):
    """Count the calls of torch operations by name, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        # _unsafe_view is a view, although torch does not mark it as one.
        if not function.is_view and name != "_unsafe_view":
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def pass_gradients(model: PreTrainedModel) -> None:
    """Freeze all weights, but let gradients pass through the activations of the whole model."""

    def require_gradient(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        return out.requires_grad_()

    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == model.config.vocab_size:
            module.register_forward_hook(require_gradient)


def narrow_model(family: str, layers: int, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Create a model of one of `FAMILIES` with random weights."""
    auto_class, create_config = FAMILIES[family]
    torch.manual_seed(0)
    return auto_class.from_config(create_config(layers), dtype=dtype)


def loss_of(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compute the loss of a model of `narrow_model` under autocast, as a run with train.bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(**batch).loss


def training_calls(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> collections.Counter[str]:
    """Count the calls of the forward and backward pass in the second training step."""
    model.train()
    for _ in range(2):
        with CallCounter() as counter:
            loss_of(model, batch).backward()
        model.zero_grad()
    return counter.calls


def layer_calls(count: Callable[[int], Mapping[str, int]]) -> dict[str, float]:
    """Return the calls of one layer by name, given a function that counts those of a model.

    Args:
        count: number of layers → name of an operation → calls.
    """
    few, many = count(FEW_LAYERS), count(MANY_LAYERS)
    calls = {
        name: (many.get(name, 0) - few.get(name, 0)) / (MANY_LAYERS - FEW_LAYERS)
        for name in sorted({*few, *many})
    }
    return {name: number for name, number in calls.items() if number}
