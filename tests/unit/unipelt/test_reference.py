"""Logits, loss and gradients equal those of the authors' published code (tests/reference)."""

import json
import pathlib

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from scaleup.unipelt.config import UniPeltConfig

REFERENCE = pathlib.Path(__file__).resolve().parents[2] / "reference"
SUBMODULES = {"A": "adapter", "P": "prefix", "L": "lora"}
RTOL, ATOL = 1e-4, 1e-5


class Reference:
    """One of the authors' runs, and the same model built with UniPELT."""

    def __init__(self, case: str, attention: str):
        self.file = np.load(REFERENCE / f"{case}.npz", allow_pickle=False)
        self.meta = meta = json.loads(str(self.file["meta"]))
        config = BertConfig(
            **{
                k: meta[k]
                for k in (
                    "hidden_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "intermediate_size",
                    "vocab_size",
                    "max_position_embeddings",
                    "num_labels",
                )
            },
            attn_implementation=attention,
        )
        self.model = get_peft_model(
            BertForSequenceClassification(config),
            UniPeltConfig(
                task_type="SEQ_CLS",
                submodules=[
                    name for letter, name in SUBMODULES.items() if letter in case.split("_")[0]
                ],
                gates="learned" if meta["gated"] else "none",
                gate_pooling="paper",
                adapter_size=meta["adapter_bottleneck"],
                prefix_length=meta["prefix_length"],
                prefix_hidden_size=meta["prefix_mlp_dim"],
                r=meta["lora_r"],
                lora_alpha=meta["lora_alpha"],
            ),
        ).eval()
        self.base = self.model.get_base_model()

    def pairs(self):
        """Return (name in the reference, parameter, its rows there) of all trained ones."""
        for name in self.file.files:
            if name.startswith("grad/"):
                yield name.removeprefix("grad/"), *self.ours(name.removeprefix("grad/"))

    def ours(self, name: str) -> tuple[torch.nn.Parameter, slice]:
        layer, _, end = name.partition("adapters.glue.")
        if end:
            norm = self.base.get_submodule(layer + "LayerNorm")
            module, kind = end.rsplit(".", 1)
            bottleneck, gate = norm.unipelt_adapter["default"], norm.unipelt_gate["default"]
            found = {"adapter_down.0": bottleneck.down, "adapter_up": bottleneck.up, "gate": gate}[
                module
            ]
            return getattr(found, kind), slice(None)
        if ".prefix_en" in name or ".prefix_embed" in name:
            encoder = self.base.bert.unipelt_bank_self.unipelt_prefix["default"]
            if "enc_embed" in name:
                return encoder.embedding.weight, slice(None)
            return encoder.transform.get_parameter(name.partition("MLP.")[2]), slice(None)
        if "gate" in name:
            attention = name.partition(".self.")[0] + ".self"
            gate = self.base.get_submodule(attention).unipelt_attention.unipelt_gate["default"]
            row = gate.names.index("prefix" if "prefix_gate" in name else "lora")
            return getattr(gate, name.rsplit(".", 1)[1]), slice(row, row + 1)
        if ".lora_" in name:
            projection, kind = name.rsplit(".", 1)
            return getattr(self.base.get_submodule(projection), kind)["default"].weight, slice(None)
        head, kind = name.rsplit(".", 1)
        return getattr(self.base.get_submodule(head).modules_to_save["default"], kind), slice(None)

    def load(self) -> None:
        trained = {name for name in self.file.files if name.startswith("grad/")}
        state = self.base.state_dict()
        with torch.no_grad():
            for name, parameter, rows in self.pairs():
                parameter[rows].copy_(torch.from_numpy(self.file["param/" + name]))
            for name in self.file.files:
                if (
                    name.startswith("param/")
                    and "grad/" + name.removeprefix("param/") not in trained
                ):
                    key = name.removeprefix("param/")
                    if key not in state:  # wrapped by LoRA or by the adapter
                        parent, kind = key.rsplit(".", 1)
                        key = f"{parent}.base_layer.{kind}"
                    state[key].copy_(torch.from_numpy(self.file[name]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["A", "P", "L", "AP", "APL", "APL_nogate"])
def test_logits_loss_and_gradients_equal_the_authors(case, attention, keys):
    reference = Reference(case, attention)
    reference.load()
    inputs = {
        name: torch.from_numpy(reference.file[name])
        for name in ("input_ids", "token_type_ids", "labels")
    }
    out = reference.model(attention_mask=torch.ones_like(inputs["input_ids"]), **inputs)
    np.testing.assert_allclose(out.logits.detach(), reference.file["logits"], RTOL, ATOL)
    np.testing.assert_allclose(out.loss.detach(), reference.file["loss"], RTOL, ATOL)
    out.loss.backward()
    covered: dict[int, int] = {}
    expected: dict[tuple[int, int], list] = {}
    for name, parameter, rows in reference.pairs():
        # The authors keep a copy of the LoRA gate at query and at value; its gradient is their sum.
        expected.setdefault((id(parameter), rows.start or 0), [parameter, rows, 0.0])[2] += (
            reference.file["grad/" + name]
        )
    for parameter, rows, gradient in expected.values():
        np.testing.assert_allclose(parameter.grad[rows], gradient, RTOL, ATOL)
        covered[id(parameter)] = covered.get(id(parameter), 0) + gradient.size
    trained = {name: p for name, p in reference.model.named_parameters() if p.requires_grad}
    assert {name for name, p in trained.items() if covered.get(id(p)) != p.numel()} == set()
