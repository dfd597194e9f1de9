"""Which pictures and prompt tokens of a batch are computed: none that every row masks.

    slots        base     left     right    prompt                        base     right    prompt
    row 0      [ ■■■■ ][      ][ ■■■■ ]  [ ■■■■■··· ]      ──▶         [ ■■■■ ][ ■■■■ ]  [ ■■■■■ ]
    row 1      [ ■■■■ ][      ][      ]  [ ■■■····· ]                  [ ■■■■ ][ 0000 ]  [ ■■■·· ]

A slot that no row fills leaves the sequence, as does the padding behind the longest prompt; a picture that one row
lacks and another has is zeros instead of an encoded picture. What is left out was seen by no one, and positions count
valid tokens alone, so that the results are those of the padded batch.

Shape letters: B batch, C camera slots, L prompt tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PROMPT_MULTIPLE = 16
"""On a GPU prompts keep a multiple of so many tokens: fewer different shapes for its allocator and compiled code."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Plain numbers on the host, so that shapes follow from them without waiting for the device."""

    cameras: tuple[int, ...]
    """Slots that stay in the sequence."""
    pictures: tuple[int, ...]
    """Valid pictures, as indices into the batch's rows and slots [B · C]."""
    places: tuple[int, ...]
    """Where they stand among the rows and the slots that stay."""
    prompt_len: int
    """Prompt tokens that stay."""
    plain: bool
    """Everything that stays is valid and one block."""

    def token_indices(self, num_cameras: int, num_tokens: int, device: torch.device) -> Tensor:
        """Which tokens of the padded prefix stay: those of slots, `num_tokens` each, then the prompt's."""
        starts, prompt = [camera * num_tokens for camera in self.cameras], num_cameras * num_tokens
        runs = [(start, start + num_tokens) for start in starts] + [(prompt, prompt + self.prompt_len)]
        return torch.cat([torch.arange(*run, device=device) for run in runs])


def kept(image_valid: Tensor, token_valid: Tensor, token_causal: Tensor | None, *, multiple: int = 1) -> Kept:
    """What to compute of a batch with the masks [B, C], [B, L] and [B, L]. Masks on a GPU make this wait for it.

    Args:
        multiple: that the prompt's tokens stay a multiple of, as far as the padding reaches.
    """
    images_BC, tokens_BL = image_valid.cpu(), token_valid.cpu()
    cameras_C = images_BC.any(dim=0)
    stays_BC = images_BC[:, cameras_C]
    used = int(tokens_BL.any(dim=0).nonzero().max()) + 1 if tokens_BL.any() else 0
    # π0-FAST predicts each token from the one before: of a prompt of one there is nothing to learn.
    prompt_len = min(max(-(-used // multiple) * multiple, 2), tokens_BL.shape[1])
    one_block = token_causal is None or not token_causal[:, :prompt_len].any()
    return Kept(
        cameras=_indices(cameras_C),
        pictures=_indices(images_BC.flatten()),
        places=_indices(stays_BC.flatten()),
        prompt_len=prompt_len,
        plain=bool(stays_BC.all() and tokens_BL[:, :prompt_len].all() and one_block),
    )


def everything(image_valid: Tensor, token_valid: Tensor) -> Kept:
    """The padded batch, as the reference computes it."""
    all_pictures = tuple(range(image_valid.numel()))
    return Kept(
        cameras=tuple(range(image_valid.shape[1])),
        pictures=all_pictures,
        places=all_pictures,
        prompt_len=token_valid.shape[1],
        plain=False,
    )


def _indices(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())
