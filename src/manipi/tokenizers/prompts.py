"""The prompt format of each model, and decoding that keeps to it.

    π0      BOS  text  newline
    π0.5    BOS  "Task: text, State: 0 128 255;⏎Action: "
    π0-FAST BOS  "Task: text, State: 0 128 255;⏎"  │  "Action: "  codes  "|"  EOS
            └────────── prefix ─────────────────┘  └───────── postfix ──────────┘
    causal  0 0 0 ...                              1 1 1 ...       each token sees the whole prefix and the past
    loss    0 0 0 ...                              1 1 1 ...       the postfix is what the model learns to emit

The formats are openpi's, because the released weights were trained on them.
Constrained decoding allows the tokens that may come next, so that the codes always spell one whole action chunk:

    "Action: "      codes, as many units as a chunk has      "|"  EOS  pad  pad ...
    forced          free, as long as they fit                forced

A unit is a character in FAST and a code in binning and FSQ (`ActionTokenizer.spellings`). A code fits when it begins no
more units than remain, and when it closes the unit that the code before left open, if it did (the codes of published
FAST tokenizers are runs of UTF-8 bytes). Since single units are codes too, every sequence can be completed, unless the
tokens run out: then decoding stops with an error instead of a part of a chunk.

Shape letters: L prompt length (max_len), S state dimensions, H action horizon, A action dimensions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Int64

from manipi.errors import TokenizerError, shown
from manipi.tokenizers.actions import ActionTokenizer, bin_indices
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
        found, marker = None, tokenizer.encode(ACTION_MARKER)
        if (start := _find(list(ids), marker)) is not None:
            after = list(ids)[start + len(marker) :]
            ends = (_find(after, tokenizer.encode(ACTION_TERMINATOR)), _find(after, [tokenizer.eos_id]))
            found = after[: min((end for end in ends if end is not None), default=len(after))]
    if found is None:
        raise TokenizerError(
            expected=f"the tokens of {ACTION_MARKER!r}",
            found=shown(tokenizer.decode(list(ids)), 100),
            where=f"the {len(ids)} tokens that the model emitted",
            next="decode with CodeConstraint, or train longer",
        )
    return codes_from_tokens(tokenizer, np.array(found, np.int64)).tolist()


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


class CodeConstraint:
    """The tokens that may follow, for one action tokenizer, one text tokenizer and one chunk shape.

    Args:
        max_tokens: how many tokens the model may emit in all.

    Raises:
        TokenizerError: the text vocabulary has no room of its own for the codes, the codes cannot complete every chunk,
            the action tokenizer has no chunks of that shape, or even the shortest spelling has too many tokens.
    """

    def __init__(
        self, action: ActionTokenizer, tokenizer: TextTokenizer, horizon: int, action_dim: int, max_tokens: int
    ):
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._num_units = action.num_units(horizon, action_dim)
        self._head = tokenizer.encode(ACTION_MARKER)
        self._tail = [*tokenizer.encode(ACTION_TERMINATOR), tokenizer.eos_id]
        self._tokens = tokens_from_codes(tokenizer, np.arange(action.vocab_size))
        closes, begins, opens = np.array(action.spellings).T
        self._closes, self._begins, self._opens = closes.tolist(), begins.tolist(), opens.tolist()
        # Per state (between units, inside one): the codes by length, and how many of them fit what remains.
        by_length = np.argsort(begins, kind="stable")
        usable_in = [(closes + begins > 0) & (closes == inside) for inside in (0, 1)]
        self._codes = [by_length[usable[by_length]] for usable in usable_in]
        lengths = np.arange(self._num_units + 1)
        self._num_fitting = [np.searchsorted(begins[codes], lengths, side="right") for codes in self._codes]
        self._require_completable(action.kind)
        if set(self._tail) & set(self._tokens.tolist()):
            raise TokenizerError(
                expected=f"a vocabulary in which {ACTION_TERMINATOR!r} and EOS are not also action codes",
                found=f"{action.vocab_size} codes from id {self._tokens.min()} on, and the end marked by {self._tail}",
                where=f"{type(tokenizer).__name__} of {tokenizer.vocab_size} ids",
                next=f"use a larger text vocabulary, or a {action.kind} tokenizer with fewer codes",
            )
        self._require_budget(self._num_units, len(self._head))

    def mask(self, emitted_ids: Sequence[int]) -> Bool[np.ndarray, "vocab_size"]:
        """True for every token that may follow `emitted_ids`, which are all tokens emitted since the prompt's end.

        Raises:
            TokenizerError: `emitted_ids` already break the rule, or leave too few tokens for the rest of the chunk.
        """
        mask = np.zeros(self._tokenizer.vocab_size, bool)
        mask[self.allowed(emitted_ids)] = True
        return mask

    def allowed(self, emitted_ids: Sequence[int]) -> Int[np.ndarray, "n"]:
        """The ids that `mask` is true for."""
        ids, head_len = list(emitted_ids), len(self._head)
        if len(ids) < head_len:
            return self._forced(self._head, ids, 0)
        self._forced(self._head, ids[:head_len], 0)
        remaining, inside = self._num_units, 0
        codes = codes_from_tokens(self._tokenizer, np.array(ids[head_len:], np.int64)).tolist()
        for position, code in enumerate(codes):
            if remaining == 0 and not inside:
                return self._forced(self._tail, ids[head_len + position :], head_len + position)
            if not self._fits(code, remaining, inside):
                expected = f"a code that fits {remaining} more units"
                raise _broken(expected, ids[head_len + position], head_len + position)
            remaining, inside = remaining - self._begins[code], self._opens[code]
        if remaining == 0 and not inside:
            return self._forced(self._tail, [], len(ids))
        self._require_budget(remaining, len(ids))
        return self._tokens[self._codes[inside][: self._num_fitting[inside][remaining]]]

    def _fits(self, code: int, remaining: int, inside: int) -> bool:
        return (
            0 <= code < len(self._begins)
            and self._closes[code] == inside
            and self._closes[code] + self._begins[code] > 0
            and self._begins[code] <= remaining
        )

    def _forced(self, wanted: list[int], emitted: list[int], start: int) -> Int[np.ndarray, "1"]:
        """The next of `wanted`, and padding behind its end; `start` is the position of `emitted` in the sequence."""
        padded = wanted + [self._tokenizer.pad_id] * (len(emitted) + 1 - len(wanted))
        for position, (expected, found) in enumerate(zip(padded, emitted, strict=False)):
            if found != expected:
                raise _broken(f"the forced token {expected}", found, start + position)
        return np.array(padded[len(emitted) : len(emitted) + 1])

    def _require_budget(self, remaining: int, num_emitted: int) -> None:
        """Raises where `max_tokens` come before the end even if only the longest codes follow."""
        fewest = math.ceil(remaining / max(self._begins)) + len(self._tail)
        if num_emitted + fewest > self._max_tokens:
            codes_per_unit = 2 if any(self._opens) else 1  # One to open it, and one to close it.
            always_enough = len(self._head) + codes_per_unit * self._num_units + len(self._tail)
            raise TokenizerError(
                expected=f"a whole action chunk within {self._max_tokens} tokens (max_token_len)",
                found=f"{remaining} of its {self._num_units} units missing after {num_emitted} tokens",
                where="decoding of action codes",
                next=f"raise max_token_len; {always_enough} tokens hold any chunk, however badly it compresses",
            )

    def _require_completable(self, kind: str) -> None:
        between, inside = self._num_fitting
        if between[1] == 0 or (any(self._opens) and inside[0] == 0):
            raise TokenizerError(
                expected="codes for single characters, and for the end of a character that a code leaves open",
                found=f"{between[1]} and {inside[0]} such codes among {len(self._begins)}",
                where=f"the {kind} tokenizer's vocabulary",
                next="use a published FAST tokenizer, or fit one with FastTokenizer.fit",
            )


def _broken(expected: str, found: int, position: int) -> TokenizerError:
    return TokenizerError(
        expected=expected,
        found=f"token {found}",
        where=f"position {position} of the emitted tokens",
        next="choose every token under CodeConstraint.mask, and pass all tokens since the end of the prompt",
    )
