"""The algorithm of π0-FAST: next-token loss, and decoding with a cache.

Actions are tokens that the language model writes behind its prompt; there are no parameters beside its own:

    training    images | prompt | "Action: " codes "|" EOS      each of these predicts the next, all at once
    decoding    images | prompt | ─▶ "Action: " ─▶ code ─▶ code ─▶ … ─▶ "|" ─▶ EOS

Shape suffixes: B batch, T sequence tokens, P image tokens, L prompt tokens, V vocabulary, D width,
N codes of all samples, P here also the places of codes, S ids of a place.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from manipi.model.attention import Layout, joined
from manipi.model.config import Compat, FixedCodes
from manipi.model.gemma import Gemma, KeysValues, KVCache, Span

Allowed: TypeAlias = Callable[[Sequence[int]], np.ndarray]
"""The ids decoded so far in a row to the ids that may follow, for constrained decoding."""


# The loss ------------------------------------------------------------------------------------------------------------


class TokenLoss(NamedTuple):
    """The next-token loss; a tuple, because sharding hooks look for gradients inside those."""

    loss: Float[Tensor, ""]
    """Mean over the samples."""
    per_sample: Float[Tensor, "B"]
    """Mean cross-entropy over the sample's loss tokens, in nats; zero for a sample without any. Of fixed codes: beyond
    that of the targets themselves, which are spread."""
    weight: Float[Tensor, ""]
    """How many samples count, to average over batches exactly."""
    accuracy: Float[Tensor, ""]
    """Share of a sample's loss tokens that are the most likely ones; mean over the samples."""


def token_loss(
    gemma: Gemma,
    prefix: Span,
    tokens_BL: Int64[Tensor, "B L"],
    token_loss_BL: Bool[Tensor, "B L"],
    codes: FixedCodes | None = None,
) -> TokenLoss:
    """Cross-entropy of each loss token given everything before it.

    Args:
        prefix: image tokens followed by the embedded `tokens_BL`, or by what is shown instead of them.
        codes: only these are learned, each among those of its place.
    """
    out_BLD = prompt_output(gemma, prefix, tokens_BL.shape[1])
    per_sample_B, hits_B = per_sample(gemma, out_BLD, tokens_BL[:, 1:], token_loss_BL[:, 1:], codes)
    weight = torch.tensor(float(len(per_sample_B)), device=per_sample_B.device)
    return TokenLoss(per_sample_B.mean(), per_sample_B, weight, hits_B.mean())


def per_sample(
    gemma: Gemma, out_BLD: Tensor, targets_BL: Tensor, counts_BL: Tensor, codes: FixedCodes | None = None
) -> tuple[Tensor, Tensor]:
    """Of each sample the mean cross-entropy of the targets that count, and the share of them that are the likeliest.

    Args:
        out_BLD: row i predicts target i.
        codes: only these count, each among those of its place.
    """
    # Only the loss tokens meet the vocabulary: the logits of a full batch would be the largest tensor of all.
    if codes is None:
        logits, targets = gemma.logits(out_BLD[counts_BL]), targets_BL[counts_BL]
        losses = F.cross_entropy(logits, targets, reduction="none")
    else:
        counts_BL = counts_BL & _among(targets_BL, codes)
        logits, targets, losses = code_losses(gemma, out_BLD[counts_BL], targets_BL[counts_BL], codes)
    per_sample_B = _mean_per_sample(losses, counts_BL)
    return per_sample_B, _mean_per_sample((logits.detach().argmax(-1) == targets).float(), counts_BL)


def code_losses(
    gemma: Gemma, out_ND: Float[Tensor, "N D"], ids_N: Int64[Tensor, "N"], codes: FixedCodes
) -> tuple[Float[Tensor, "N S"], Int64[Tensor, "N"], Float[Tensor, "N"]]:
    """Of each code the logits of its place, which of them it is, and its loss.

    The loss is the divergence from the spread target (Kullback and Leibler 1951): the cross-entropy minus the least
    that it could be, so that 0 is perfect at any softness.
    """
    place_N, code_N = (ids_N - codes.first_id) // codes.per_place, (ids_N - codes.first_id) % codes.per_place - 1
    among = torch.arange(codes.first_id, codes.end_id, device=ids_N.device)
    logits_NPS = gemma.logits(out_ND, among).unflatten(-1, (codes.places, codes.per_place))
    # The first id of a place is neutral.
    logits_NS = logits_NPS[torch.arange(len(ids_N), device=ids_N.device), place_N, 1:]
    if not codes.softness:
        return logits_NS, code_N, F.cross_entropy(logits_NS, code_N, reduction="none")
    distance_NS = torch.arange(codes.per_place - 1, device=ids_N.device) - code_N[:, None]
    target_NS = (-0.5 * (distance_NS / codes.softness) ** 2).log_softmax(-1)
    losses_N = F.kl_div(logits_NS.log_softmax(-1), target_NS, reduction="none", log_target=True).sum(-1)
    return logits_NS, code_N, losses_N


def hide_codes(tokens_BL: Int64[Tensor, "B L"], hidden_B: Bool[Tensor, "B"], codes: FixedCodes) -> Int64[Tensor, "B L"]:
    """The tokens with neutral ones instead of the codes, in the rows that are hidden."""
    hidden_BL = hidden_B[:, None] & _among(tokens_BL, codes)
    return torch.where(hidden_BL, tokens_BL - (tokens_BL - codes.first_id) % codes.per_place, tokens_BL)


def _among(ids_BL: Tensor, codes: FixedCodes) -> Tensor:
    return (ids_BL >= codes.first_id) & (ids_BL < codes.end_id)


def _mean_per_sample(values: Tensor, counts_BL: Tensor) -> Tensor:
    """Means [B] of what stands, one after the other, at the places that count; 0 where none does."""
    values_BL = torch.zeros(counts_BL.shape, dtype=values.dtype, device=values.device).masked_scatter(counts_BL, values)
    return values_BL.sum(1) / counts_BL.sum(1).clamp(min=1)


def prompt_output(gemma: Gemma, prefix: Span, prompt_len: int) -> Float[Tensor, "B L-1 D"]:
    """Row i predicts prompt token i+1. The last token predicts nothing and is left out."""
    inputs = {name: value[:, :-1] for name, value in vars(prefix).items() if isinstance(value, Tensor)}
    return gemma({"vlm": dataclasses.replace(prefix, **inputs)}, last=prompt_len - 1)["vlm"]


@dataclasses.dataclass(frozen=True)
class TokenDraws:
    """How a row's tokens are drawn."""

    temperature: float
    seed: int
    """Token n is drawn by this and n alone, whatever else is in the batch."""


# Decoding ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(
    gemma: Gemma,
    prefix: Span,
    cache: KVCache,
    max_tokens: int,
    *,
    eos_token: int,
    compat: Compat,
    allowed: Allowed | None = None,
    draws: Sequence[TokenDraws | None] | None = None,
) -> Int64[Tensor, "B max_tokens"]:
    """The most likely next token of those that are allowed, or one that is drawn, again and again. A row is complete at
    its first EOS; zeros follow it.

    Prompts may be ragged and cameras missing: the cache knows what is valid. A token runs through the layers only once
    something is to be chosen after it, so that forced tokens wait and go together, and those at the end never go. Of
    the vocabulary only the ids that are allowed meet the output.
    """
    device, dtype = prefix.valid_BT.device, prefix.tokens_BTD.dtype
    last_B, after_B1 = last_valid(prefix.valid_BT), prefix.valid_BT.sum(1, keepdim=True)
    # Known to be the last token, it needs no index.
    out_B1D = gemma({"vlm": prefix}, cache, commit=True, last=1 if prefix.all_valid else last_B)["vlm"]
    if compat.fast_contiguous_cache:
        # The reference takes the last slots for the valid ones, as many as are valid.
        whole, last_slot_B1 = joined(cache.layouts), max_tokens + last_B[:, None]
        slot_T = torch.arange(whole.valid.shape[1], device=device)
        seen_BT = (slot_T <= last_slot_B1) & (slot_T > last_slot_B1 - after_B1)
        cache.layouts = (dataclasses.replace(whole, valid=seen_BT),)
    ids: list[list[int]] = [[] for _ in last_B]
    ran = 0

    def ended(row: list[int]) -> bool:
        return row[-1:] == [eos_token] if compat.fast_writes_past_eos else eos_token in row

    while len(ids[0]) < max_tokens and not all(map(ended, ids)):
        over = [ended(row) and not compat.fast_writes_past_eos for row in ids]
        choices = [
            np.zeros(1, np.int64) if done else None if allowed is None else allowed(row)
            for row, done in zip(ids, over, strict=True)
        ]
        if ran < len(ids[0]) and any(choice is None or len(choice) > 1 for choice in choices):
            waiting_BT = torch.tensor([row[ran:] for row in ids], device=device)
            first = ran + compat.fast_position_offset
            step_T = torch.arange(first, first + waiting_BT.shape[1], device=device)
            tokens = next_tokens(gemma, waiting_BT, after_B1 + step_T, dtype)
            out_B1D, ran = gemma({"vlm": tokens}, cache, commit=True, last=1)["vlm"], len(ids[0])
        logits = gemma.logits(out_B1D[:, 0]) if any(choice is None for choice in choices) else out_B1D
        for index, choice in enumerate(choices):
            draw = draws[index] if draws is not None else None
            if choice is None:
                ids[index].append(_choose(logits[index], draw, len(ids[index])))
            elif len(choice) == 1:
                ids[index].append(int(choice[0]))
            else:
                among = gemma.logits(out_B1D[index, 0], torch.from_numpy(choice).to(device))
                ids[index].append(int(choice[_choose(among, draw, len(ids[index]))]))
    return torch.tensor([row + [0] * (max_tokens - len(row)) for row in ids], dtype=torch.long, device=device)


def _choose(logits_V: Tensor, draw: TokenDraws | None, position: int) -> int:
    """The likeliest, or one by its probability: the largest of logits / temperature with Gumbel noise (Gumbel 1954)."""
    if draw is None:
        return int(logits_V.argmax())
    noise = np.random.default_rng((draw.seed, position)).gumbel(size=len(logits_V))
    return int((logits_V.float().cpu().numpy() / draw.temperature + noise).argmax())


def next_tokens(gemma: Gemma, ids_BT: Tensor, position_BT: Int64[Tensor, "B T"], dtype: torch.dtype) -> Span:
    """Tokens each of which sees those before it."""
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    return Span(
        tokens_BTD=gemma.embed(ids_BT, dtype),
        valid_BT=real_BT,
        starts_block_BT=real_BT,
        position_BT=position_BT,
        all_valid=True,
        one_block=ids_BT.shape[1] == 1,
    )


def last_valid(valid_BT: Bool[Tensor, "B T"]) -> Int64[Tensor, "B"]:
    """Index of each row's last valid token."""
    return valid_BT.shape[1] - 1 - valid_BT.flip(1).long().argmax(1)


def reference_cache(gemma: Gemma, prefix: Span, num_slots: int) -> KVCache:
    """The reference reserves one zero slot per token to come, and lets padding average over those too."""
    (b, _), device = prefix.valid_BT.shape, prefix.valid_BT.device
    nothing = torch.zeros(b, num_slots, dtype=torch.long, device=device)
    shape = (b, gemma.size.num_kv_heads, num_slots, gemma.size.head_dim)
    zeros = torch.zeros(shape, dtype=prefix.tokens_BTD.dtype, device=device)
    layout = Layout(valid=nothing.bool(), block=nothing, branch=nothing, position=nothing, end=num_slots)
    return KVCache(layouts=(layout,), layers=dict.fromkeys(range(len(gemma.blocks)), KeysValues(zeros, zeros)))
