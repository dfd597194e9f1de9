"""The token head of π0-FAST: next-token loss, and greedy decoding with a cache. It has no parameters of its own.

Shape suffixes: B batch, T sequence tokens, P image tokens, L prompt tokens, V vocabulary, D width.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from manipi.model.attention_mask import Layout
from manipi.model.config import Compat
from manipi.model.gemma import Gemma, KVCache, Span

AllowedNext = Callable[[Int64[Tensor, "B steps"]], Bool[Tensor, "B V"]]
"""The ids decoded so far to the ids that may follow, for constrained decoding."""


class TokenLoss(NamedTuple):
    """The next-token loss; a tuple, because sharding hooks look for gradients inside those."""

    loss: Float[Tensor, ""]
    """Mean over the samples."""
    per_sample: Float[Tensor, "B"]
    """Mean cross-entropy over the sample's loss tokens, in nats; zero for a sample without any."""
    weight: Float[Tensor, ""]
    """How many samples count, to average over batches exactly."""
    accuracy: Float[Tensor, ""]
    """Share of a sample's loss tokens that are the most likely ones; mean over the samples."""


def token_loss(
    gemma: Gemma, prefix: Span, tokens_BL: Int64[Tensor, "B L"], token_loss_BL: Bool[Tensor, "B L"]
) -> TokenLoss:
    """Cross-entropy of each loss token given everything before it.

    Args:
        prefix: image tokens followed by the embedded `tokens_BL`.
    """
    out_BLD = prompt_output(gemma, prefix, tokens_BL.shape[1])
    targets_BL, counts_BL = tokens_BL[:, 1:], token_loss_BL[:, 1:]
    # Only the loss tokens meet the vocabulary: the logits of a full batch would be the largest tensor of all.
    logits, targets = gemma.logits(out_BLD[counts_BL]), targets_BL[counts_BL]
    per_sample_B = _mean_per_sample(F.cross_entropy(logits, targets, reduction="none"), counts_BL)
    hits_B = _mean_per_sample((logits.detach().argmax(-1) == targets).float(), counts_BL)
    weight = torch.tensor(float(len(per_sample_B)), device=logits.device)
    return TokenLoss(per_sample_B.mean(), per_sample_B, weight, hits_B.mean())


def _mean_per_sample(values: Tensor, counts_BL: Tensor) -> Tensor:
    """Means [B] of what stands, one after the other, at the places that count; 0 where none does."""
    values_BL = torch.zeros(counts_BL.shape, dtype=values.dtype, device=values.device).masked_scatter(counts_BL, values)
    return values_BL.sum(1) / counts_BL.sum(1).clamp(min=1)


def prompt_output(gemma: Gemma, prefix: Span, prompt_len: int) -> Float[Tensor, "B L-1 D"]:
    """Row i predicts prompt token i+1. The last token predicts nothing and is left out."""
    inputs = Span(
        tokens_BTD=prefix.tokens_BTD[:, :-1],
        valid_BT=prefix.valid_BT[:, :-1],
        starts_block_BT=prefix.starts_block_BT[:, :-1],
        position_BT=None if prefix.position_BT is None else prefix.position_BT[:, :-1],
        plain=prefix.plain,
    )
    return gemma({"vlm": inputs}, last=prompt_len - 1)["vlm"]


@torch.no_grad()
def greedy_decode(
    gemma: Gemma,
    prefix: Span,
    max_tokens: int,
    *,
    eos_token: int,
    compat: Compat,
    allowed_next: AllowedNext | None = None,
) -> Int64[Tensor, "B max_tokens"]:
    """The most likely next token, again and again. A row is complete at its first EOS; zeros follow it.

    Prompts may be ragged and cameras missing: the cache knows what is valid.
    """
    dtype = prefix.tokens_BTD.dtype
    cache = _reference_cache(gemma, prefix, max_tokens) if compat.fast_contiguous_cache else KVCache()
    num_wanted = 1 if prefix.plain else prefix.valid_BT.shape[1]
    out_BTD = gemma({"vlm": prefix}, cache, commit=True, last=num_wanted)["vlm"]
    prompt_len_B1 = prefix.valid_BT.sum(1, keepdim=True)
    last_B = last_valid(prefix.valid_BT)
    out_BD = out_BTD[torch.arange(len(last_B), device=last_B.device), last_B - prefix.valid_BT.shape[1]]
    if compat.fast_contiguous_cache:
        _see_last_slots(cache, prompt_len_B1, max_tokens + last_B[:, None])
    ids_BT = torch.zeros(len(last_B), max_tokens, dtype=torch.long, device=last_B.device)
    done_B = torch.zeros_like(last_B, dtype=torch.bool)
    for step in range(max_tokens):
        logits_BV = gemma.logits(out_BD)
        if allowed_next is not None:
            logits_BV = logits_BV.masked_fill(~allowed_next(ids_BT[:, :step]).to(logits_BV.device), -torch.inf)
        next_B = logits_BV.argmax(-1)
        if not compat.fast_writes_past_eos:
            next_B = torch.where(done_B, 0, next_B)
        ids_BT[:, step] = next_B
        done_B = (next_B == eos_token) | (done_B & (not compat.fast_writes_past_eos))
        if step + 1 == max_tokens or done_B.all():
            break
        position_B1 = prompt_len_B1 + step + (1 if compat.fast_position_offset else 0)
        out_BD = gemma({"vlm": _one_token(gemma, ids_BT[:, step], position_B1, dtype)}, cache, commit=True)["vlm"][:, 0]
    return ids_BT


def last_valid(valid_BT: Bool[Tensor, "B T"]) -> Int64[Tensor, "B"]:
    """Index of each row's last valid token."""
    return valid_BT.shape[1] - 1 - valid_BT.flip(1).long().argmax(1)


def _one_token(gemma: Gemma, ids_B: Tensor, position_B1: Tensor, dtype: torch.dtype) -> Span:
    real_B1 = torch.ones_like(position_B1, dtype=torch.bool)
    return Span(
        tokens_BTD=gemma.embed(ids_B[:, None], dtype),
        valid_BT=real_B1,
        starts_block_BT=real_B1,
        position_BT=position_B1,
        plain=True,
    )


def _reference_cache(gemma: Gemma, prefix: Span, num_slots: int) -> KVCache:
    """The reference reserves one zero slot per token to come, and lets padding average over those too."""
    (b, _), device = prefix.valid_BT.shape, prefix.valid_BT.device
    nothing = torch.zeros(b, num_slots, dtype=torch.long, device=device)
    zeros = torch.zeros(b, num_slots, *gemma.kv_shape, dtype=prefix.tokens_BTD.dtype, device=device)
    layout = Layout(valid=nothing.bool(), block=nothing, branch=nothing, position=nothing)
    return KVCache(layout=layout, layers=dict.fromkeys(range(len(gemma.blocks)), (zeros, zeros)))


def _see_last_slots(cache: KVCache, prompt_len_B1: Tensor, last_slot_B1: Tensor) -> None:
    """The reference takes the last slots for the valid ones, as many as are valid."""
    assert cache.layout is not None
    slot_T = torch.arange(cache.layout.valid.shape[1], device=last_slot_B1.device)
    seen_BT = (slot_T <= last_slot_B1) & (slot_T > last_slot_B1 - prompt_len_B1)
    cache.layout = dataclasses.replace(cache.layout, valid=seen_BT)
