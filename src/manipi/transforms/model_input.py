"""The last steps to the model: pictures resized, the prompt as tokens, cameras stacked, vectors padded.

Pictures keep their aspect, padded to the middle with black. Prompts have the format of each model, and π0-FAST's ids
come back as actions. At the end everything has the model's shapes, with masks of what is real:

robot has 7 of 32 action dimensions, 2 of 3 cameras

actions            [H, 32]   a a a a a a a 0 0 0 …
action_dim_valid   [32]      1 1 1 1 1 1 1 0 0 0 …
images             [3, h, w, 3]            image_valid  1 1 0
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
from PIL import Image

from manipi.errors import ConfigError, shown
from manipi.model.config import Compat, ModelConfig, Pi0Config, Pi0FastConfig, Pi05Config
from manipi.tokenizers import ActionTokenizer, ByteTokenizer, DctTokenizer, TextTokenizer, Tokenizers
from manipi.tokenizers.prompts import (
    ACTION_MARKER,
    ANSWER_MARKER,
    SUBTASK_MARKER,
    CodeConstraint,
    Run,
    code_tokens,
    extract_codes,
    fast_postfix,
    fast_prefix,
    padded,
    pi05_tokens,
    text_runs,
)
from manipi.types import Sample
from manipi_client.keys import WRITE_SUBTASK


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
class CodesBehind:
    """Joint training: the chunk as tokens that follow the prompt on a branch (`manipi.model.joint`)."""

    action: ActionTokenizer
    max_len: int
    action_horizon: int
    action_size: int

    def require_fit(self, tokens: int, *where: str) -> None:
        """Raises ConfigError where a chunk takes more tokens."""
        if tokens > self.max_len:
            raise ConfigError(
                expected=f"action chunks of at most {self.max_len} tokens (max_code_len)",
                found=f"{tokens} tokens",
                where=f"{', '.join(where)}, the longest",
                next=f"--model.joint.max-code-len {tokens}, in the recipe or as a flag",
            )


@dataclass(frozen=True)
class TokenizePrompt:
    """π0 and π0.5: the instruction, and for π0.5 the normalised state as bin numbers.

    A model that writes text also takes `subtask` (the present step's words, on which the actions then depend),
    `manipi/write_subtask` (it shall write these) and `answer` (to a question about the pictures, which is the prompt;
    there are no actions).
    """

    tokenizer: TextTokenizer
    max_len: int
    with_state: bool
    compat: Compat
    writes_text: bool = False
    codes: CodesBehind | None = None

    def encode(self, sample: Sample) -> Sample:
        prefix, text = self._tokens(str(sample["prompt"]), sample["state"], sample)
        prompt = padded(self.tokenizer, prefix, self.max_len, text=text, truncate=self.compat.truncated_prompts)
        rest = {key: value for key, value in sample.items() if key not in ("subtask", WRITE_SUBTASK, "answer")}
        rest |= {"tokens": prompt.tokens, "token_valid": prompt.valid}
        if self.writes_text and (text or "actions" in sample):
            rest["token_causal"] = prompt.causal
        if self.writes_text and "actions" in sample and "delay" not in sample:
            rest["token_loss"] = prompt.loss
        return {**rest, **self._codes(sample)}

    def prompt_length(self, prompt: str, state_S: np.ndarray, behind: Mapping[str, Any]) -> int:
        """Tokens of a prompt with what is learned behind it (`subtask` or `answer`), however many."""
        prefix, text = self._tokens(prompt, state_S, behind)
        return len(prefix) + sum(len(run.ids) for run in text)

    def action_lengths(self, chunks_NHA: np.ndarray) -> np.ndarray:
        """Tokens of each normalised chunk, [N], where the model writes codes."""
        assert self.codes is not None, "a model that writes no codes"
        return len(code_tokens(self.tokenizer, [])) + self.codes.action.num_codes(chunks_NHA)

    def _tokens(self, prompt: str, state_S: np.ndarray, sample: Mapping[str, Any]) -> tuple[list[int], list[Run]]:
        below = {"minus_one_below": self.compat.minus_one_state_bins}
        state = state_S if self.with_state else None
        if self.writes_text and sample.get("answer"):
            return text_runs(self.tokenizer, prompt, None, ANSWER_MARKER, str(sample["answer"]))
        if self.writes_text and (WRITE_SUBTASK in sample or sample.get("subtask")):
            text = None if WRITE_SUBTASK in sample else str(sample["subtask"])
            return text_runs(self.tokenizer, prompt, state, SUBTASK_MARKER, text, **below)
        return pi05_tokens(self.tokenizer, prompt, state, **below), []

    def _codes(self, sample: Sample) -> Sample:
        # What is left of a previous chunk is no target.
        if self.codes is None or "actions" not in sample or "delay" in sample:
            return {}
        ids = []
        if sample["action_valid"].any():
            ids = code_tokens(self.tokenizer, self.codes.action.encode(sample["actions"]))
        self.codes.require_fit(len(ids), f"a chunk of {shown(str(sample['prompt']))}")
        tokens = np.full(self.codes.max_len, self.tokenizer.pad_id, np.int64)
        tokens[: len(ids)] = ids
        return {"codes": tokens, "code_valid": np.arange(self.codes.max_len) < len(ids)}

    def decode(self, actions_HA: np.ndarray, sample: Sample) -> np.ndarray:
        """Also of emitted token ids [T], where the model writes codes: normalised actions [H, A]."""
        if actions_HA.ndim > 1:
            return actions_HA
        assert self.codes is not None, "only a model with codes emits any"
        emitted = [*self.tokenizer.encode(ACTION_MARKER), *actions_HA.tolist()]
        codes = extract_codes(self.tokenizer, emitted)
        return self.codes.action.decode(codes, self.codes.action_horizon, self.codes.action_size)


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

    def prompt_length(self, prompt: str, state_S: np.ndarray, behind: Mapping[str, Any]) -> int:
        """Tokens of instruction and state, however many; nothing is learned behind them but actions."""
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
        with_state, codes = isinstance(model, Pi05Config) and model.state_in_prompt, None
        if model.writes_codes:
            code_constraint(model, tokenizers, action_size)
            assert tokenizers.action is not None, "the constraint has refused it"
            _require_codes(model, text, tokenizers.action)
            assert model.joint is not None, "it says what is written"
            codes = CodesBehind(tokenizers.action, model.joint.max_code_len, model.action_horizon, action_size)
        return TokenizePrompt(text, model.max_token_len, with_state, model.compat, model.writes_text, codes)
    if model.compat.fast_text_round_trip and isinstance(text, ByteTokenizer):
        raise ConfigError(
            expected="a SentencePiece tokenizer, whose action codes can be read from their text again",
            found="the byte tokenizer, which writes code 7 as '<code7>' and reads seven characters",
            where="Compat.fast_text_round_trip",
            next="leave that switch off, which extracts the codes without text; or use PaliGemma's tokenizer",
        )
    code_constraint(model, tokenizers, action_size)  # What cannot be served is not trained either.
    assert tokenizers.action is not None, "the constraint has refused it"
    _require_codes(model, text, tokenizers.action)
    chunk = (model.action_horizon, action_size)
    return TokenizeActions(text, tokenizers.action, model.max_token_len, *chunk, model.compat)


def _require_codes(model: ModelConfig, text: TextTokenizer, action: ActionTokenizer) -> None:
    """That the ids of the codes are those that the model is told. Raises ConfigError where they are not."""
    if (codes := model.fixed_codes) is None:
        return
    end = text.vocab_size - text.reserved_ids
    first = end - action.vocab_size
    size = action.codes_per_place if isinstance(action, DctTokenizer) else 0
    within = codes.first_id <= first and end <= codes.end_id
    if not within or size != codes.per_place or (first - codes.first_id) % codes.per_place:
        places = f"{action.vocab_size // size} places of {size} ids" if size else "codes without places"
        raise ConfigError(
            expected=f"{codes.places} places of {codes.per_place} ids, from {codes.first_id} to {codes.end_id - 1}",
            found=f"a {action.kind} tokenizer with {places}, from {first} to {end - 1}",
            where=f"{type(model).__name__}, its codes",
            next="set model.codes to what was found, or leave it out with other tokenizers than action_tokenizer='dct'",
        )


def code_constraint(model: ModelConfig, tokenizers: Tokenizers, action_size: int) -> CodeConstraint:
    """What a model that writes codes may emit. Raises as `tokenize_step` does."""
    if tokenizers.action is None:
        raise ConfigError(
            expected="an action tokenizer",
            found="none",
            where=type(model).__name__,
            next="fit one (TrainConfig.action_tokenizer='fit'), use 'binning', or name a published one",
        )
    chunk = (model.action_horizon, action_size)
    if isinstance(model, Pi0FastConfig):
        return CodeConstraint(tokenizers.action, tokenizers.text, *chunk, model.max_token_len)
    assert model.joint is not None, "a model that writes no codes"
    room = {"max_tokens": model.joint.max_code_len, "setting": "joint.max_code_len"}
    return CodeConstraint(tokenizers.action, tokenizers.text, *chunk, **room, marked=False)
