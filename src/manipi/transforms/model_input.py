"""The last steps to the model: pictures resized, the prompt as tokens, cameras stacked, vectors padded.

Pictures keep their aspect, padded to the middle with black. Prompts have the format of each model, and π0-FAST's ids
come back as actions. At the end everything has the model's shapes, with masks of what is real:

robot has 7 of 32 action dimensions, 2 of 3 cameras

actions            [H, 32]   a a a a a a a 0 0 0 …
action_dim_valid   [32]      1 1 1 1 1 1 1 0 0 0 …
images             [3, h, w, 3]            image_valid  1 1 0
"""

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
from PIL import Image

from manipi.errors import ConfigError
from manipi.model.config import Compat, ModelConfig, Pi0Config, Pi0FastConfig, Pi05Config
from manipi.tokenizers import ActionTokenizer, ByteTokenizer, TextTokenizer, Tokenizers
from manipi.tokenizers.prompts import CodeConstraint, extract_codes, fast_postfix, fast_prefix, padded, pi05_tokens
from manipi.types import Sample


@dataclass(frozen=True)
class ResizeImages:
    """Every `image/<slot>` to uint8 [size, size, 3]; a picture of that size passes untouched."""

    size: int

    def encode(self, sample: Sample) -> Sample:
        resized = {k: resize_with_pad(v, self.size, self.size) for k, v in sample.items() if k.startswith("image/")}
        return {**sample, **resized}

    def decode(self, actions_HA: np.ndarray, sample: Sample) -> np.ndarray:
        return actions_HA


def resize_with_pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [height, width, 3], bilinear by Pillow, as openpi's clients and policies do it."""
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return image
    ratio = max(w / width, h / height)
    new_h, new_w = max(1, int(h / ratio)), max(1, int(w / ratio))
    resized = Image.fromarray(image).resize((new_w, new_h), resample=Image.Resampling.BILINEAR)
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - new_h) // 2, (width - new_w) // 2
    canvas[top : top + new_h, left : left + new_w] = np.asarray(resized)
    return canvas


@dataclass(frozen=True)
class ModelLayout:
    """`image/<slot>`, `state`, `actions` -> the arrays of `manipi.model.ModelInput`, without the batch axis."""

    model: ModelConfig
    action_size: int
    """Action dimensions that the robot uses."""

    def encode(self, sample: Sample) -> Sample:
        size, state = self.model.vision.image_size, sample["state"]
        black = np.zeros((size, size, 3), np.uint8)
        images = [sample.get(f"image/{slot}", black) for slot in self.model.cameras]
        present = [f"image/{slot}" in sample for slot in self.model.cameras]
        texts = ("prompt", "subtask", "answer")
        rest = {k: v for k, v in sample.items() if not k.startswith("image/") and k not in texts}
        if "actions" in sample:
            rest["actions"] = self._pad(sample["actions"])
        return {
            **rest,
            "images": np.stack(images),
            # The released π0-FAST weights were trained with absent cameras as visible black pictures.
            "image_valid": np.array(present) | isinstance(self.model, Pi0FastConfig),
            # Only π0's network reads it; what the other two know of it stands in the prompt, however long.
            "state": self._pad(state if isinstance(self.model, Pi0Config) else state[: self.model.action_dim]),
            "action_dim_valid": np.arange(self.model.action_dim) < self.action_size,
        }

    def decode(self, actions_HA: np.ndarray, sample: Sample) -> np.ndarray:
        # π0-FAST hands on token ids, which have no action dimensions yet.
        return actions_HA if actions_HA.ndim == 1 else actions_HA[..., : self.action_size]

    def _pad(self, x: np.ndarray) -> np.ndarray:
        # np.pad gives the same, ten times as slowly.
        zeros = np.zeros((*x.shape[:-1], self.model.action_dim - x.shape[-1]), np.float32)
        return np.concatenate([x, zeros], axis=-1).astype(np.float32, copy=False)


@dataclass(frozen=True)
class TokenizePrompt:
    """π0 and π0.5: the instruction, and for π0.5 the normalised state as bin numbers."""

    tokenizer: TextTokenizer
    max_len: int
    with_state: bool
    compat: Compat

    def encode(self, sample: Sample) -> Sample:
        tokens = self._tokens(str(sample["prompt"]), sample["state"])
        prompt = padded(self.tokenizer, tokens, self.max_len, truncate=self.compat.truncated_prompts)
        return {**sample, "tokens": prompt.tokens, "token_valid": prompt.valid}

    def prompt_length(self, prompt: str, state_S: np.ndarray) -> int:
        """Tokens of a prompt, however many."""
        return len(self._tokens(prompt, state_S))

    def _tokens(self, prompt: str, state_S: np.ndarray) -> list[int]:
        state = state_S if self.with_state else None
        return pi05_tokens(self.tokenizer, prompt, state, minus_one_below=self.compat.minus_one_state_bins)

    def decode(self, actions_HA: np.ndarray, sample: Sample) -> np.ndarray:
        return actions_HA


@dataclass(frozen=True)
class TokenizeActions:
    """π0-FAST: instruction and state are the prefix; the actions are tokens that the model writes."""

    tokenizer: TextTokenizer
    action: ActionTokenizer
    max_len: int
    action_horizon: int
    action_size: int
    compat: Compat
    with_state: ClassVar[bool] = True

    @property
    def _quirks(self) -> dict[str, bool]:
        return {"lower_case": self.compat.fast_lower_case, "minus_one_below": self.compat.minus_one_state_bins}

    def encode(self, sample: Sample) -> Sample:
        prefix = fast_prefix(self.tokenizer, str(sample["prompt"]), sample["state"], **self._quirks)
        actions = sample.get("actions")
        postfix = [] if actions is None else fast_postfix(self.tokenizer, self.action.encode(actions))
        p = padded(self.tokenizer, prefix, self.max_len, postfix=postfix, truncate=self.compat.truncated_prompts)
        rest = {k: v for k, v in sample.items() if k not in ("actions", "action_valid")}
        return {**rest, "tokens": p.tokens, "token_valid": p.valid, "token_causal": p.causal, "token_loss": p.loss}

    def prompt_length(self, prompt: str, state_S: np.ndarray) -> int:
        """Tokens of instruction and state, however many."""
        return len(fast_prefix(self.tokenizer, prompt, state_S, **self._quirks))

    def action_lengths(self, chunks_NHA: np.ndarray) -> np.ndarray:
        """Tokens of each normalised chunk, [N]."""
        return len(fast_postfix(self.tokenizer, [])) + self.action.num_codes(chunks_NHA)

    def decode(self, actions_HA: np.ndarray, sample: Sample) -> np.ndarray:
        """Emitted token ids [T] -> normalised actions [H, A]. Raises TokenizerError where they spell no chunk."""
        codes = extract_codes(self.tokenizer, actions_HA.tolist(), reference_text=self.compat.fast_text_round_trip)
        return self.action.decode(codes, self.action_horizon, self.action_size)


TokenizeStep: TypeAlias = TokenizePrompt | TokenizeActions


def tokenize_step(model: ModelConfig, tokenizers: Tokenizers, action_size: int) -> TokenizeStep:
    """The step that fits the model.

    Raises:
        ConfigError: a tokenizer is missing, too large for the model, or none for a quirk that is asked for.
        TokenizerError: the model could not decode a chunk; see `CodeConstraint`.
    """
    text = tokenizers.text
    if text.vocab_size > model.vocab_size:
        raise ConfigError(
            expected=f"a text tokenizer of at most {model.vocab_size} ids, the model's vocabulary",
            found=f"{text.vocab_size} ids",
            where=type(model).__name__,
            next="set the model's vocab_size to the tokenizer's",
        )
    if not isinstance(model, Pi0FastConfig):
        with_state = isinstance(model, Pi05Config) and model.state_in_prompt
        return TokenizePrompt(text, model.max_token_len, with_state, model.compat)
    if model.compat.fast_text_round_trip and isinstance(text, ByteTokenizer):
        raise ConfigError(
            expected="a SentencePiece tokenizer, whose action codes can be read from their text again",
            found="the byte tokenizer, which writes code 7 as '<code7>' and reads seven characters",
            where="Compat.fast_text_round_trip",
            next="leave that switch off, which extracts the codes without text; or use PaliGemma's tokenizer",
        )
    code_constraint(model, tokenizers, action_size)  # What cannot be served is not trained either.
    assert tokenizers.action is not None, "the constraint has refused it"
    chunk = (model.action_horizon, action_size)
    return TokenizeActions(text, tokenizers.action, model.max_token_len, *chunk, model.compat)


def code_constraint(model: Pi0FastConfig, tokenizers: Tokenizers, action_size: int) -> CodeConstraint:
    """What the model may emit. Raises as `tokenize_step` does."""
    if tokenizers.action is None:
        raise ConfigError(
            expected="an action tokenizer",
            found="none",
            where="Pi0FastConfig",
            next="fit one (TrainConfig.action_tokenizer='fit'), use 'binning', or name a published one",
        )
    chunk = (model.action_horizon, action_size)
    return CodeConstraint(tokenizers.action, tokenizers.text, *chunk, model.max_token_len)
