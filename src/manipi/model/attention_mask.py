"""The one visibility rule of every policy: blocks in order, branches apart.

A token sees every valid token of its own block and of the blocks before. `starts_block` marks where a block begins:

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

Shape suffixes: B batch, T query tokens, S key tokens.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


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
    plain: bool = False
    """Known without a look at the tensors: every token is valid and on the trunk, so that all that follow see it."""

    def then(self, later: Self) -> "Layout":
        """This sequence followed by a later one."""
        return Layout(
            valid=torch.cat([self.valid, later.valid], dim=1),
            block=torch.cat([self.block, later.block], dim=1),
            branch=torch.cat([self.branch, later.branch], dim=1),
            position=torch.cat([self.position, later.position], dim=1),
            plain=self.plain and later.plain,
        )

    def last(self, num_tokens: int) -> "Layout":
        """Its last tokens alone."""
        tensors = (self.valid, self.block, self.branch, self.position)
        valid, block, branch, position = (x_BT[:, -num_tokens:] for x_BT in tensors)
        return Layout(valid=valid, block=block, branch=branch, position=position, plain=self.plain)


def lay_out(
    past: Layout | None,
    valid_BT: Tensor,
    starts_block_BT: Tensor,
    branch_BT: Tensor | None = None,
    position_BT: Tensor | None = None,
) -> Layout:
    """The layout of tokens that continue `past`; all on the trunk without branches. Positions are counted unless they
    are given."""
    block_BT, branches_BT = starts_block_BT.long().cumsum(dim=1), branch_BT
    if branches_BT is None:
        branches_BT = torch.zeros_like(block_BT)
    valid_BS, branch_BS = valid_BT, branches_BT
    if past is not None:
        block_BT = block_BT + past.block[:, -1:]
        valid_BS = torch.cat([past.valid, valid_BT], dim=1)
        branch_BS = torch.cat([past.branch, branches_BT], dim=1)
    if position_BT is None and branch_BT is None:
        position_BT = (valid_BS & (branch_BS == 0)).cumsum(dim=1)[:, -valid_BT.shape[1] :] - 1
    if position_BT is None:
        position_BT = _count_positions(branches_BT, valid_BS, branch_BS)
    return Layout(valid=valid_BT, block=block_BT, branch=branches_BT, position=position_BT)


def attention_mask(query: Layout, key: Layout) -> Tensor:
    """bool [B, T, S], true where query token t may attend to key token s. Invalid tokens attend to nothing."""
    in_order_BTS = key.block[:, None, :] <= query.block[:, :, None]
    both_valid_BTS = key.valid[:, None, :] & query.valid[:, :, None]
    return in_order_BTS & _same_path(query.branch, key.branch) & both_valid_BTS


def _same_path(query_BT: Tensor, key_BS: Tensor) -> Tensor:
    return (key_BS[:, None, :] == 0) | (key_BS[:, None, :] == query_BT[:, :, None])


def _count_positions(branch_BT: Tensor, valid_BS: Tensor, branch_BS: Tensor) -> Tensor:
    """Index of each of the last T tokens among the valid tokens of its own path, up to and including itself."""
    (_, t), (_, s) = branch_BT.shape, branch_BS.shape
    index_S = torch.arange(s, device=branch_BS.device)
    not_after_TS = index_S[None, :] <= index_S[s - t :, None]
    return (_same_path(branch_BT, branch_BS) & valid_BS[:, None, :] & not_after_TS).sum(dim=-1) - 1
