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

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from manipi.model.attention import Layout, Mask, attend, chosen, joined, lay_out, mask_for
from manipi.model.config import NO_ADAPTERS, Adapters, GemmaSize, LoRA
from manipi.model.layers import ZeroLinear, linear


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
    cond: "Conditions | None" = None
    """Of an expert with adaptive norms."""
    branch_BT: Tensor | None = None
    """None: all on the trunk."""
    position_BT: Tensor | None = None
    """None: counted along the token's path."""
    all_valid: bool = False
    """Known without a look at the tensors: every token is valid."""
    one_block: bool = False
    """Known likewise: all are one block on one branch."""

    def follow(self, past: Sequence[Layout]) -> Layout:
        """Where these tokens stand when they continue `past`."""
        known = {"all_valid": self.all_valid, "one_block": self.one_block}
        return lay_out(past, self.valid_BT, self.starts_block_BT, self.branch_BT, self.position_BT, **known)


Rotation: TypeAlias = tuple[Tensor, Tensor]
"""Of the tokens' rotary angles, for both halves of a head, [B, T, 1, H]: cosines, and sines with the sign of each."""


class KeysValues(NamedTuple):
    """One layer's rotated keys and values of a sequence."""

    keys_BGSH: Tensor
    values_BGSH: Tensor

    def then(self, k_BGTH: Tensor, v_BGTH: Tensor, *, insulate: bool) -> "KeysValues":
        """Followed by those of more tokens; without a way back for their gradients where they `insulate`."""
        k_BGSH, v_BGSH = (self.keys_BGSH.detach(), self.values_BGSH.detach()) if insulate else self
        return KeysValues(torch.cat([k_BGSH, k_BGTH], dim=2), torch.cat([v_BGSH, v_BGTH], dim=2))


class Past(Protocol):
    """One layer's keys and values of what came before: `KeysValues`, or those of an engine's fixed cache."""

    def then(self, k_BGTH: Tensor, v_BGTH: Tensor, *, insulate: bool) -> KeysValues: ...


@dataclass(kw_only=True)
class KVCache:
    """Keys and values of every layer, and the layouts of their tokens, so that no caller ever builds a mask.

    It grows by concatenation. An engine has one of fixed size with the same methods (`StaticCache`).
    """

    layouts: tuple[Layout, ...] = ()
    """Of one span after the other."""
    layers: dict[int, KeysValues] = field(default_factory=dict)
    heads_as_rows: ClassVar[bool] = False
    """Which form of `attend` reads it."""

    def past(self, index: int) -> Past | None:
        """What the layer has of the tokens so far."""
        return self.layers.get(index)

    def keep(self, index: int, so_far: KeysValues) -> None:
        """Append what the layer has made."""
        self.layers[index] = so_far

    def mask(self, query: Layout, key: Layout, dtype: torch.dtype) -> Mask:
        """For `attend`, of tokens that do not see everything."""
        return mask_for(query, key, dtype)

    def repeated(self, times: int) -> "KVCache":
        """For so many draws behind it, which here are branches of one sequence, and in an engine are rows."""
        return self


class Conditions(Protocol):
    """What modulates adaptive norms: a `Conditioning`, or in an engine what each layer's norms make of it."""

    def of_layer(self, index: int) -> Any:
        """What the norms of that layer are called with; the final norm counts as one more layer."""
        ...


class Conditioning(NamedTuple):
    """What modulates adaptive norms, the same in all layers."""

    rows_BCD: Tensor
    """Row c conditions the c-th run of T/C tokens, so that C is 1 for one timestep per span, and the number of branches
    for one per branch."""
    clean_BT: Tensor | None
    """Tokens that are given clean, wherever they stand: an additional last row conditions them."""

    def of_layer(self, index: int) -> "Conditioning":
        return self

    def per_token(self, rows_BCX: Tensor, num_tokens: int) -> Tensor:
        """Each token's own of what was made of the rows. A single row is left to broadcasting."""
        clean_BT = self.clean_BT
        runs_BCX = rows_BCX if clean_BT is None else rows_BCX[:, :-1]
        c = runs_BCX.shape[1]
        assert num_tokens % c == 0, f"{c} conditioning rows cannot be shared out among {num_tokens} tokens"
        runs_BCX = runs_BCX if c == 1 else runs_BCX.repeat_interleave(num_tokens // c, dim=1)
        return runs_BCX if clean_BT is None else torch.where(clean_BT[..., None], rows_BCX[:, -1:], runs_BCX)


def rms_norm(x_BTD: Tensor, factor: Tensor, shift: Tensor | None = None) -> Tensor:
    """`x / rms(x) · factor + shift`, in and out in float32 (Zhang & Sennrich 2019); factors [D], or of each token."""
    shared = factor.ndim == 1
    normed_BTD = F.rms_norm(x_BTD, x_BTD.shape[-1:], factor if shared else None, eps=1e-6)
    normed_BTD = normed_BTD if shared else normed_BTD * factor
    return normed_BTD if shift is None else normed_BTD + shift


class RMSNorm(nn.Module):
    """`rms_norm` with the factor `1 + scale`."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))

    def init_weights(self, generator: Generator | None) -> None:
        nn.init.zeros_(self.scale)

    def forward(self, x_BTD: Tensor, cond: Conditioning | None) -> tuple[Tensor, Tensor | None]:
        return rms_norm(x_BTD, 1 + self.scale.float()), None


class AdaptiveRMSNorm(nn.Module):
    """`rms_norm` with factor `1 + scale`; scale, shift and the residual's gate are linear in the conditioning.

    In and out in float32, but for the conditioning, which the modulation computes in its own dtype.
    """

    def __init__(self, width: int):
        super().__init__()
        self.modulation = ZeroLinear(width, 3 * width)

    def forward(self, x_BTD: Tensor, cond: Conditioning | None) -> tuple[Tensor, Tensor | None]:
        assert cond is not None, "an expert with adaptive norms needs Span.cond"
        rows = cond.per_token(self.modulation(cond.rows_BCD).float(), x_BTD.shape[1])
        scale, shift, gate = rows.chunk(3, dim=-1)
        return rms_norm(x_BTD, 1 + scale, shift), gate


class MLP(nn.Module):
    """Gated MLP with tanh GELU (GeGLU, Shazeer 2020)."""

    def __init__(self, size: GemmaSize, lora: LoRA | None):
        super().__init__()
        self.gate_proj = linear(size.width, size.mlp_dim, lora)
        self.up_proj = linear(size.width, size.mlp_dim, lora)
        self.down_proj = linear(size.mlp_dim, size.width, lora)

    def gate_up(self, x_BTD: Tensor) -> Sequence[Tensor]:
        """An engine has one matrix for both."""
        return self.gate_proj(x_BTD), self.up_proj(x_BTD)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BTD)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)


class ExpertLayer(nn.Module):
    """One expert's weights in one layer. The attention that joins the experts is in `Block`."""

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

    def qkv(self, x_BTD: Tensor, wanted: int | Tensor, rope: Rotation) -> tuple[Tensor | None, Tensor, Tensor]:
        """Rotated queries [B, T', N, H] of the `chosen` tokens, if any, rotated keys and values [B, T, G, H] of all. An
        engine has one matrix for the three."""
        q, (cos, sin), heads = None, rope, (-1, self.head_dim)
        if isinstance(wanted, Tensor) or wanted:
            q = self.q_proj(chosen(x_BTD, wanted)).unflatten(-1, heads)
            q = rotate(q, (chosen(cos, wanted), chosen(sin, wanted)))
        return q, rotate(self.k_proj(x_BTD).unflatten(-1, heads), rope), self.v_proj(x_BTD).unflatten(-1, heads)

    def finish(self, x_BTD: Tensor, attended_BTX: Tensor, gate: Tensor | None, cond: Conditioning | None) -> Tensor:
        """The two residuals, which norms may gate: attention output, then MLP."""
        update = self.out_proj(attended_BTX)
        x_BTD = x_BTD + (update if gate is None else update * gate)
        normed_BTD, gate = self.mlp_norm(x_BTD, cond)
        # Not called as a module, which costs microseconds: of a small model an engine makes hundreds of such calls.
        update = self.mlp.forward(normed_BTD.to(attended_BTX.dtype))
        return x_BTD + (update if gate is None else update * gate)


class Geometry(NamedTuple):
    """Where a span's tokens stand, in the form that attention needs; computed once for all layers."""

    rope: Rotation
    mask: Mask
    """Of the queries that are wanted."""
    heads_as_rows: bool
    """The form of `attend`."""
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
        past: Past | None,
        *,
        insulate: bool,
        outputs: Mapping[str, int | Tensor],
    ) -> tuple[dict[str, Tensor], KeysValues]:
        """After this layer, those of each span's tokens that `chosen` finds by `outputs`, and all keys and values so
        far."""
        results, seen = {}, past
        for name, x_BTD in xs.items():
            expert, cond, where, wanted = self.experts[name], conds[name], geometries[name], outputs.get(name, 0)
            assert isinstance(expert, ExpertLayer)
            normed_BTD, gate = expert.attention_norm(x_BTD, cond)
            q, k, v = expert.qkv(normed_BTD.to(where.dtype), wanted, where.rope)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            seen = KeysValues(k, v) if seen is None else seen.then(k, v, insulate=insulate)
            if q is not None:
                attended = attend(q, *seen, where.mask, heads_as_rows=where.heads_as_rows)
                results[name] = expert.finish(chosen(x_BTD, wanted), attended, gate, cond)
        assert isinstance(seen, KeysValues), "a forward pass without spans"
        return results, seen


class Placed(NamedTuple):
    """Where all spans of a forward pass stand."""

    geometries: dict[str, Geometry]
    of_last: dict[str, Geometry]
    """In the last layer, where less may be wanted."""
    layouts: tuple[Layout, ...]
    """Of the sequence with them."""


class Gemma(nn.Module):
    """A decoder whose tokens are routed to experts by the span they belong to, not by a learned router.

    Args:
        experts: by name; the first owns the token embedding.
        vocab_size: rows of the token embedding.
    """

    def __init__(self, experts: Mapping[str, Expert], vocab_size: int):
        super().__init__()
        first = next(iter(experts.values())).size
        self.width, self.size = first.width, first
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
        table_VD, sparse = self.token_embedding, self.sparse_embedding_gradient
        factor = torch.tensor(self.width**0.5, dtype=table_VD.dtype).float()
        return (F.embedding(ids_BT, table_VD, sparse=sparse).float() * factor).to(dtype)

    def logits(self, x: Float[Tensor, "*any D"], among: Tensor | None = None) -> Float[Tensor, "*any V"]:
        """float32 logits over the vocabulary, or of some of its ids, by the transposed token embedding.

        They are float32 under bfloat16 compute too: 8 bits of mantissa would tie the best tokens with each other.
        """
        table_VD = self.token_embedding if among is None else self.token_embedding[among]
        return F.linear(x.float(), table_VD.float())

    def forward(
        self,
        spans: Mapping[str, Span],
        cache: KVCache | None = None,
        *,
        commit: bool = False,
        insulate: bool = False,
        outputs: Collection[str] | None = None,
        last: int | Tensor | Mapping[str, int] | None = None,
        placed: Placed | None = None,
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
            last: how many of the last tokens of those spans are wanted, all by default; likewise. Or which one, by row
                [B]; or how many of each span.
            placed: what `place` found for spans of the same layout, to save its work.

        Returns:
            The wanted tokens after the final norm, each [B, T, D], in float32.
        """
        lengths: dict[str, int | Tensor] = {name: span.tokens_BTD.shape[1] for name, span in spans.items()}
        of = last if isinstance(last, Mapping) else dict.fromkeys(lengths, last)
        wanted = {
            name: n if (n := of[name]) is not None else lengths[name]
            for name in (lengths if outputs is None else outputs)
        }
        geometries, of_last, layouts = placed or self.place(spans, cache, wanted)
        xs = {name: span.tokens_BTD.float() for name, span in spans.items()}
        final = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            conds = {name: None if s.cond is None else s.cond.of_layer(index) for name, s in spans.items()}
            past = None if cache is None else cache.past(index)
            where, needed = (of_last, wanted) if index == final else (geometries, lengths)
            xs, keys_values = block(xs, conds, where, past, insulate=insulate, outputs=needed)
            if commit:
                assert cache is not None, "nothing to commit to"
                cache.keep(index, keys_values)
        if cache is not None and commit:
            cache.layouts = layouts
        conds = {name: None if s.cond is None else s.cond.of_layer(final + 1) for name, s in spans.items()}
        return {name: self.final_norms[name](x, conds[name])[0] for name, x in xs.items()}

    def place(self, spans: Mapping[str, Span], cache: KVCache | None, wanted: Mapping[str, int | Tensor]) -> Placed:
        """Where the spans stand after what is in the cache.

        Args:
            wanted: which tokens of each span, as `chosen` has it.
        """
        geometries, of_last, seen = {}, {}, () if cache is None else cache.layouts
        make_mask, as_rows = (mask_for, False) if cache is None else (cache.mask, cache.heads_as_rows)
        for name, span in spans.items():
            own, dtype = span.follow(seen), span.tokens_BTD.dtype
            sees_all = span.all_valid and span.one_block and all(one.plain for one in seen)
            seen = (*seen, own)
            mask = None if sees_all else make_mask(own, joined(seen), dtype)
            geometry = Geometry(rope(own.position, self.size.head_dim), mask, as_rows, dtype)
            geometries[name] = of_last[name] = geometry
            some = wanted.get(name, 0)
            if mask is not None and (isinstance(some, Tensor) or 0 < some < own.valid.shape[1]):
                last = own.map(partial(chosen, which=some))
                of_last[name] = geometry._replace(mask=make_mask(last, joined(seen), dtype))
        return Placed(geometries, of_last, seen)


def rope(position: Int[Tensor, "B T"], head_dim: int, base: float = 10_000.0) -> Rotation:
    """By angles `position · base^(−2i/head_dim)` (Su et al. 2021), the same for both halves of a head."""
    exponent = torch.arange(head_dim // 2, device=position.device, dtype=torch.float32) * (2.0 / head_dim)
    angle = position[..., None, None] / base**exponent
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x_BTNH: Tensor, rope: Rotation) -> Tensor:
    """Rotate the two halves of each head against each other, in float32: `(a, b) → (a cos − b sin, b cos + a sin)`."""
    (cos, sin), x32 = rope, x_BTNH.float()
    return (x32 * cos + x32.roll(x32.shape[-1] // 2, -1) * sin).to(x_BTNH.dtype)
