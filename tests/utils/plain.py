"""UniPELT on BART, written from the paper's formulas in plain float64 PyTorch, without scaleup.

The weights of an adapted model are read by name. Gates are per token in the decoder (the mean over
the tokens so far) and per example in the encoder (the mean over real tokens). The gate of the value
projection of cross attention is a mean over the encoder's tokens.
"""

import math

import torch
from torch.nn.functional import gelu, layer_norm


class PlainBart:
    def __init__(self, model, heads: int, prefix_length: int, pre_norm: bool):
        base = model.get_base_model()
        self.w = {name: tensor.detach().double() for name, tensor in base.state_dict().items()}
        self.heads, self.length, self.pre_norm = heads, prefix_length, pre_norm
        self.scale = getattr(base.model.encoder.embed_tokens, "embed_scale", 1.0)

    def linear(self, x, name, lora_gate=None):
        if f"{name}.base_layer.weight" not in self.w:
            return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]
        y = x @ self.w[f"{name}.base_layer.weight"].T + self.w[f"{name}.base_layer.bias"]
        a, b = self.w[f"{name}.lora_A.default.weight"], self.w[f"{name}.lora_B.default.weight"]
        return y + lora_gate * ((x @ a.T) @ b.T)

    def norm(self, x, name):
        name = f"{name}.base_layer" if f"{name}.base_layer.weight" in self.w else name
        return layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def gate(self, x, name, row, mask, causal):
        """One gate per example [B, 1, 1], or per token [B, T, 1], computed token by token."""
        g = torch.sigmoid(x @ self.w[f"{name}.weight"][row] + self.w[f"{name}.bias"][row])  # [B, T]
        rows = []
        for b in range(x.shape[0]):
            real = [t for t in range(x.shape[1]) if mask is None or mask[b, t]]
            if causal:
                rows.append(torch.stack([g[b, : t + 1].mean() for t in range(x.shape[1])]))
            else:
                rows.append(g[b, real].mean().expand(1))
        return torch.stack(rows).unsqueeze(-1)

    def prefix(self, host, kind, layer):
        name = f"{host}.unipelt_bank_{kind}.unipelt_prefix.default"
        hidden = torch.tanh(
            self.w[f"{name}.embedding.weight"] @ self.w[f"{name}.transform.0.weight"].T
            + self.w[f"{name}.transform.0.bias"]
        )
        flat = hidden @ self.w[f"{name}.transform.2.weight"].T + self.w[f"{name}.transform.2.bias"]
        width = self.w[f"{host}.layers.0.self_attn.k_proj.weight"].shape[0]
        return flat[:, (2 * layer) * width : (2 * layer + 1) * width], flat[
            :, (2 * layer + 1) * width : (2 * layer + 2) * width
        ]

    def attention(self, x, host, layer, kind, mask, states=None, states_mask=None):
        """Compute attention on x [B, T, D], with loops over heads, queries and examples.

        `states` are those of the encoder in cross attention.
        """
        name = f"{host}.layers.{layer}.{'encoder_attn' if kind == 'cross' else 'self_attn'}"
        causal = host.endswith("decoder")
        gates = f"{name}.unipelt_attention.unipelt_gate.default"
        g_prefix, g_lora = (self.gate(x, gates, row, mask, causal) for row in (0, 1))
        g_value = g_lora if states is None else self.gate(states, gates, 1, states_mask, False)
        source = x if states is None else states
        q = self.linear(x, f"{name}.q_proj", g_lora)
        k, v = self.linear(source, f"{name}.k_proj"), self.linear(source, f"{name}.v_proj", g_value)
        prefix_k, prefix_v = self.prefix(host, kind, layer)
        size = q.shape[-1] // self.heads
        out = torch.zeros_like(q)
        for b in range(q.shape[0]):
            for t in range(q.shape[1]):
                g = g_prefix[b, t if g_prefix.shape[1] > 1 else 0]
                for h in range(self.heads):
                    part = slice(h * size, (h + 1) * size)
                    seen = [
                        s
                        for s in range(source.shape[1])
                        if (states_mask is None or states_mask[b, s])
                        and not (kind == "self" and causal and s > t)
                    ]
                    keys = torch.cat([g * prefix_k[:, part], k[b, seen, part]])
                    values = torch.cat([g * prefix_v[:, part], v[b, seen, part]])
                    out[b, t, part] = (
                        torch.softmax(keys @ q[b, t, part] / math.sqrt(size), 0) @ values
                    )
        return self.linear(out, f"{name}.out_proj")

    def adapter(self, n, name, mask, causal):
        g = self.gate(n, f"{name}.unipelt_gate.default", 0, mask, causal)
        inner = torch.relu(self.linear(n, f"{name}.unipelt_adapter.default.down"))
        return g * self.linear(inner, f"{name}.unipelt_adapter.default.up")

    def stack(self, tokens, host, mask, states=None, states_mask=None):
        """Hidden states [B, T, D] of the encoder or the decoder."""
        positions = self.w[f"{host}.embed_positions.weight"][2 : 2 + tokens.shape[1]]
        x = self.norm(
            self.w[f"{host}.embed_tokens.weight"][tokens] * self.scale + positions,
            f"{host}.layernorm_embedding",
        )
        causal = host.endswith("decoder")
        for layer in range(
            sum(
                1
                for name in self.w
                if name.startswith(f"{host}.layers.") and name.endswith("fc1.weight")
            )
        ):
            at = f"{host}.layers.{layer}"

            def sublayer(x, norm, f):
                return x + f(self.norm(x, norm)) if self.pre_norm else self.norm(x + f(x), norm)

            own = None if causal else mask
            x = sublayer(
                x,
                f"{at}.self_attn_layer_norm",
                lambda h, layer=layer, own=own: self.attention(
                    h, host, layer, "self", mask, None, own
                ),
            )
            if causal:
                x = sublayer(
                    x,
                    f"{at}.encoder_attn_layer_norm",
                    lambda h, layer=layer: self.attention(
                        h, host, layer, "cross", mask, states, states_mask
                    ),
                )

            def feed(h, at=at):
                return self.linear(gelu(self.linear(h, f"{at}.fc1")), f"{at}.fc2")

            if self.pre_norm:
                z = x + feed(self.norm(x, f"{at}.final_layer_norm"))
                x = z + self.adapter(
                    layer_norm(z, z.shape[-1:]), f"{at}.unipelt_block", mask, causal
                )
            else:
                z = x + feed(x)
                n = self.norm(z, f"{at}.final_layer_norm")
                x = self.norm(
                    z + self.adapter(n, f"{at}.final_layer_norm", mask, causal),
                    f"{at}.final_layer_norm",
                )
        return self.norm(x, f"{host}.layer_norm") if self.pre_norm else x

    def __call__(self, input_ids, attention_mask, decoder_input_ids):
        states = self.stack(input_ids, "model.encoder", attention_mask)
        return states, self.stack(decoder_input_ids, "model.decoder", None, states, attention_mask)
