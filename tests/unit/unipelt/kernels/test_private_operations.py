"""Torch's private attention operations have the schemas for which their calls are written."""

import inspect
import re

import pytest
import torch

from scaleup.unipelt.kernels import fused_attention

SCHEMAS = (
    "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, "
    "Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool "
    "return_debug_mask, *, float? scale=None, SymInt? window_size_left=None, SymInt? "
    "window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None, Tensor? "
    "block_table=None, int? num_splits=None) -> (Tensor output, Tensor softmax_logsumexp, Tensor "
    "rng_state, Tensor unused, Tensor debug_attn_mask)",
    "aten::_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, "
    "Tensor out, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, "
    "float dropout_p, bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, "
    "SymInt? window_size_left=None, SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)",
    "aten::_scaled_dot_product_efficient_attention(Tensor query, Tensor key, Tensor value, Tensor? "
    "attn_bias, bool compute_log_sumexp, float dropout_p=0., bool is_causal=False, *, float? "
    "scale=None) -> (Tensor output, Tensor log_sumexp, Tensor philox_seed, Tensor philox_offset)",
    "aten::_scaled_dot_product_efficient_attention_backward(Tensor grad_out_, Tensor query, Tensor "
    "key, Tensor value, Tensor attn_bias, Tensor out, Tensor logsumexp, Tensor philox_seed, Tensor "
    "philox_offset, float dropout_p, bool[4] grad_input_mask, bool is_causal=False, *, float? "
    "scale=None) -> (Tensor, Tensor, Tensor, Tensor)",
    "aten::_scaled_dot_product_flash_attention_for_cpu(Tensor query, Tensor key, Tensor value, "
    "float dropout_p=0., bool is_causal=False, *, Tensor? attn_mask=None, float? scale=None) -> "
    "(Tensor output, Tensor logsumexp)",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward(Tensor grad_out, Tensor query, "
    "Tensor key, Tensor value, Tensor out, Tensor logsumexp, float dropout_p, bool is_causal, *, "
    "Tensor? attn_mask=None, float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor "
    "grad_value)",
)


def name_of(schema: str) -> str:
    return schema.removeprefix("aten::").partition("(")[0]


@pytest.mark.parametrize("schema", SCHEMAS, ids=name_of)
def test_the_schema_is_unchanged(schema):
    operation = getattr(torch.ops.aten, name_of(schema)).default
    assert str(operation._schema) == schema


def test_no_other_private_operation_is_called():
    source = inspect.getsource(fused_attention)
    assert set(re.findall(r"aten\.(\w+)", source)) == {name_of(schema) for schema in SCHEMAS}
