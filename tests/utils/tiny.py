"""Tiny models of every family under test, built from configs, with deterministic weights."""

import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import CONFIG_MAPPING, PreTrainedModel

from scaleup.unipelt.config import UniPeltConfig

SUBSETS = (
    ["adapter"],
    ["prefix"],
    ["lora"],
    ["adapter", "prefix"],
    ["adapter", "lora"],
    ["prefix", "lora"],
    ["adapter", "prefix", "lora"],
)
VOCABULARY, EOS, PAD = 97, 2, 1

SPECIAL = dict(vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=0, eos_token_id=EOS)
ENCODER = SPECIAL | dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=48,
    num_labels=3,
)
SEQ2SEQ = SPECIAL | dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_position_embeddings=48,
    decoder_start_token_id=EOS,
    num_labels=3,
)
T5 = SPECIAL | dict(
    d_model=32,
    d_kv=8,
    d_ff=64,
    num_layers=2,
    num_heads=4,
    decoder_start_token_id=PAD,
    initializer_factor=0.1,
    relative_attention_num_buckets=8,
)
GROUPED = ENCODER | dict(num_key_value_heads=2, head_dim=8)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LINEAR = dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
DEBERTA = dict(
    relative_attention=True,
    position_buckets=8,
    pos_att_type=["c2p", "p2c"],
    share_att_key=True,
    norm_rel_ebd="layer_norm",
)

# family → model class and values of its config. They cover post-LN and pre-LN blocks, shared
# layers, grouped and fused projections, rotary and relative positions, sliding windows, capped
# scores, tied embeddings, experts, attention sinks, and layers that mix tokens without a softmax.
_MODELS = {
    "bert": ("BertForSequenceClassification", ENCODER),
    "roberta": ("RobertaForSequenceClassification", ENCODER),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", ENCODER),
    "electra": ("ElectraForSequenceClassification", ENCODER | {"embedding_size": 16}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        SPECIAL
        | dict(
            dim=32, n_layers=3, n_heads=4, hidden_dim=64, max_position_embeddings=48, num_labels=3
        ),
    ),
    "albert": ("AlbertForSequenceClassification", ENCODER | {"embedding_size": 16}),
    "deberta-v2": ("DebertaV2ForSequenceClassification", ENCODER | DEBERTA),
    "mpnet": ("MPNetForSequenceClassification", ENCODER),
    "modernbert": (
        "ModernBertForSequenceClassification",
        ENCODER
        | dict(local_attention=6, global_attn_every_n_layers=3, cls_token_id=0, sep_token_id=EOS),
    ),
    "bart": ("BartForSequenceClassification", SEQ2SEQ),
    "mbart": ("MBartForSequenceClassification", SEQ2SEQ),
    "pegasus": ("PegasusForConditionalGeneration", SEQ2SEQ),
    "t5": ("T5ForConditionalGeneration", T5),
    "mt5": ("MT5ForConditionalGeneration", T5),
    "umt5": ("UMT5ForConditionalGeneration", T5),
    "gpt2": ("GPT2LMHeadModel", SPECIAL | dict(n_embd=32, n_layer=3, n_head=4, n_positions=48)),
    "opt": ("OPTForCausalLM", ENCODER | dict(ffn_dim=64, word_embed_proj_dim=16)),
    "gpt_neox": ("GPTNeoXForCausalLM", ENCODER),
    "llama": ("LlamaForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", GROUPED | {"sliding_window": 6}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", GROUPED),
    "gemma2": (
        "Gemma2ForCausalLM",
        GROUPED | dict(sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=2.0),
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        GROUPED
        | dict(
            sliding_window=6,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "phi": ("PhiForCausalLM", ENCODER),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "qwen3_moe": ("Qwen3MoeForCausalLM", GROUPED | EXPERTS),
    "mixtral": ("MixtralForCausalLM", GROUPED | EXPERTS),
    "gpt_oss": (
        "GptOssForCausalLM",
        GROUPED
        | EXPERTS
        | dict(
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        GROUPED
        | EXPERTS
        | dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1)
        | dict(topk_group=1),
    ),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", GROUPED | LINEAR),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        GROUPED | EXPERTS | LINEAR | dict(shared_expert_intermediate_size=16),
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        GROUPED
        | dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8)
        | dict(mamba_n_groups=1, mamba_chunk_size=8),
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        GROUPED
        | dict(layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False),
    ),
}
FAMILIES = {
    family: (getattr(transformers, name), CONFIG_MAPPING[family], values)
    for family, (name, values) in _MODELS.items()
}
# Hybrid families → number of their attentions. Their other layers mix tokens without a softmax.
HYBRID = {"qwen3_5_text": 1, "qwen3_next": 1, "falcon_h1": 3, "lfm2": 1}
MIXED = ("qwen3_moe", "mixtral", "gpt_oss", "glm4_moe", "qwen3_next")  # mixtures of experts
# Of a kind of which another family runs by default: their other tests are slow ones.
LATER = ("qwen3_moe", "glm4_moe", "qwen3_5_text", "lfm2")
# With the sdpa of transformers, UMT5's decoder sees later tokens (refused) and Gemma 2 leaves out
# the cap. DeBERTa, MPNet and GPT-OSS have none.
NO_SDPA = ("umt5", "deberta-v2", "mpnet", "gemma2", "gpt_oss")
CASES = [
    (family, attention)
    for family in FAMILIES
    for attention in ("sdpa", "eager")
    if attention == "eager" or family not in NO_SDPA
]


def implementation(family: str) -> str:
    """The attention implementation to use where a test is not about it."""
    return "eager" if family in NO_SDPA else "sdpa"


def backbone(
    family: str, attention: str | None = None, cls: type | None = None, **changes
) -> PreTrainedModel:
    """Return a tiny model without dropout, in which no part is close to the identity."""
    usual, config_cls, values = FAMILIES[family]
    torch.manual_seed(0)
    config = config_cls(**(values | changes))
    config._attn_implementation = attention or implementation(family)
    model = (cls or usual)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif name.endswith("sinks"):
                parameter.normal_()
    return model


def auto_class(family: str) -> type:
    """transformers' auto class for the head of the family's tiny model."""
    name = {
        "SEQ_CLS": "AutoModelForSequenceClassification",
        "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
        "CAUSAL_LM": "AutoModelForCausalLM",
    }[task_type(backbone(family))]
    return getattr(transformers, name)


def task_type(model: PreTrainedModel) -> str:
    """PEFT's name for what the model is for."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def adapt(model: PreTrainedModel, randomise: bool = True, **config) -> PeftModel:
    """Return the model with a small UniPELT.

    `randomise` moves every trained weight off its initial value, because LoRA's B starts at 0.
    """
    sizes = {
        "adapter_size": 6,
        "prefix_length": 3,
        "prefix_hidden_size": 8,
        "r": 4,
        "lora_alpha": 8,
    }
    torch.manual_seed(1)
    adapted = get_peft_model(
        model, UniPeltConfig(task_type=task_type(model), **(sizes | config))
    ).eval()
    if randomise:
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=1.0 if "gate" in name else 0.3)
    return adapted


def batch(
    lengths: tuple[int, ...] = (11, 7, 9), width: int = 0, seed: int = 3
) -> dict[str, torch.Tensor]:
    """Return right-padded examples of the given lengths, each with EOS at its end.

    The same seed gives the same tokens at any width.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(width, *lengths)
    input_ids = torch.full((len(lengths), width), PAD)
    for row, length in enumerate(lengths):
        input_ids[row, :length] = torch.randint(4, VOCABULARY, (length,), generator=generator)
        input_ids[row, length - 1] = EOS
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": input_ids, "attention_mask": mask}


LABELS = torch.tensor([0, 2, 1])
TARGETS = batch((6, 6, 6), seed=5)["input_ids"]


def inputs(
    model: PreTrainedModel | PeftModel, width: int = 0, labels: bool = False
) -> dict[str, torch.Tensor]:
    """Return a batch for any model; labels are classes, target tokens, or the tokens themselves."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found, kind = batch(width=width), task_type(base)
    if kind == "SEQ_2_SEQ_LM":
        return found | ({"labels": TARGETS} if labels else {"decoder_input_ids": TARGETS})
    own = (
        LABELS
        if kind == "SEQ_CLS"
        else found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)
    )
    return found | ({"labels": own} if labels else {})


def logits(
    model: PreTrainedModel | PeftModel, given: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Return the logits of real tokens, [examples, …] at a width of 11 tokens.

    The logits of a causal model at padding have no meaning.
    """
    given = inputs(model) if given is None else given
    with torch.no_grad():
        out = model(**given).logits
    if out.dim() == 3 and "decoder_input_ids" not in given:
        out = (out * given["attention_mask"].unsqueeze(2))[:, :11]
    return out


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Compare except for the last bits.

    On some processors these depend on the address at which a tensor begins.
    """
    return (found - expected).abs().max().item() < 1e-5 * max(1.0, expected.abs().max().item())
