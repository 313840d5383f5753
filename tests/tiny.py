"""Tiny models of every supported family, built from configs: no download, deterministic weights."""

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    BartConfig, BartForSequenceClassification, BertConfig, BertForSequenceClassification, ElectraConfig,
    ElectraForSequenceClassification, MBartConfig, MBartForSequenceClassification, PreTrainedModel, RobertaConfig,
    RobertaForSequenceClassification, XLMRobertaConfig, XLMRobertaForSequenceClassification,
)  # fmt: skip

from scaleup import UniPeltConfig

SUBSETS = (["adapter"], ["prefix"], ["lora"], ["adapter", "prefix"], ["adapter", "lora"], ["prefix", "lora"], ["adapter", "prefix", "lora"])
VOCABULARY, EOS, PAD = 97, 2, 1

ENCODER = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=48, pad_token_id=PAD, num_labels=3,
)  # fmt: skip
SEQ2SEQ = dict(
    vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=48, pad_token_id=PAD, bos_token_id=0, eos_token_id=EOS,
    decoder_start_token_id=EOS, num_labels=3,
)  # fmt: skip
FAMILIES = {
    "bert": (BertForSequenceClassification, BertConfig, ENCODER),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, ENCODER),
    "xlm-roberta": (XLMRobertaForSequenceClassification, XLMRobertaConfig, ENCODER),
    "electra": (ElectraForSequenceClassification, ElectraConfig, ENCODER | {"embedding_size": 16}),
    "bart": (BartForSequenceClassification, BartConfig, SEQ2SEQ),
    "mbart": (MBartForSequenceClassification, MBartConfig, SEQ2SEQ),
}


def backbone(family: str, attention: str = "sdpa", **changes) -> PreTrainedModel:
    """A tiny model with random weights, large enough that no part of it is close to the identity; dropout off."""
    cls, config_cls, values = FAMILIES[family]
    torch.manual_seed(0)
    model = cls(config_cls(**(values | changes), attn_implementation=attention)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def adapt(model: PreTrainedModel, randomise: bool = True, **config) -> PeftModel:
    """The model with a small UniPELT; `randomise` moves every trained weight off its initial value (LoRA's B starts at 0)."""
    sizes = {"adapter_size": 6, "prefix_length": 3, "prefix_hidden_size": 8, "r": 4, "lora_alpha": 8}
    torch.manual_seed(1)
    adapted = get_peft_model(model, UniPeltConfig(task_type="SEQ_CLS", **(sizes | config))).eval()
    if randomise:
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=1.0 if "gate" in name else 0.3)
    return adapted


def batch(lengths: tuple[int, ...] = (11, 7, 9), width: int = 0, seed: int = 3) -> dict[str, torch.Tensor]:
    """Right-padded examples of the given lengths, each closed by EOS; the same seed gives the same tokens at any width."""
    generator = torch.Generator().manual_seed(seed)
    width = max(width, *lengths)
    input_ids = torch.full((len(lengths), width), PAD)
    for row, length in enumerate(lengths):
        input_ids[row, :length] = torch.randint(4, VOCABULARY, (length,), generator=generator)
        input_ids[row, length - 1] = EOS
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": input_ids, "attention_mask": mask}


LABELS = torch.tensor([0, 2, 1])
