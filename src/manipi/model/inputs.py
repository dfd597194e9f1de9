"""What a policy's model reads: one batch of tensors, and what of it is computed.

Masks say which pictures, tokens and actions are real. What every row masks is not computed:

    slots        base     left     right    prompt                        base     right    prompt
    row 0      [ ■■■■ ][      ][ ■■■■ ]  [ ■■■■■··· ]      ──▶         [ ■■■■ ][ ■■■■ ]  [ ■■■■■ ]
    row 1      [ ■■■■ ][      ][      ]  [ ■■■····· ]                  [ ■■■■ ][ 0000 ]  [ ■■■·· ]

A slot that no row fills leaves the sequence, as does the padding behind the longest prompt; a picture that one row
lacks and another has is zeros instead of an encoded picture. What is left out was seen by no one, and positions count
valid tokens alone, so that the results are those of the padded batch.

Shape letters: B batch, C camera slots, k older frames, L prompt tokens, H action horizon, A action dimensions; h w rows
and columns of pixels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from manipi.errors import ConfigError, unknown_name
from manipi.model.config import ModelConfig, Pi0FastConfig

_DTYPES = {
    "tokens": torch.long,
    "codes": torch.long,
    "delay": torch.long,
    "state": torch.float32,
    "actions": torch.float32,
    "past_states": torch.float32,
}
"""Fields that are neither pictures nor masks. Pictures keep their dtype, masks are bool."""


Masks: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""`image_valid`, `token_valid` and `token_causal` of a batch."""

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
    one_block: bool
    """No token is causal."""
    all_valid: bool
    """Everything that stays is valid."""

    def token_indices(self, num_cameras: int, num_tokens: int, past: int, device: torch.device) -> Tensor:
        """Which tokens of the padded prefix stay: those of slots, `num_tokens` each, of older states, of the prompt."""
        starts, prompt = [camera * num_tokens for camera in self.cameras], num_cameras * num_tokens
        runs = [(start, start + num_tokens) for start in starts] + [(prompt, prompt + past + self.prompt_len)]
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
    one_block = token_causal is None or not bool(token_causal[:, :prompt_len].any())
    masks = {"cameras": cameras_C, "pictures": images_BC.flatten(), "places": stays_BC.flatten()}
    return Kept(
        **{name: tuple(mask.nonzero().flatten().tolist()) for name, mask in masks.items()},
        prompt_len=prompt_len,
        one_block=one_block,
        all_valid=bool(stays_BC.all() and tokens_BL[:, :prompt_len].all()),
    )


def everything(image_valid: Tensor, token_valid: Tensor) -> Kept:
    """The padded batch, as the reference computes it."""
    slots, tokens = (torch.ones(mask.shape, dtype=torch.bool, device="cpu") for mask in (image_valid, token_valid))
    whole = kept(slots, tokens, None)
    return dataclasses.replace(whole, one_block=False, all_valid=False)


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """One batch. Masks are positive: true means that the value is real."""

    images: UInt8[Tensor, "B C h w 3"] | Float[Tensor, "B C h w 3"]
    """RGB, uint8 or already scaled to [-1, 1]."""
    image_valid: Bool[Tensor, "B C"]
    tokens: Int64[Tensor, "B L"]
    token_valid: Bool[Tensor, "B L"]
    state: Float[Tensor, "B A"]
    """Normalised proprioceptive state, padded to the model's action dimensions."""

    actions: Float[Tensor, "B H A"] | None = None
    """Normalised action chunk, in training of flow policies. With `delay` at inference: what is left of the chunk that
    the robot is executing."""
    action_valid: Bool[Tensor, "B H"] | None = None
    """Steps that lie within the episode, or that are left; None: all."""
    delay: Int64[Tensor, "B"] | None = None
    """How many of the first steps are given: the robot executes them meanwhile (`manipi.model.flow`)."""
    action_dim_valid: Bool[Tensor, "A"] | Bool[Tensor, "B A"] | None = None
    """Dimensions that the robot has; None: all. Also read by sampling."""
    token_causal: Bool[Tensor, "B L"] | None = None
    """Tokens that see only what comes before them: actions of π0-FAST in training, and text that is written."""
    token_loss: Bool[Tensor, "B L"] | None = None
    """Training: tokens to predict."""
    codes: Int64[Tensor, "B N"] | None = None
    """Joint training: the chunk as tokens that follow the prompt, with their end mark."""
    code_valid: Bool[Tensor, "B N"] | None = None
    hidden: Bool[Tensor, "B"] | None = None
    """π0-FAST training with `FixedCodes`: rows that are shown none of their codes; None: no row."""
    past_images: UInt8[Tensor, "B k C h w 3"] | Float[Tensor, "B k C h w 3"] | None = None
    """With a history: the cameras' older pictures, the oldest first."""
    past_states: Float[Tensor, "B k A"] | None = None
    """States that belong to them, normalised and padded."""
    past_valid: Bool[Tensor, "B k"] | None = None
    """Older frames that there are: none before the episode's start."""
    on_host: tuple[Masks, Masks] | None = field(default=None, repr=False, compare=False)
    """Masks on a device to which they came by `to`, and their copies in the host's memory, which can be read without
    waiting. They go along when other fields are replaced; of other masks they say nothing."""

    @property
    def batch_size(self) -> int:
        return len(self.tokens)

    @cached_property
    def kept(self) -> Kept:
        """What the model computes of this batch. Waits for a GPU, unless the masks came there by `to`."""
        multiple = PROMPT_MULTIPLE if self.tokens.device.type == "cuda" else 1
        return kept(*(self._copies or self._masks), multiple=multiple)

    @property
    def _masks(self) -> Masks:
        return self.image_valid, self.token_valid, self.token_causal

    @property
    def _copies(self) -> Masks | None:
        """The masks in the host's memory, where they are known there."""
        if self.tokens.device.type == "cpu":
            return self._masks
        masks, copies = self.on_host or (None, None)
        return copies if masks and all(a is b for a, b in zip(masks, self._masks, strict=True)) else None

    @classmethod
    def from_numpy(cls, batch: Mapping[str, np.ndarray], device: torch.device | str = "cpu") -> "ModelInput":
        """The batch on `device`. Keys are the names of the fields.

        Raises:
            ConfigError: a key that is no field, or a required field that is absent.
        """
        fields = {one.name: one for one in dataclasses.fields(cls) if one.name != "on_host"}
        for key in batch:
            if key not in fields:
                raise unknown_name("model input", key, fields, next="drop it from the batch")
        missing = [name for name, one in fields.items() if one.default is dataclasses.MISSING and name not in batch]
        if missing:
            raise ConfigError(
                expected="every required model input",
                found=f"no {', '.join(missing)}",
                where="ModelInput.from_numpy",
                next="build the batch with the transform pipeline",
            )
        tensors: dict[str, Any] = {}
        for key, value in batch.items():
            tensor = torch.from_numpy(np.ascontiguousarray(value))
            tensors[key] = tensor if key in ("images", "past_images") else tensor.to(_DTYPES.get(key, torch.bool))
        return cls(**tensors).to(device)

    def to(self, device: torch.device | str) -> "ModelInput":
        """The same batch on another device. To a GPU, copies from pinned memory do not wait."""
        target = torch.device(device)
        # Only that way: what comes from a GPU without waiting is read before it is there.
        moved = {
            name: t.to(target, non_blocking=t.device.type == "cpu" and target.type == "cuda")
            for name, t in self.tensors.items()
        }
        return dataclasses.replace(self, **moved)._with_copies(self._copies)

    def split(self, parts: int) -> list[Self]:
        """The batch in equal parts, in order."""
        per_sample = self.tensors
        if self.action_dim_valid is not None and self.action_dim_valid.ndim == 1:
            del per_sample["action_dim_valid"]
        chunks = zip(*(value.chunk(parts) for value in per_sample.values()), strict=True)
        split = [dataclasses.replace(self, **dict(zip(per_sample, chunk, strict=True))) for chunk in chunks]
        copies = [[None] * parts if one is None else one.chunk(parts) for one in self._copies or ()]
        own = zip(*copies, strict=True) if copies else [None] * parts
        return [part._with_copies(masks) for part, masks in zip(split, own, strict=True)]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _with_copies(self, copies: Masks | None) -> Self:
        needed = copies is not None and self.tokens.device.type != "cpu"
        return dataclasses.replace(self, on_host=(self._masks, copies) if needed else None)

    def check(self, config: ModelConfig) -> None:
        """Compare shapes with the model's.

        Raises:
            ConfigError: a shape that does not fit; the first one found.
        """
        b, size = self.batch_size, config.vision.image_size
        expected = {
            "images": (b, len(config.cameras), size, size, 3),
            "image_valid": (b, len(config.cameras)),
            "token_valid": tuple(self.tokens.shape),
            "token_causal": tuple(self.tokens.shape),
            "token_loss": tuple(self.tokens.shape),
            "state": (b, config.action_dim),
            "actions": (b, config.action_horizon, config.action_dim),
            "action_valid": (b, config.action_horizon),
            "codes": () if self.code_valid is None else (b, self.code_valid.shape[1]),
            "delay": (b,),
            "hidden": (b,),
        }
        if k := len(config.past_steps):
            pictures = (b, k, len(config.cameras), size, size, 3)
            expected |= {"past_images": pictures, "past_states": (b, k, config.action_dim), "past_valid": (b, k)}
        for name, shape in expected.items():
            value = getattr(self, name)
            if (value is not None or name.startswith("past_")) and getattr(value, "shape", None) != shape:
                raise ConfigError(
                    expected=f"shape {shape}",
                    found="nothing" if value is None else f"{tuple(value.shape)}",
                    where=f"ModelInput.{name}, read by a {type(config).__name__}",
                    next="build the batch and the model from the same config",
                )


def blank_input(config: ModelConfig, cameras: Sequence[bool], prompt_len: int, delay: int | None = None) -> ModelInput:
    """A batch of one with black pictures in those camera slots and a prompt of zeros: shapes without values.

    Args:
        delay: with a previous chunk of zeros, of which so many steps are committed.
    """
    size, longest, horizon = config.vision.image_size, config.max_token_len, config.action_horizon
    goes_on = delay is not None
    return ModelInput(
        actions=torch.zeros(1, horizon, config.action_dim) if goes_on else None,
        action_valid=torch.ones(1, horizon, dtype=torch.bool) if goes_on else None,
        delay=torch.tensor([delay]) if goes_on else None,
        images=torch.zeros(1, len(cameras), size, size, 3, dtype=torch.uint8),
        image_valid=torch.tensor([cameras]) | isinstance(config, Pi0FastConfig),
        tokens=torch.zeros(1, longest, dtype=torch.long),
        token_valid=(torch.arange(longest) < prompt_len)[None],
        state=torch.zeros(1, config.action_dim),
        **blank_past(config, 1, len(cameras)),
    )


def blank_past(config: ModelConfig, batch: int, cameras: int) -> dict[str, Any]:
    """Fields of a history in which nothing has happened yet; none where the model remembers nothing."""
    if not (k := len(config.past_steps)):
        return {}
    size = config.vision.image_size
    return {
        "past_images": torch.zeros(1, k, 1, size, size, 3, dtype=torch.uint8).expand(batch, -1, cameras, -1, -1, -1),
        "past_states": torch.zeros(batch, k, config.action_dim),
        "past_valid": torch.zeros(batch, k, dtype=torch.bool),
    }
