"""SigLIP image encoder (Zhai et al. 2023, So400m/14 in PaliGemma): pictures to tokens of the language model's width.

With a history (`HistoryConfig`) some blocks attend over time first, patch by patch, with the block's own weights:

    frames   t-16  t-8   t        v~  = values of the same patch, mixed over the frames up to each one
                                  out = attention over the patches of each frame, of these v~

Only the present frame's tokens leave the encoder: what was seen before is in them.

Shape suffixes: B pictures, K frames of each, P patches, D width, N heads, H head dim, h w pixel rows and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from manipi.model.config import VisionSize
from manipi.model.layers import LayerNorm, Linear


class VisionBlock(nn.Module):
    """Pre-norm transformer block: bidirectional attention, then an MLP with tanh GELU. The residual is float32."""

    def __init__(self, size: VisionSize):
        super().__init__()
        self.num_heads = size.num_heads
        self.attention_norm = LayerNorm(size.width, eps=1e-6)
        self.q_proj = Linear(size.width, size.width)
        self.k_proj = Linear(size.width, size.width)
        self.v_proj = Linear(size.width, size.width)
        self.out_proj = Linear(size.width, size.width)
        self.mlp_norm = LayerNorm(size.width, eps=1e-6)
        self.up_proj = Linear(size.width, size.mlp_dim)
        self.down_proj = Linear(size.mlp_dim, size.width)

    def qkv(self, x_BPD: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, each [B, N, P, H]. An engine has one matrix for the three."""
        made = (proj(x_BPD) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return [one.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for one in made]

    def forward(self, x_BPD: Tensor, dtype: torch.dtype, time: "Time | None" = None) -> Tensor:
        """With `time`, x is [B · K, P, D], the frames of a picture one after the other."""
        seen_BPD = x_BPD if time is None else x_BPD + time.embedding_KD.repeat(len(time.sees_BKK), 1)[:, None]
        q_BNPH, k_BNPH, v_BNPH = self.qkv(self.attention_norm(seen_BPD).to(dtype))
        if time is not None:
            v_BNPH = time.mix(q_BNPH, k_BNPH, v_BNPH)
        attended_BNPH = F.scaled_dot_product_attention(q_BNPH, k_BNPH, v_BNPH)
        x_BPD = x_BPD + self.out_proj(attended_BNPH.transpose(1, 2).flatten(-2))
        return x_BPD + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(x_BPD).to(dtype)), approximate="tanh"))


@dataclass(frozen=True)
class Time:
    """Attention over the frames of each patch (MEM, arXiv 2603.03596, App. C, eqs. 1 and 3)."""

    sees_BKK: Tensor
    """bool: a frame sees those before it that there are, and itself."""
    embedding_KD: Tensor
    """Added to what is attended: sines of the time, zero at the present frame. Their frequencies, 1 to 0.01 radians a
    frame, are ours."""

    @staticmethod
    def of(valid_BK: Tensor, width: int) -> "Time":
        """Of frames that are there or not, the last one being the present."""
        num_frames, device = valid_BK.shape[1], valid_BK.device
        before_KK = torch.ones(num_frames, num_frames, dtype=torch.bool, device=device).tril()
        itself_KK = torch.eye(num_frames, dtype=torch.bool, device=device)
        ago_K1 = torch.arange(1 - num_frames, 1, dtype=torch.float32, device=device)[:, None]
        angles_KD = ago_K1 * 100.0 ** -torch.linspace(0, 1, width // 2, device=device)
        embedding_KD = torch.cat([angles_KD.sin(), angles_KD.cos() - 1], dim=1)
        return Time((valid_BK[:, None] & before_KK) | itself_KK, embedding_KD)

    def mix(self, *qkv_BNPH: Tensor) -> Tensor:
        """The values [B · K, N, P, H] that each frame's attention over its patches then reads."""
        b, k, k = self.sees_BKK.shape
        q, k_, v = (x.unflatten(0, (b, k)).permute(0, 3, 2, 1, 4) for x in qkv_BNPH)  # [B, P, N, K, H]
        mixed_BPNKH = F.scaled_dot_product_attention(q, k_, v, attn_mask=self.sees_BKK[:, None, None])
        return mixed_BPNKH.permute(0, 3, 2, 1, 4).flatten(0, 1)


class SigLIP(nn.Module):
    """Patches, a learned position table, transformer blocks, a final norm and a head; no pooling.

    Args:
        size: of the encoder.
        output_width: width of the tokens, the language model's.
        every: with a history, which blocks attend over time.
    """

    def __init__(self, size: VisionSize, output_width: int, every: int = 4):
        super().__init__()
        self.temporal = frozenset(range(every - 1, size.depth, every)) or frozenset([size.depth - 1])
        self.patch_size = size.patch_size
        self.patch_embedding = Linear(3 * size.patch_size**2, size.width)
        self.position_embedding = nn.Parameter(torch.empty(size.num_tokens, size.width))
        self.blocks = nn.ModuleList(VisionBlock(size) for _ in range(size.depth))
        self.final_norm = LayerNorm(size.width, eps=1e-6)
        self.head = Linear(size.width, output_width)

    def init_weights(self, generator: Generator | None) -> None:
        nn.init.normal_(self.position_embedding, std=self.position_embedding.shape[-1] ** -0.5, generator=generator)

    def forward(
        self,
        images: Float[Tensor, "B h w 3"],
        dtype: torch.dtype,
        past: Float[Tensor, "B k h w 3"] | None = None,
        past_valid: Bool[Tensor, "B k"] | None = None,
    ) -> Float[Tensor, "B P D"]:
        """Tokens of RGB pictures with values in [-1, 1].

        Patches are embedded in float32, as in the reference; the blocks compute in `dtype`.

        Args:
            past: older frames of each picture, the oldest first.
            past_valid: which of them there are.
        """
        frames, time, last = images, None, -1
        if past is not None and past_valid is not None:
            frames = torch.cat([past, images[:, None]], dim=1).flatten(0, 1)
            valid_BK = torch.cat([past_valid, torch.ones_like(past_valid[:, :1])], dim=1)
            time, last = Time.of(valid_BK, self.position_embedding.shape[-1]), max(self.temporal)
        x_BPD = embed_patches(frames, self.patch_size, self.patch_embedding, self.position_embedding)
        for index, block in enumerate(self.blocks):
            if time is None:
                x_BPD = block(x_BPD, dtype)
                continue
            x_BPD = block(x_BPD, dtype, time if index in self.temporal else None)
            if index == last:  # what follows is the present's alone
                x_BPD, time = x_BPD[time.sees_BKK.shape[1] - 1 :: time.sees_BKK.shape[1]], None
        return self.head(self.final_norm(x_BPD).to(dtype))


def embed_patches(images_Bhw3: Tensor, patch_size: int, embedding: Linear, position_PD: Tensor) -> Tensor:
    """Patches in row-major order, each flattened row by row with its channels last, plus their positions."""
    p = patch_size
    patches = images_Bhw3.float().unflatten(1, (-1, p)).unflatten(3, (-1, p)).transpose(2, 3)
    return embedding(patches.flatten(3).flatten(1, 2)) + position_PD.float()
