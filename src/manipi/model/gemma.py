"""Gemma (Gemma Team 2024), generalised to several experts that share one attention.

Each *span* of tokens belongs to one named expert with its own width and weights; in every layer all spans attend over
common keys and values. Spans run in order, and a span sees itself, the spans before it and the cache, never a later
span; within that, `attention_mask` decides:

            cache          "vlm"          "action"
          ┌────────┐    ┌──────────┐    ┌───────────┐
    keys  │ prefix │ ·· │  prompt  │ ·· │  actions  │
          └────────┘    └──────────┘    └───────────┘
               ▲─────────────┘                │
               ▲───────────────▲──────────────┘

The residual stream is float32 and matrices compute in the dtype of the spans' tokens, so that under bfloat16 the
roundings of one layer do not add up over the next ones. The norms have it in float32 anyway, and would save that copy
for backward.

Shape suffixes: B batch, T query tokens, S key tokens, D expert width, C conditioning rows, N query heads,
G key/value heads, H head dim.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from manipi.model.attention import Mask, attend, mask_for
from manipi.model.attention_mask import Layout, lay_out
from manipi.model.config import NO_ADAPTERS, Adapters, GemmaSize, LoRA
from manipi.model.layers import ZeroLinear
from manipi.model.lora import linear

KeysValues = tuple[Tensor, Tensor]
"""One layer's rotated keys and values, each [B, S, G, H]."""


@dataclass(frozen=True, kw_only=True)
class Expert:
    """What sets one expert apart from another."""

    size: GemmaSize
    adapters: Adapters = NO_ADAPTERS
    adaptive_norm: bool = False
    """Norms are modulated by `Span.cond_BCD`."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A run of embedded tokens that belongs to one expert."""

    tokens_BTD: Tensor
    valid_BT: Tensor
    starts_block_BT: Tensor
    cond_BCD: Tensor | None = None
    """Conditioning of an expert with adaptive norms: row c conditions the c-th run of T/C tokens, so that C is 1 for
    one timestep per span, and the number of branches for one per branch."""
    clean_BT: Tensor | None = None
    """Tokens that are given clean, wherever they stand: an additional last row of `cond_BCD` conditions them."""
    branch_BT: Tensor | None = None
    """None: all on the trunk."""
    position_BT: Tensor | None = None
    """None: counted along the token's path."""
    plain: bool = False
    """Known without a look at the tensors: every token is valid, and all are one block on one branch."""

    def follow(self, past: Layout | None) -> Layout:
        """Where these tokens stand when they continue `past`."""
        layout = lay_out(past, self.valid_BT, self.starts_block_BT, self.branch_BT, self.position_BT)
        return replace(layout, plain=self.plain and self.branch_BT is None)


@dataclass(kw_only=True)
class KVCache:
    """Keys and values of every layer, and the layout of their tokens, so that no caller ever builds a mask."""

    layout: Layout | None = None
    layers: dict[int, KeysValues] = field(default_factory=dict)


class Conditioning(NamedTuple):
    """What modulates adaptive norms, as in `Span`."""

    rows_BCD: Tensor
    clean_BT: Tensor | None

    def per_token(self, rows_BCX: Tensor, num_tokens: int) -> Tensor:
        """Each token's own of what was made of the rows. A single row is left to broadcasting."""
        clean_BT = self.clean_BT
        runs_BCX = rows_BCX if clean_BT is None else rows_BCX[:, :-1]
        c = runs_BCX.shape[1]
        assert num_tokens % c == 0, f"{c} conditioning rows cannot be shared out among {num_tokens} tokens"
        runs_BCX = runs_BCX if c == 1 else runs_BCX.repeat_interleave(num_tokens // c, dim=1)
        return runs_BCX if clean_BT is None else torch.where(clean_BT[..., None], rows_BCX[:, -1:], runs_BCX)


class RMSNorm(nn.Module):
    """`x / rms(x) · (1 + scale)`, in and out in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))

    def init_weights(self, generator: Generator | None) -> None:
        nn.init.zeros_(self.scale)

    def forward(self, x_BTD: Tensor, cond: Conditioning | None) -> tuple[Tensor, Tensor | None]:
        return F.rms_norm(x_BTD, self.scale.shape, 1 + self.scale.float(), eps=1e-6), None


class AdaptiveRMSNorm(nn.Module):
    """`x / rms(x) · (1 + scale) + shift`, with scale, shift and the residual's gate linear in the conditioning.

    In and out in float32, but for the conditioning, which the modulation computes in its own dtype.
    """

    def __init__(self, width: int):
        super().__init__()
        self.modulation = ZeroLinear(width, 3 * width)

    def forward(self, x_BTD: Tensor, cond: Conditioning | None) -> tuple[Tensor, Tensor | None]:
        assert cond is not None, "an expert with adaptive norms needs Span.cond_BCD"
        rows = cond.per_token(self.modulation(cond.rows_BCD).float(), x_BTD.shape[1])
        scale, shift, gate = rows.chunk(3, dim=-1)
        return F.rms_norm(x_BTD, x_BTD.shape[-1:], eps=1e-6) * (1 + scale) + shift, gate


class MLP(nn.Module):
    """Gated MLP with tanh GELU (GeGLU, Shazeer 2020)."""

    def __init__(self, size: GemmaSize, lora: LoRA | None):
        super().__init__()
        self.gate_proj = linear(size.width, size.mlp_dim, lora)
        self.up_proj = linear(size.width, size.mlp_dim, lora)
        self.down_proj = linear(size.mlp_dim, size.width, lora)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x_BTD), approximate="tanh") * self.up_proj(x_BTD))


class ExpertLayer(nn.Module):
    """One expert's weights in one layer. The attention that joins the experts lives in `Block`."""

    def __init__(self, config: Expert):
        super().__init__()
        size, lora = config.size, config.adapters.attention
        norm = AdaptiveRMSNorm if config.adaptive_norm else RMSNorm
        width, heads, kv_heads = size.width, size.num_heads, size.num_kv_heads
        self.head_dim = size.head_dim
        self.attention_norm = norm(width)
        self.q_proj = linear(width, heads * size.head_dim, lora, heads)
        self.k_proj = linear(width, kv_heads * size.head_dim, lora, kv_heads)
        self.v_proj = linear(width, kv_heads * size.head_dim, lora, kv_heads)
        self.out_proj = linear(heads * size.head_dim, width, lora, heads, "shared")
        self.mlp_norm = norm(width)
        self.mlp = MLP(size, config.adapters.feed_forward)

    def project(
        self, x_BTD: Tensor, cond: Conditioning | None, dtype: torch.dtype, *, queries: int
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """Queries [B, queries, N, H] of the last tokens, keys and values [B, T, G, H] of all, and the gate of the
        attention residual."""
        normed_BTD, gate = self.attention_norm(x_BTD, cond)
        normed_BTD = normed_BTD.to(dtype)
        q = self._heads(self.q_proj(normed_BTD[:, -queries:])) if queries else None
        return q, self._heads(self.k_proj(normed_BTD)), self._heads(self.v_proj(normed_BTD)), gate

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def finish(self, x_BTD: Tensor, attended_BTNH: Tensor, gate: Tensor | None, cond: Conditioning | None) -> Tensor:
        """The two residuals: attention output, then MLP."""
        x_BTD = _residual(x_BTD, self.out_proj(attended_BTNH.flatten(-2)), gate)
        normed_BTD, gate = self.mlp_norm(x_BTD, cond)
        return _residual(x_BTD, self.mlp(normed_BTD.to(attended_BTNH.dtype)), gate)


def _residual(x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    return x + (update if gate is None else update * gate)


class Geometry(NamedTuple):
    """Where a span's tokens stand, in the form that attention needs; computed once for all layers."""

    rope: tuple[Tensor, Tensor]
    """Cosines and sines of the tokens' rotations, each [B, T, 1, H/2]."""
    mask: Mask
    """Of the queries that are wanted."""
    dtype: torch.dtype
    """The one to compute in."""


class Block(nn.Module):
    """One layer of all experts. It is the unit of sharding: experts that share attention are gathered together.

    Its arguments and results are plain containers of tensors, because sharding hooks look for gradients inside those.
    """

    def __init__(self, experts: Mapping[str, ExpertLayer]):
        super().__init__()
        self.experts = nn.ModuleDict(experts)

    def forward(
        self,
        xs: dict[str, Tensor],
        conds: dict[str, Conditioning | None],
        geometries: dict[str, Geometry],
        past: KeysValues | None,
        *,
        insulate: bool,
        outputs: Mapping[str, int],
    ) -> tuple[dict[str, Tensor], KeysValues]:
        """After this layer, as many of each span's last tokens as `outputs` says, and all keys and values so far."""
        results, seen = {}, past
        for name, x_BTD in xs.items():
            expert, cond, geometry, wanted = self._expert(name), conds[name], geometries[name], outputs.get(name, 0)
            q, k, v, gate = expert.project(x_BTD, cond, geometry.dtype, queries=wanted)
            k = rotate(k, geometry.rope)
            if seen is not None:
                before_k, before_v = (seen[0].detach(), seen[1].detach()) if insulate else seen
                k, v = torch.cat([before_k, k], dim=1), torch.cat([before_v, v], dim=1)
            seen = (k, v)
            if q is not None:
                cos, sin = geometry.rope
                attended = attend(rotate(q, (cos[:, -wanted:], sin[:, -wanted:])), k, v, geometry.mask)
                results[name] = expert.finish(x_BTD[:, -wanted:], attended, gate, cond)
        assert seen is not None, "a forward pass without spans"
        return results, seen

    def _expert(self, name: str) -> ExpertLayer:
        expert = self.experts[name]
        assert isinstance(expert, ExpertLayer)
        return expert


class Gemma(nn.Module):
    """A decoder whose tokens are routed to experts by the span they belong to, not by a learned router.

    Args:
        experts: by name; the first owns the token embedding.
        vocab_size: rows of the token embedding.
    """

    def __init__(self, experts: Mapping[str, Expert], vocab_size: int):
        super().__init__()
        first = next(iter(experts.values())).size
        self.width, self.head_dim = first.width, first.head_dim
        self.kv_shape = (first.num_kv_heads, first.head_dim)
        self.token_embedding = nn.Parameter(torch.empty(vocab_size, first.width))
        self.sparse_embedding_gradient = False
        self.blocks = nn.ModuleList(
            Block({name: ExpertLayer(expert) for name, expert in experts.items()}) for _ in range(first.depth)
        )
        self.final_norms = nn.ModuleDict(
            {name: (AdaptiveRMSNorm if e.adaptive_norm else RMSNorm)(e.size.width) for name, e in experts.items()}
        )

    def init_weights(self, generator: Generator | None) -> None:
        nn.init.normal_(self.token_embedding, std=self.width**-0.5, generator=generator)

    def embed(self, ids_BT: Int[Tensor, "B T"], dtype: torch.dtype) -> Float[Tensor, "B T D"]:
        """Token embeddings times √width. The factor is rounded to the table's own dtype, as in the reference."""
        return embed_tokens(self.token_embedding, ids_BT, dtype, sparse=self.sparse_embedding_gradient)

    def logits(self, x: Float[Tensor, "*any D"]) -> Float[Tensor, "*any V"]:
        """float32 logits over the vocabulary, by the transposed token embedding.

        They are float32 under bfloat16 compute too: 8 bits of mantissa would tie the best tokens with each other.
        """
        return F.linear(x.float(), self.token_embedding.float())

    def forward(
        self,
        spans: Mapping[str, Span],
        cache: KVCache | None = None,
        *,
        commit: bool = False,
        insulate: bool = False,
        outputs: Collection[str] | None = None,
        last: int | None = None,
    ) -> dict[str, Tensor]:
        """Run each span through its expert, after what is in the cache.

        Args:
            spans: by expert name, in the order of the sequence.
            cache: the sequence that the spans continue.
            commit: append the spans to the cache (prefill, autoregressive steps). Without it the same suffix can
                run again after an unchanged prefix (flow-matching steps).
            insulate: no gradient flows from a span into the keys and values of what came before it
                (knowledge insulation, Driess et al. 2025).
            outputs: names of the spans whose result is wanted, all by default. In the last layer the others
                contribute keys and values only, which saves their attention and MLP.
            last: how many of the last tokens of those spans are wanted, all by default; likewise.

        Returns:
            The wanted tokens after the final norm, each [B, T, D], in float32.
        """
        lengths = {name: span.tokens_BTD.shape[1] for name, span in spans.items()}
        wanted = {name: lengths[name] if last is None else last for name in (lengths if outputs is None else outputs)}
        geometries, of_last, layout = self._place(spans, None if cache is None else cache.layout, wanted)
        xs = {name: span.tokens_BTD.float() for name, span in spans.items()}
        conds = {
            n: None if s.cond_BCD is None else Conditioning(s.cond_BCD.to(s.tokens_BTD.dtype), s.clean_BT)
            for n, s in spans.items()
        }
        for index, block in enumerate(self.blocks):
            past = None if cache is None else cache.layers.get(index)
            where, needed = (of_last, wanted) if index == len(self.blocks) - 1 else (geometries, lengths)
            xs, keys_values = block(xs, conds, where, past, insulate=insulate, outputs=needed)
            if commit:
                assert cache is not None, "nothing to commit to"
                cache.layers[index] = keys_values
        if cache is not None and commit:
            cache.layout = layout
        return {name: self.final_norms[name](x, conds[name])[0] for name, x in xs.items()}

    def _place(
        self, spans: Mapping[str, Span], past: Layout | None, wanted: Mapping[str, int]
    ) -> tuple[dict[str, Geometry], dict[str, Geometry], Layout | None]:
        """Where the spans stand; the same in the last layer, where less may be wanted; and what the cache gets."""
        geometries, of_last, seen = {}, {}, past
        for name, span in spans.items():
            own, (_, t, _), dtype = span.follow(seen), span.tokens_BTD.shape, span.tokens_BTD.dtype
            sees_all = span.plain and (seen is None or seen.plain)
            seen = own if seen is None else seen.then(own)
            mask = None if sees_all else mask_for(own, seen, dtype)
            geometries[name] = of_last[name] = Geometry(rope(own.position, self.head_dim), mask, dtype)
            if mask is not None and 0 < wanted.get(name, 0) < t:
                of_last[name] = geometries[name]._replace(mask=mask_for(own.last(wanted[name]), seen, dtype))
        return geometries, of_last, seen


def embed_tokens(table_VD: Tensor, ids_BT: Tensor, dtype: torch.dtype, *, sparse: bool = False) -> Tensor:
    """`Gemma.embed`, with any table; `sparse`: its gradient has rows for `ids_BT` alone."""
    factor = torch.tensor(table_VD.shape[1] ** 0.5, dtype=table_VD.dtype).float()
    return (F.embedding(ids_BT, table_VD, sparse=sparse).float() * factor).to(dtype)


def rope(position: Int[Tensor, "B T"], head_dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles `position · base^(−2i/head_dim)` (Su et al. 2021), each [B, T, 1, H/2]."""
    exponent = torch.arange(head_dim // 2, device=position.device, dtype=torch.float32) * (2.0 / head_dim)
    angle = position[..., None, None].float() / base**exponent
    return angle.cos(), angle.sin()


def rotate(x_BTNH: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the two halves of each head against each other, in float32: `(a, b) → (a cos − b sin, b cos + a sin)`."""
    cos, sin = rope
    a, b = x_BTNH.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_BTNH.dtype)
