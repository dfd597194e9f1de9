"""The prompt to token ids, in the format of each model, and π0-FAST's ids back to actions."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from manipi.errors import ConfigError
from manipi.model.config import Compat, ModelConfig, Pi0FastConfig, Pi05Config
from manipi.tokenizers import ActionTokenizer, ByteTokenizer, TextTokenizer, Tokenizers
from manipi.tokenizers.prompts import CodeConstraint, extract_codes, fast_postfix, fast_prefix, padded, pi05_tokens
from manipi.types import Sample


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

    def encode(self, sample: Sample) -> Sample:
        prefix, actions = self._prefix(str(sample["prompt"]), sample["state"]), sample.get("actions")
        postfix = [] if actions is None else fast_postfix(self.tokenizer, self.action.encode(actions))
        p = padded(self.tokenizer, prefix, self.max_len, postfix=postfix, truncate=self.compat.truncated_prompts)
        rest = {k: v for k, v in sample.items() if k not in ("actions", "action_valid")}
        return {**rest, "tokens": p.tokens, "token_valid": p.valid, "token_causal": p.causal, "token_loss": p.loss}

    with_state = True

    def prompt_length(self, prompt: str, state_S: np.ndarray) -> int:
        """Tokens of instruction and state, however many."""
        return len(self._prefix(prompt, state_S))

    def _prefix(self, prompt: str, state_S: np.ndarray) -> list[int]:
        quirks = {"lower_case": self.compat.fast_lower_case, "minus_one_below": self.compat.minus_one_state_bins}
        return fast_prefix(self.tokenizer, prompt, state_S, **quirks)

    def action_lengths(self, chunks_NHA: np.ndarray) -> np.ndarray:
        """Tokens of each normalised chunk, [N]."""
        return len(fast_postfix(self.tokenizer, [])) + self.action.num_codes(chunks_NHA)

    def decode(self, actions_HA: np.ndarray, sample: Sample) -> np.ndarray:
        """Emitted token ids [T] -> normalised actions [H, A]. Raises TokenizerError where they spell no chunk."""
        round_trip = self.compat.fast_text_round_trip
        codes = extract_codes(self.tokenizer, actions_HA.tolist(), reference_text=round_trip)
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
    _require_spelled_codes(model.compat, text)
    code_constraint(model, tokenizers, action_size)  # What cannot be served is not trained either.
    action = _action_tokenizer(tokenizers)
    return TokenizeActions(text, action, model.max_token_len, model.action_horizon, action_size, model.compat)


def _require_spelled_codes(compat: Compat, text: TextTokenizer) -> None:
    if compat.fast_text_round_trip and isinstance(text, ByteTokenizer):
        raise ConfigError(
            expected="a SentencePiece tokenizer, whose action codes can be read from their text again",
            found="the byte tokenizer, which writes code 7 as '<code7>' and reads seven characters",
            where="Compat.fast_text_round_trip",
            next="leave that switch off, which extracts the codes without text; or use PaliGemma's tokenizer",
        )


def code_constraint(model: Pi0FastConfig, tokenizers: Tokenizers, action_size: int) -> CodeConstraint:
    """What the model may emit. Raises as `tokenize_step` does."""
    chunk = (model.action_horizon, action_size)
    return CodeConstraint(_action_tokenizer(tokenizers), tokenizers.text, *chunk, model.max_token_len)


def _action_tokenizer(tokenizers: Tokenizers) -> ActionTokenizer:
    if tokenizers.action is None:
        raise ConfigError(
            expected="an action tokenizer",
            found="none",
            where="Pi0FastConfig",
            next="fit one (TrainConfig.action_tokenizer='fit'), use 'binning', or name a published one",
        )
    return tokenizers.action
