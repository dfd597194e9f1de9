"""Which tokens see which, and attention under that rule in the form of the device.

One rule for every policy: blocks in order, branches apart. A token sees every valid token of its own block and of the
blocks before. `starts_block` marks where a block begins:

    0 0 0 0 0 0 | 1 | 1 0 0        π0       prompt · state token · action tokens, bidirectional within each
    0 0 0 0 0 0 | 1 0 0            π0.5     prompt · action tokens
    0 0 0 0 0 0 | 1 1 1 1          π0-FAST  prompt · causal action tokens

Branch 0 is the trunk, which everyone sees. Branches 1, 2, … see the trunk and themselves, but not each other, so
that several noise draws, or action tokens and flow actions, share one prompt:

                         ┌─ branch 1: action tokens, first noise draw
    trunk: prompt ───────┤
                         └─ branch 2: action tokens, second noise draw

Positions count along the path from the trunk into the branch, so that a token sits where it would sit if the other
branches were absent.

Attention under it has four forms:

    everything is seen      no mask at all: the prefix of π0 and π0.5 where nothing is padded, every decoded token
    GPU, many queries       FlexAttention: the rule itself, in blocks; no tensor has queries times keys elements
    in an engine            the query heads of a key head as rows behind each other, so that it is read once
    otherwise               a bias of queries times keys, for the fused kernel (few queries, or a processor)

Shape suffixes: B batch, T query tokens, S key tokens, N query heads, G key/value heads, H head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from manipi.model.device import many_variants

Mask: TypeAlias = Tensor | BlockMask | None
"""A bias of the logits [B, 1, T, S], 0 where a key is seen and `MASKED` where not (of rows, [B, 1, 1 or T·N/G, S]);
or FlexAttention's; or none."""

MASKED = -2.3819763e38
"""The reference's logit of a key that must not be seen. It is finite, so that padding, which sees nothing, averages
over everything instead of turning into NaN. (FlexAttention gives zeros there; neither is read.)"""

FLEX_QUERIES = 128
"""FlexAttention's block: for fewer queries a bias is small, and needs no kernel to be compiled."""
FLEX_SHARED_MEMORY = 160 * 1024
"""Bytes that a GPU must have per thread block (A100, H100, B200 do). With Gemma's head dim of 256 the backward kernel
of torch 2.13 does not fit into the 99 KiB of the others: github.com/pytorch/pytorch/issues/198224, 133254."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each token of a sequence stands: what the mask and the rotary embedding need to know. All [B, T]."""

    valid: Tensor
    """bool: false for padding and missing cameras, which no token sees."""
    block: Tensor
    """long, never decreasing."""
    branch: Tensor
    """long, 0 for the trunk."""
    position: Tensor
    """long, the index on the token's own path."""
    end: int
    """How many tokens the sequence has up to the last of these."""
    plain: bool = False
    """Known without a look at the tensors: every token is valid and on the trunk, so that all that follow see it."""
    one_block: bool = False
    """Known likewise: all are one block on one branch, so that its valid tokens all see the same."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Layout":
        """Each of its tensors changed alike."""
        return replace(self, **{name: change(getattr(self, name)) for name in _TENSORS})


_TENSORS = ("valid", "block", "branch", "position")


def joined(layouts: Sequence[Layout]) -> Layout:
    """Those of sequences that follow each other, as one."""
    whole = {name: torch.cat([getattr(one, name) for one in layouts], dim=1) for name in _TENSORS}
    return Layout(**whole, end=layouts[-1].end, plain=all(one.plain for one in layouts), one_block=False)


def chosen(x: Tensor, which: int | Tensor) -> Tensor:
    """Of a sequence [B, T, …]: its last `which` tokens, or of each row the one at index `which` [B]."""
    if isinstance(which, int):
        return x if which == x.shape[1] else x[:, -which:]
    return x[torch.arange(len(which), device=which.device), which][:, None]


def lay_out(
    past: Sequence[Layout],
    valid_BT: Tensor,
    starts_block_BT: Tensor,
    branch_BT: Tensor | None = None,
    position_BT: Tensor | None = None,
    *,
    all_valid: bool = False,
    one_block: bool = False,
) -> Layout:
    """The layout of tokens that continue `past`; all on the trunk without branches. Positions are counted unless they
    are given."""
    block_BT, on_trunk = starts_block_BT.long().cumsum(dim=1), branch_BT is None
    block_BT = block_BT + past[-1].block[:, -1:] if past else block_BT
    branch_BT = torch.zeros_like(block_BT) if branch_BT is None else branch_BT
    if position_BT is None:
        valid_BS = torch.cat([*(one.valid for one in past), valid_BT], dim=1)
        branch_BS = torch.cat([*(one.branch for one in past), branch_BT], dim=1)
        if on_trunk:
            position_BT = (valid_BS & (branch_BS == 0)).cumsum(dim=1)[:, -valid_BT.shape[1] :] - 1
        else:
            # Index of each token among the valid ones of its own path, up to and including itself.
            index_S = torch.arange(valid_BS.shape[1], device=valid_BS.device)
            not_after_TS = index_S[None, :] <= index_S[-valid_BT.shape[1] :, None]
            seen_BTS = _same_path(branch_BT, branch_BS) & valid_BS[:, None, :] & not_after_TS
            position_BT = seen_BTS.sum(dim=-1) - 1
    tensors = {"valid": valid_BT, "block": block_BT, "branch": branch_BT, "position": position_BT}
    end = valid_BT.shape[1] + (past[-1].end if past else 0)
    return Layout(**tensors, end=end, plain=all_valid and on_trunk, one_block=one_block)


def attention_mask(query: Layout, key: Layout) -> Tensor:
    """bool [B, T, S], true where query token t may attend to key token s. Invalid tokens attend to nothing."""
    in_order_BTS = key.block[:, None, :] <= query.block[:, :, None]
    both_valid_BTS = key.valid[:, None, :] & query.valid[:, :, None]
    return in_order_BTS & _same_path(query.branch, key.branch) & both_valid_BTS


def _same_path(query_BT: Tensor, key_BS: Tensor) -> Tensor:
    return (key_BS[:, None, :] == 0) | (key_BS[:, None, :] == query_BT[:, :, None])


def mask_for(query: Layout, key: Layout, dtype: torch.dtype) -> Mask:
    """Which keys each query sees, for `attend`."""
    device, memory = query.valid.device, 0
    if query.valid.shape[1] >= FLEX_QUERIES and device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if memory >= FLEX_SHARED_MEMORY:
        return flex_mask(query, key)
    return bias_for(attention_mask(query, key), dtype)


def bias_for(sees_BTS: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, S]"""
    zero = torch.zeros((), dtype=dtype, device=sees_BTS.device)
    return torch.where(sees_BTS, zero, MASKED)[:, None]


def flex_mask(query: Layout, key: Layout) -> BlockMask:
    """`attention_mask` as a function of the indices, and which blocks of queries and keys it leaves out."""

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        same_path = (key.branch[b, s] == 0) | (key.branch[b, s] == query.branch[b, t])
        return same_path & (key.block[b, s] <= query.block[b, t]) & key.valid[b, s] & query.valid[b, t]

    (b, t), s = query.valid.shape, key.valid.shape[1]
    make = _compiled(create_block_mask) if query.valid.is_cuda else create_block_mask
    return make(sees, b, None, t, s, device=query.valid.device)


def attend(q_BTNH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, mask: Mask, *, heads_as_rows: bool = False) -> Tensor:
    """Grouped-query attention [B, T, N·H]; logits and softmax are float32 inside the fused kernel.

    Args:
        heads_as_rows: the query heads of a key head are rows behind each other, token by token; so are the mask's.
    """
    (b, t, n, h), g = q_BTNH.shape, k_BGSH.shape[1]
    if heads_as_rows:
        assert not isinstance(mask, BlockMask), "a mask of tokens, not of rows"
        rows = q_BTNH.view(b, t, g, n // g, h).transpose(1, 2).reshape(b, g, t * (n // g), h)
        attended = F.scaled_dot_product_attention(rows, k_BGSH, v_BGSH, attn_mask=mask)
        return attended.view(b, g, t, n // g, h).transpose(1, 2).reshape(b, t, n * h)
    q_BNTH = q_BTNH.transpose(1, 2)
    if isinstance(mask, BlockMask):
        # A compiled block compiles this too; outside of one it is compiled by itself.
        outside = q_BNTH.is_cuda and not torch.compiler.is_compiling()
        flex = _compiled(flex_attention) if outside else flex_attention
        attended = flex(q_BNTH, k_BGSH, v_BGSH, block_mask=mask, enable_gqa=True)
    else:
        # With one key/value head, as in every released size, the repeated heads are a view.
        k_BNSH, v_BNSH = (x[:, :, None].expand(-1, -1, n // g, -1, -1).flatten(1, 2) for x in (k_BGSH, v_BGSH))
        attended = F.scaled_dot_product_attention(q_BNTH, k_BNSH, v_BNSH, attn_mask=mask)
    return attended.transpose(1, 2).flatten(2)


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, **many_variants())
