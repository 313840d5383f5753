"""UniPELT on any backbone, from the paper's formulas, as float64 hooks, without scaleup.

The places of the submodules are listed by hand for each family. Weights are read by name from the
state of an adapted model. Gates are computed token by token, and attention is written out with the
prefix in front.
"""

import math
import re
import types

import torch
from torch.nn.functional import layer_norm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from tests.utils.tiny import MIXED

# family → for each stack: parent model, attentions, blocks, closing norm of a post-LN block (None
# for pre-LN), whether it is causal


def _stack(
    host: str, attention: str, block: str, norm: str | None = None, causal: bool = False
) -> dict:
    return {
        "host": host,
        "attention": rf"{re.escape(host)}\.{attention}",
        "block": rf"{re.escape(host)}\.{block}",
        "norm": norm,
        "causal": causal,
    }


def _bert(host: str) -> list[dict]:
    return [
        _stack(
            host,
            r"encoder\.layer\.\d+\.attention\.self",
            r"encoder\.layer\.\d+",
            "output.LayerNorm",
        )
    ]


def _bart(norm: str | None) -> list[dict]:
    return [
        _stack("model.encoder", r"layers\.\d+\.self_attn", r"layers\.\d+", norm),
        _stack("model.decoder", r"layers\.\d+\.(self|encoder)_attn", r"layers\.\d+", norm, True),
    ]


_LLAMA = [_stack("model", r"layers\.\d+\.self_attn", r"layers\.\d+", None, True)]
_T5 = [
    _stack(h, r"block\.\d+\.layer\.\d\.(Self|EncDec)Attention", r"block\.\d+", None, h == "decoder")
    for h in ("encoder", "decoder")
]
PLACES = {
    "bert": _bert("bert"),
    "roberta": _bert("roberta"),
    "xlm-roberta": _bert("roberta"),
    "electra": _bert("electra"),
    "deberta-v2": _bert("deberta"),
    "distilbert": [
        _stack(
            "distilbert",
            r"transformer\.layer\.\d+\.attention",
            r"transformer\.layer\.\d+",
            "output_layer_norm",
        )
    ],
    "albert": [
        _stack(
            "albert",
            r"encoder\.albert_layer_groups\.0\.albert_layers\.0\.attention",
            r"encoder\.albert_layer_groups\.0\.albert_layers\.0",
            "full_layer_layer_norm",
        )
    ],
    "mpnet": [
        _stack(
            "mpnet",
            r"encoder\.layer\.\d+\.attention\.attn",
            r"encoder\.layer\.\d+",
            "output.LayerNorm",
        )
    ],
    "modernbert": [_stack("model", r"layers\.\d+\.attn", r"layers\.\d+")],
    "bart": _bart("final_layer_norm"),
    "mbart": _bart(None),
    "pegasus": _bart(None),
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "gpt2": [_stack("transformer", r"h\.\d+\.attn", r"h\.\d+", None, True)],
    "opt": [_stack("model.decoder", r"layers\.\d+\.self_attn", r"layers\.\d+", None, True)],
    "gpt_neox": [_stack("gpt_neox", r"layers\.\d+\.attention", r"layers\.\d+", None, True)],
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3"), _LLAMA
    ),
    **dict.fromkeys(("qwen3_moe", "mixtral", "gpt_oss", "glm4_moe"), _LLAMA),
    **dict.fromkeys(("qwen3_5_text", "qwen3_next", "falcon_h1", "lfm2"), _LLAMA),
}
# Query, key and value projection. Fused ones: the rows of queries, keys and values with 4 heads of
# size 8 (phi3: 2 key-value heads).
_HEADS = [
    [row for h in range(4) for row in range(h * 24 + part * 8, h * 24 + part * 8 + 8)]
    for part in range(3)
]
FUSED = {
    "modernbert": ("Wqkv", range(32), range(32, 64), range(64, 96)),
    "gpt2": ("c_attn", range(32), range(32, 64), range(64, 96)),
    "phi3": ("qkv_proj", range(32), range(32, 48), range(48, 64)),
    "gpt_neox": ("query_key_value", *_HEADS),
}
NAMES = {
    "distilbert": ("q_lin", "k_lin", "v_lin"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj"),
} | dict.fromkeys(("t5", "mt5", "umt5", "mpnet"), ("q", "k", "v"))
NAMES |= dict.fromkeys(
    ("bert", "roberta", "xlm-roberta", "electra", "albert"), ("query", "key", "value")
)
# The other linear layers of a block, those that read the same input together
_BERT = ["attention.output.dense", "intermediate.dense", "output.dense"]
LINEARS = {
    "bert": _BERT,
    "deberta-v2": _BERT,
    "mpnet": ["attention.attn.o", "intermediate.dense", "output.dense"],
    "bart": ["self_attn.out_proj", "encoder_attn.out_proj", "fc1", "fc2"],
    "t5": ["layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"]
    + [f"layer.{i}.DenseReluDense.{name}" for name in ("wi", "wo") for i in (1, 2)],
    "gpt2": ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "gpt_neox": ["attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    "opt": ["self_attn.out_proj", "fc1", "fc2"],
    "phi3": ["self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "llama": ["self_attn.o_proj", "mlp.gate_proj mlp.up_proj", "mlp.down_proj"],
}
BANKS = {}  # attention module → its Site, for the attention function below


class Site:
    """One attention of the reference."""

    def __init__(self, plain: "Plain", name: str, stack: dict, cross: bool, layer: int):
        self.plain, self.name, self.stack, self.cross, self.layer = plain, name, stack, cross, layer

    def before(self, module, args, kwargs):
        h = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        gates = f"{self.name}.unipelt_attention.unipelt_gate.default"
        causal, mask = (
            self.stack["causal"],
            None if self.stack["causal"] and self.plain.encoder_decoder else self.plain.mask,
        )
        self.g_prefix, self.g_query = (
            self.plain.gate(h, gates, row, mask, causal) for row in (0, 1)
        )
        self.g_value = self.g_query
        if self.cross:
            states = (
                kwargs["key_value_states"]
                if kwargs.get("key_value_states") is not None
                else kwargs["encoder_hidden_states"]
            )
            self.g_value = self.plain.gate(states, gates, 1, self.plain.mask, False)

    def prefix(self, kv_heads: int):
        bank = f"unipelt_bank_{'cross' if self.cross else 'self'}"
        name = f"{self.stack['host']}.{bank}.unipelt_prefix.default"
        w = self.plain.w
        hidden = torch.tanh(
            w[f"{name}.embedding.weight"] @ w[f"{name}.transform.0.weight"].T
            + w[f"{name}.transform.0.bias"]
        )
        flat = hidden @ w[f"{name}.transform.2.weight"].T + w[f"{name}.transform.2.bias"]
        parts = flat.split(flat.shape[1] // (2 * self.plain.count(self.stack, self.cross)), dim=1)
        return (
            parts[2 * self.layer + i].unflatten(1, (kv_heads, -1)).transpose(0, 1) for i in (0, 1)
        )  # [G, L, E]

    def attend(self, q, k, v, mask, scaling, bias=None, cap=None, sinks=None):
        """[B, T, H, E]; one head and one query's gate at a time."""
        keys, values = self.prefix(k.shape[1])
        out = torch.zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype)
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            g = self.g_prefix  # [B, T or 1, 1]
            scores = q[:, head] @ k[:, group].transpose(1, 2) * scaling
            front = g * (q[:, head] @ keys[group].T) * scaling
            if bias is not None:
                scores = scores + bias[:, head % bias.shape[1]]
            if cap is not None:
                scores, front = (cap * torch.tanh(part / cap) for part in (scores, front))
            if mask is not None:
                scores = scores + mask[:, head % mask.shape[1]]
            columns = [front, scores]
            if sinks is not None:  # a score that takes its share of the softmax, and has no value
                columns.append(sinks[head].expand(*scores.shape[:2], 1))
            share = torch.softmax(torch.cat(columns, dim=-1), dim=-1)
            share = share if sinks is None else share[..., :-1]
            length = keys.shape[1]
            out[:, :, head] = share[..., length:] @ v[:, group] + g * (
                share[..., :length] @ values[group]
            )
        return out


def reference_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    softcap=None,
    position_bias=None,
    s_aux=None,
    **kwargs,
):
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return BANKS[module].attend(
        query, key, value, attention_mask, scaling, position_bias, softcap, s_aux
    ), None


AttentionInterface.register("reference", reference_attention)
AttentionMaskInterface.register("reference", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


class Plain:
    """UniPELT on `bare`, the backbone without adapter, with the weights of `adapted`.

    The weights are in `w`. With `trains`, those of the submodules get gradients.
    """

    def __init__(self, bare, adapted, family: str, trains: bool = False):
        self.model, self.w, self.family = bare.double(), {}, family
        self.encoder_decoder = bare.config.is_encoder_decoder
        for name, tensor in adapted.get_base_model().state_dict().items():
            self.w[name] = tensor.detach().double().requires_grad_(trains and ".default." in name)
        for name, parameter in bare.named_parameters():  # the trained head
            saved = self.w.get(re.sub(r"^(\w+)\.", r"\1.modules_to_save.default.", name))
            if saved is not None:
                parameter.data.copy_(saved)
        if family in MIXED:  # the usual products of experts take no float64
            bare.set_experts_implementation("eager")
        self.modules = dict(bare.named_modules())
        self.attentions = {
            id(s): [n for n in self.modules if re.fullmatch(s["attention"], n)]
            for s in PLACES[family]
        }
        for part in bare.modules():
            if hasattr(part, "config") and family not in OWN_ATTENTION:
                part.config._attn_implementation = "reference"
        for stack in PLACES[family]:
            self._attach(stack)

    def count(self, stack: dict, cross: bool) -> int:
        return sum(self._cross(name) == cross for name in self.attentions[id(stack)])

    @staticmethod
    def _cross(name: str) -> bool:
        return "encoder_attn" in name or "EncDec" in name

    def _attach(self, stack: dict) -> None:
        layers = {False: 0, True: 0}
        for name in self.attentions[id(stack)]:
            module, cross = self.modules[name], self._cross(name)
            site = BANKS[module] = Site(self, name, stack, cross, layers[cross])
            layers[cross] += 1
            module.register_forward_pre_hook(site.before, with_kwargs=True)
            if self.family in OWN_ATTENTION:
                module.forward = types.MethodType(OWN_ATTENTION[self.family], module)
            self._lora(name, site)
        for name in [n for n in self.modules if re.fullmatch(stack["block"], n)]:
            where = f"{name}.{stack['norm']}" if stack["norm"] else name
            self.modules[where].register_forward_hook(
                self._post(where, stack)
                if stack["norm"]
                else self._pre(f"{where}.unipelt_block", stack)
            )
            for group in LINEARS.get(self.family, ()):
                names = [f"{name}.{linear}" for linear in group.split()]
                separate = all(self.own_gate(linear) for linear in names)
                for linears in [[linear] for linear in names] if separate else [names]:
                    self._linears(linears, stack["causal"])

    def own_gate(self, linear: str) -> str | None:
        """Return the path of the gate that a linear layer has, None if it has none."""
        gate = f"{linear}.unipelt_linear.unipelt_gate.default"
        return gate if f"{gate}.weight" in self.w else None

    def _linears(self, names: list[str], causal: bool) -> None:
        """Add LoRA to layers that read the same input, if it has weights there."""
        gate = self.own_gate(names[0])
        mask = lambda: None if causal and self.encoder_decoder else self.mask  # noqa: E731

        def add(name: str):
            def hook(module, args, output):
                x = args[0]
                if x.dim() == 2:
                    x = x.unflatten(0, (self.examples, -1))
                g = self.gate(x, gate, 0, mask(), causal)
                a, b = (self.w[f"{name}.lora_{part}.default.weight"] for part in "AB")
                return output + (g * (x @ a.T @ b.T)).view_as(output)

            self.modules[name].register_forward_hook(hook)

        for name in names:
            if f"{name}.lora_A.default.weight" in self.w:
                add(name)

    def _lora(self, name: str, site: Site) -> None:
        def add(where, rows_a, rows_b, columns, gate):
            a, b = (
                self.w[f"{where}.lora_A.default.weight"],
                self.w[f"{where}.lora_B.default.weight"],
            )

            def hook(module, args, output):
                x = args[0]
                if self.family == "deberta-v2" and x.shape[0] != gate().shape[0]:
                    return output  # position embeddings
                update = torch.zeros_like(output)
                update[..., columns] = gate() * ((x @ a[rows_a].T) @ b[rows_b].T)
                return output + update

            self.modules[where].register_forward_hook(hook)

        query, value = lambda: site.g_query, lambda: site.g_value
        if self.family in FUSED:
            projection, *rows = FUSED[self.family]
            rows_b, rank = self.w[f"{name}.{projection}.lora_B.default.weight"].shape
            if rows_b < sum(map(len, rows)):
                del rows[1]  # the keys
            at = 0
            for i, columns in enumerate(rows):
                rows_a = slice(i * rank, (i + 1) * rank)
                part = slice(at, at + len(columns))
                add(f"{name}.{projection}", rows_a, part, list(columns), query)
                at += len(columns)
        else:
            names = NAMES.get(self.family, ("q_proj", "k_proj", "v_proj"))
            for projection, gate in zip(names, (query, value, value)):
                if self.own_gate(f"{name}.{projection}"):
                    self._linears([f"{name}.{projection}"], site.stack["causal"] and not site.cross)
                elif f"{name}.{projection}.lora_A.default.weight" in self.w:
                    everything = slice(None)
                    add(f"{name}.{projection}", everything, everything, everything, gate)

    def _adapter(self, n, where: str, stack: dict):
        mask = None if stack["causal"] and self.encoder_decoder else self.mask
        g = self.gate(n, f"{where}.unipelt_gate.default", 0, mask, stack["causal"])
        name = f"{where}.unipelt_adapter.default"
        inner = torch.relu(n @ self.w[f"{name}.down.weight"].T + self.w[f"{name}.down.bias"])
        return g * (inner @ self.w[f"{name}.up.weight"].T + self.w[f"{name}.up.bias"])

    def _post(self, where: str, stack: dict):
        return lambda norm, args, n: norm.forward(args[0] + self._adapter(n, where, stack))

    def _pre(self, where: str, stack: dict):
        def hook(block, args, output):
            z = output[0] if isinstance(output, tuple) else output
            z = z + self._adapter(layer_norm(z, z.shape[-1:]), where, stack)
            return (z, *output[1:]) if isinstance(output, tuple) else z

        return hook

    def gate(self, x, name: str, row: int, mask, causal: bool):
        """[B, 1, 1], or [B, T, 1] where later tokens must not count: computed token by token."""
        g = torch.sigmoid(x @ self.w[f"{name}.weight"][row] + self.w[f"{name}.bias"][row])
        rows = []
        for b in range(x.shape[0]):
            real = [t for t in range(x.shape[1]) if mask is None or mask[b, t]]
            if causal:
                so_far = [[s for s in real if s <= t] for t in range(x.shape[1])]
                rows.append(
                    torch.stack([g[b, seen].mean() if seen else g.new_zeros(()) for seen in so_far])
                )
            else:
                rows.append(g[b, real].mean().expand(1))
        return torch.stack(rows).unsqueeze(-1)

    def __call__(self, given: dict) -> torch.Tensor:
        self.mask, self.examples = given.get("attention_mask"), len(given["input_ids"])
        return self.model(**given).logits


def deberta(
    self,
    hidden_states,
    attention_mask,
    output_attentions=False,
    query_states=None,
    relative_pos=None,
    rel_embeddings=None,
):
    """DeBERTa's disentangled attention with the prefix's content-to-content scores in front."""
    heads = self.num_attention_heads
    q, k, v = (
        self.transpose_for_scores(p(hidden_states), heads)
        for p in (self.query_proj, self.key_proj, self.value_proj)
    )
    kinds = 1 + len(self.pos_att_type)
    bias = self.disentangled_attention_bias(q, k, relative_pos, rel_embeddings, kinds)
    q, k, v, bias = (t.view(-1, heads, *t.shape[1:]) for t in (q, k, v, bias))
    mask = torch.where(attention_mask.bool(), 0.0, torch.finfo(torch.float32).min).expand(
        q.shape[0], 1, q.shape[2], k.shape[2]
    )
    return BANKS[self].attend(q, k, v, mask, 1 / math.sqrt(q.shape[-1] * kinds), bias).flatten(
        2
    ), None


def mpnet(
    self, hidden_states, attention_mask=None, position_bias=None, output_attentions=False, **kwargs
):
    """MPNet's attention, with the prefix's context in front of its output projection."""
    q, k, v = (
        projection(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        for projection in (self.q, self.k, self.v)
    )
    out = BANKS[self].attend(q, k, v, attention_mask, 1 / math.sqrt(q.shape[-1]), position_bias)
    return (self.o(out.flatten(2)),)


# Families that compute attention themselves → the forward pass of their attention.
OWN_ATTENTION = {"deberta-v2": deberta, "mpnet": mpnet}
