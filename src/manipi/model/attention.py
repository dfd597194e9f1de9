"""Attention under the rule of `attention_mask`, in the form that suits the device.

    everything is seen      no mask at all: the prefix of π0 and π0.5 where nothing is padded, every decoded token
    GPU, many queries       FlexAttention: the rule itself, in blocks; no tensor has queries times keys elements
    otherwise               a bias of queries times keys, for the fused kernel (few queries, or a processor)

Shape suffixes: B batch, T query tokens, S key tokens, N query heads, G key/value heads, H head dim.
"""

from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from manipi.model.attention_mask import Layout, attention_mask
from manipi.model.inference.graphs import many_variants

Mask: TypeAlias = Tensor | BlockMask | None
"""A bias [B, 1, T, S] of the logits, 0 where a key is seen and `MASKED` where not; or FlexAttention's; or none."""

MASKED = -2.3819763e38
"""The reference's logit of a key that must not be seen. It is finite, so that padding, which sees nothing, averages
over everything instead of turning into NaN. (FlexAttention gives zeros there; nobody reads either.)"""

FLEX_QUERIES = 128
"""FlexAttention's block: for fewer queries a bias is small, and needs no kernel to be compiled."""
FLEX_SHARED_MEMORY = 160 * 1024
"""Bytes that a GPU must have per thread block (A100, H100, B200 do). With Gemma's head dim of 256 the backward kernel
of torch 2.13 does not fit into the 99 KiB of the others: github.com/pytorch/pytorch/issues/198224, 133254."""


def mask_for(query: Layout, key: Layout, dtype: torch.dtype) -> Mask:
    """Which keys each query sees, for `attend`."""
    if query.valid.shape[1] >= FLEX_QUERIES and _has_flex(query.valid.device):
        return flex_mask(query, key)
    mask_BTS = attention_mask(query, key)
    zero = torch.zeros((), dtype=dtype, device=mask_BTS.device)
    return torch.where(mask_BTS, zero, MASKED)[:, None]


def flex_mask(query: Layout, key: Layout) -> BlockMask:
    """`attention_mask` as a function of the indices, and which blocks of queries and keys it leaves out."""

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        same_path = (key.branch[b, s] == 0) | (key.branch[b, s] == query.branch[b, t])
        return same_path & (key.block[b, s] <= query.block[b, t]) & key.valid[b, s] & query.valid[b, t]

    (b, t), s = query.valid.shape, key.valid.shape[1]
    make = _compiled(create_block_mask) if query.valid.is_cuda else create_block_mask
    return make(sees, b, None, t, s, device=query.valid.device)


def attend(q_BTNH: Tensor, k_BSGH: Tensor, v_BSGH: Tensor, mask: Mask) -> Tensor:
    """Grouped-query attention [B, T, N, H]; logits and softmax are float32 inside the fused kernel."""
    q_BNTH, k_BGSH, v_BGSH = (t.transpose(1, 2) for t in (q_BTNH, k_BSGH, v_BSGH))
    if isinstance(mask, BlockMask):
        # A compiled block compiles this too; outside of one it is compiled by itself.
        outside = q_BTNH.is_cuda and not torch.compiler.is_compiling()
        flex = _compiled(flex_attention) if outside else flex_attention
        return flex(q_BNTH, k_BGSH, v_BGSH, block_mask=mask, enable_gqa=True).transpose(1, 2)
    groups = q_BTNH.shape[2] // k_BSGH.shape[2]
    # With one key/value head, as in every released size, the repeated heads are a view.
    k_BNSH, v_BNSH = (t[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for t in (k_BGSH, v_BGSH))
    return F.scaled_dot_product_attention(q_BNTH, k_BNSH, v_BNSH, attn_mask=mask).transpose(1, 2)


@cache
def _has_flex(device: torch.device) -> bool:
    return device.type == "cuda" and (
        torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= FLEX_SHARED_MEMORY
    )


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, **many_variants())
