"""The prompt to token ids, in the format of each model, and π0-FAST's ids back to actions."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from manipi.errors import ConfigError
from manipi.model.config import ModelConfig, Pi0FastConfig, Pi05Config
from manipi.tokenizers import FastTokenizer, TextTokenizer, Tokenizers, extract_codes
from manipi.tokenizers.prompts import fast_prompt, pi05_prompt
from manipi.types import Sample


@dataclass(frozen=True)
class TokenizePrompt:
    """π0 and π0.5: the instruction, and for π0.5 the normalised state as bin numbers."""

    tokenizer: TextTokenizer
    max_len: int
    with_state: bool

    def encode(self, sample: Sample) -> Sample:
        state = sample["state"] if self.with_state else None
        prompt = pi05_prompt(self.tokenizer, str(sample["prompt"]), state, self.max_len)
        return {**sample, "tokens": prompt.tokens, "token_valid": prompt.valid}

    def decode(self, actions_HA: np.ndarray, sample: Sample) -> np.ndarray:
        return actions_HA


@dataclass(frozen=True)
class TokenizeActions:
    """π0-FAST: instruction and state are the prefix; the actions are tokens that the model writes."""

    tokenizer: TextTokenizer
    fast: FastTokenizer
    max_len: int
    action_horizon: int
    action_size: int

    def encode(self, sample: Sample) -> Sample:
        actions, prompt = sample.get("actions"), str(sample["prompt"])
        p = fast_prompt(self.tokenizer, self.fast, prompt, sample["state"], actions, self.max_len)
        rest = {k: v for k, v in sample.items() if k not in ("actions", "action_valid")}
        return {**rest, "tokens": p.tokens, "token_valid": p.valid, "token_causal": p.causal, "token_loss": p.loss}

    def decode(self, actions_HA: np.ndarray, sample: Sample) -> np.ndarray:
        """Emitted token ids [T] -> normalised actions [H, A]. Raises TokenizerError where they spell no chunk."""
        codes = extract_codes(self.tokenizer, actions_HA.tolist())
        return self.fast.decode(codes, self.action_horizon, self.action_size)


TokenizeStep: TypeAlias = TokenizePrompt | TokenizeActions


def tokenize_step(model: ModelConfig, tokenizers: Tokenizers, action_size: int) -> TokenizeStep:
    """The step that fits the model. Raises ConfigError where a tokenizer is missing or too large for it."""
    text, fast = tokenizers.text, tokenizers.fast
    if text.vocab_size > model.vocab_size:
        raise ConfigError(
            expected=f"a text tokenizer of at most {model.vocab_size} ids, the model's vocabulary",
            found=f"{text.vocab_size} ids",
            where=type(model).__name__,
            next="set the model's vocab_size to the tokenizer's",
        )
    if not isinstance(model, Pi0FastConfig):
        with_state = isinstance(model, Pi05Config) and model.state_in_prompt
        return TokenizePrompt(text, model.max_token_len, with_state)
    if fast is None:
        raise ConfigError(
            expected="a FAST tokenizer",
            found="none",
            where="Pi0FastConfig",
            next="fit one (TrainConfig.action_tokenizer='fit') or name a published one",
        )
    return TokenizeActions(text, fast, model.max_token_len, model.action_horizon, action_size)
