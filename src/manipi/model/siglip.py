"""SigLIP image encoder (Zhai et al. 2023, So400m/14 in PaliGemma): pictures to tokens of the language model's width.

Shape suffixes: B pictures, P patches, D width, N heads, H head dim, h w pixel rows and columns.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
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

    def forward(self, x_BPD: Tensor, dtype: torch.dtype) -> Tensor:
        q_BNPH, k_BNPH, v_BNPH = self.qkv(self.attention_norm(x_BPD).to(dtype))
        attended_BNPH = F.scaled_dot_product_attention(q_BNPH, k_BNPH, v_BNPH)
        x_BPD = x_BPD + self.out_proj(attended_BNPH.transpose(1, 2).flatten(-2))
        return x_BPD + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(x_BPD).to(dtype)), approximate="tanh"))


class SigLIP(nn.Module):
    """Patches, a learned position table, transformer blocks, a final norm and a head; no pooling.

    Args:
        size: of the encoder.
        output_width: width of the tokens, the language model's.
    """

    def __init__(self, size: VisionSize, output_width: int):
        super().__init__()
        self.patch_size = size.patch_size
        self.patch_embedding = Linear(3 * size.patch_size**2, size.width)
        self.position_embedding = nn.Parameter(torch.empty(size.num_tokens, size.width))
        self.blocks = nn.ModuleList(VisionBlock(size) for _ in range(size.depth))
        self.final_norm = LayerNorm(size.width, eps=1e-6)
        self.head = Linear(size.width, output_width)

    def init_weights(self, generator: Generator | None) -> None:
        nn.init.normal_(self.position_embedding, std=self.position_embedding.shape[-1] ** -0.5, generator=generator)

    def forward(self, images: Float[Tensor, "B h w 3"], dtype: torch.dtype) -> Float[Tensor, "B P D"]:
        """Tokens of RGB pictures with values in [-1, 1].

        Patches are embedded in float32, as in the reference; the blocks compute in `dtype`.
        """
        x_BPD = embed_patches(images, self.patch_size, self.patch_embedding, self.position_embedding)
        for block in self.blocks:
            x_BPD = block(x_BPD, dtype)
        return self.head(self.final_norm(x_BPD).to(dtype))


def embed_patches(images_Bhw3: Tensor, patch_size: int, embedding: Linear, position_PD: Tensor) -> Tensor:
    """Patches in row-major order, each flattened row by row with its channels last, plus their positions."""
    p = patch_size
    patches = images_Bhw3.float().unflatten(1, (-1, p)).unflatten(3, (-1, p)).transpose(2, 3)
    return embedding(patches.flatten(3).flatten(1, 2)) + position_PD.float()
