"""The prompt format of each model: what the language model reads, token by token.

    π0      BOS  text  newline
    π0.5    BOS  "Task: text, State: 0 128 255;⏎Action: "
    π0-FAST BOS  "Task: text, State: 0 128 255;⏎"  │  "Action: "  codes  "|"  EOS
            └────────── prefix ─────────────────┘  └───────── postfix ──────────┘
    causal  0 0 0 ...                              1 1 1 ...       each token sees the whole prefix and the past
    loss    0 0 0 ...                              1 1 1 ...       the postfix is what the model learns to emit

The formats are openpi's, because the released weights were trained on them.
Shape letters: L prompt length (max_len), S state dimensions, H action horizon, A action dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64

from manipi.errors import TokenizerError, shown
from manipi.tokenizers.actions import ActionTokenizer
from manipi.tokenizers.binning import bin_indices
from manipi.tokenizers.text import TextTokenizer, codes_from_tokens, tokens_from_codes

ACTION_MARKER = "Action: "
ACTION_TERMINATOR = "|"


@dataclass(frozen=True, kw_only=True)
class TokenizedPrompt:
    """A prompt of fixed length, padded on the right."""

    tokens: Int64[np.ndarray, "L"]
    valid: Bool[np.ndarray, "L"]
    """False on padding."""
    causal: Bool[np.ndarray, "L"]
    """True where a token starts a new attention block, i.e. is hidden from all earlier ones."""
    loss: Bool[np.ndarray, "L"]
    """True where the model is trained to emit the token."""


def pi0_prompt(tokenizer: TextTokenizer, prompt: str, max_len: int, *, truncate: bool = False) -> TokenizedPrompt:
    """π0's format, and π0.5's for robots whose state is not in the prompt.

    Args:
        prompt: the instruction. Underscores and newlines become spaces; case stays.
        max_len: length of the result.
        truncate: cut an overlong prompt at max_len, as openpi does, instead of raising.

    Raises:
        TokenizerError: the prompt needs more than max_len tokens.
    """
    return _pad(tokenizer, pi0_tokens(tokenizer, prompt), [], max_len, truncate=truncate)


def pi0_tokens(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """`pi0_prompt` without its padding, however long."""
    # The newline is encoded apart: SentencePiece could otherwise merge it with what precedes.
    return [tokenizer.bos_id, *tokenizer.encode(_clean(prompt)), *tokenizer.encode("\n")]


def pi05_prompt(
    tokenizer: TextTokenizer,
    prompt: str,
    state: Float[np.ndarray, "S"] | None,
    max_len: int,
    *,
    minus_one_below: bool = False,
    truncate: bool = False,
) -> TokenizedPrompt:
    """π0.5's format: the state is part of the text, one bin number per dimension.

    Args:
        prompt: the instruction, cleaned as in `pi0_prompt`.
        state: normalised to [-1, 1], before padding to the model's width; None gives `pi0_prompt`.
        max_len, truncate: as in `pi0_prompt`.
        minus_one_below: openpi's rule for a state below -1, whose bin reads "-1"; by default it is 0.

    Raises:
        TokenizerError: more than max_len tokens, or a state that is not finite.
    """
    tokens = pi05_tokens(tokenizer, prompt, state, minus_one_below=minus_one_below)
    return _pad(tokenizer, tokens, [], max_len, truncate=truncate)


def pi05_tokens(
    tokenizer: TextTokenizer, prompt: str, state: Float[np.ndarray, "S"] | None, *, minus_one_below: bool = False
) -> list[int]:
    """`pi05_prompt` without its padding, however long."""
    if state is None:
        return pi0_tokens(tokenizer, prompt)
    text = f"Task: {_clean(prompt)}, State: {_state_words(state, minus_one_below)};\n{ACTION_MARKER}"
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def fast_prompt(
    tokenizer: TextTokenizer,
    action_tokenizer: ActionTokenizer,
    prompt: str,
    state: Float[np.ndarray, "S"],
    actions: Float[np.ndarray, "H A"] | None,
    max_len: int,
    *,
    lower_case: bool = False,
    minus_one_below: bool = False,
    truncate: bool = False,
) -> TokenizedPrompt:
    """π0-FAST's format: the prefix, and in training the actions as the postfix that the model learns to emit.

    Args:
        prompt: the instruction. Underscores become spaces; newlines and case stay.
        state: normalised to [-1, 1], before padding to the model's width.
        actions: normalised chunk, or None at inference, where the model emits the whole postfix itself.
        lower_case: lower-case the instruction, as openpi does for π0-FAST alone.
        max_len, truncate, minus_one_below: as in `pi05_prompt`.

    Raises:
        TokenizerError: more than max_len tokens, a number that is not finite, or a vocabulary without room for codes.
    """
    prefix = fast_prefix(tokenizer, prompt, state, lower_case=lower_case, minus_one_below=minus_one_below)
    postfix = [] if actions is None else fast_postfix(tokenizer, action_tokenizer.encode(actions))
    return _pad(tokenizer, prefix, postfix, max_len, truncate=truncate)


def fast_prefix(
    tokenizer: TextTokenizer,
    prompt: str,
    state: Float[np.ndarray, "S"],
    *,
    lower_case: bool = False,
    minus_one_below: bool = False,
) -> list[int]:
    """What `fast_prompt` has before the actions, however long."""
    clean = (prompt.lower() if lower_case else prompt).strip().replace("_", " ")
    text = f"Task: {clean}, State: {_state_words(state, minus_one_below)};\n"
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def fast_postfix(tokenizer: TextTokenizer, codes: Sequence[int]) -> list[int]:
    """The actions as `fast_prompt` has them."""
    tokens = tokens_from_codes(tokenizer, np.array(codes, np.int64)).tolist()
    return [*tokenizer.encode(ACTION_MARKER), *tokens, *tokenizer.encode(ACTION_TERMINATOR), tokenizer.eos_id]


def extract_codes(tokenizer: TextTokenizer, ids: Sequence[int], *, reference_text: bool = False) -> list[int]:
    """The action codes in what a model emitted: what lies between the first "Action: " and the next "|" or EOS.

    Args:
        tokenizer: the text tokenizer of the model.
        ids: emitted token ids; padding after EOS is ignored.
        reference_text: take openpi's way through text, which alters sequences with pieces made of white space
            (about 4 of 100 sequences of 30 uniform codes; none where all codes are below 1024).

    Raises:
        TokenizerError: there is no "Action: ".
    """
    if reference_text:
        _, marker, after = tokenizer.decode(list(ids)).partition(ACTION_MARKER)
        found = tokenizer.encode(after.split(ACTION_TERMINATOR)[0].strip()) if marker else None
    else:
        found = _between(list(ids), tokenizer)
    if found is None:
        raise TokenizerError(
            expected=f"the tokens of {ACTION_MARKER!r}",
            found=shown(tokenizer.decode(list(ids)), 100),
            where=f"the {len(ids)} tokens that the model emitted",
            next="decode with CodeConstraint, or train longer",
        )
    return codes_from_tokens(tokenizer, np.array(found, np.int64)).tolist()


def _between(ids: list[int], tokenizer: TextTokenizer) -> list[int] | None:
    start = _find(ids, tokenizer.encode(ACTION_MARKER))
    if start is None:
        return None
    after = ids[start + len(tokenizer.encode(ACTION_MARKER)) :]
    ends = (_find(after, tokenizer.encode(ACTION_TERMINATOR)), _find(after, [tokenizer.eos_id]))
    return after[: min((end for end in ends if end is not None), default=len(after))]


def _find(ids: list[int], wanted: list[int]) -> int | None:
    return next((i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted), None)


def _clean(prompt: str) -> str:
    return prompt.strip().replace("_", " ").replace("\n", " ")


def _state_words(state: Float[np.ndarray, "S"], minus_one_below: bool) -> str:
    return " ".join(map(str, bin_indices(state, minus_one_below=minus_one_below).tolist()))


def _pad(
    tokenizer: TextTokenizer, prefix: list[int], postfix: list[int], max_len: int, *, truncate: bool
) -> TokenizedPrompt:
    ids = prefix + postfix
    if len(ids) > max_len and not truncate:
        raise TokenizerError(
            expected=f"at most {max_len} tokens (max_token_len)",
            found=f"{len(ids)} tokens: {len(prefix)} of prompt and {len(postfix)} of actions",
            where=f"the prompt {shown(tokenizer.decode(prefix), 300)}",
            next=f"raise max_token_len to at least {len(ids)}, or shorten the instruction",
        )
    index = np.arange(max_len)
    valid = index < len(ids)
    in_postfix = valid & (index >= len(prefix))
    tokens = np.full(max_len, tokenizer.pad_id, np.int64)
    tokens[valid] = ids[:max_len]
    return TokenizedPrompt(tokens=tokens, valid=valid, causal=in_postfix, loss=in_postfix.copy())
