"""Decoding that cannot go wrong: which token may come next, so that the codes always spell one whole action chunk.

    "Action: "      codes, as many units as a chunk has      "|"  EOS  pad  pad ...
    forced          free, as long as they fit                forced

A unit is a character in FAST and a code in binning and FSQ (`ActionTokenizer.spellings`). A code fits when it begins no
more units than remain, and when it closes the unit that the code before left open, if it did (the codes of published
FAST tokenizers are runs of UTF-8 bytes). Since single units are codes too, every sequence can be completed, unless the
tokens run out: then decoding stops with an error instead of a part of a chunk.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from manipi.errors import TokenizerError
from manipi.tokenizers.actions import ActionTokenizer
from manipi.tokenizers.prompts import ACTION_MARKER, ACTION_TERMINATOR
from manipi.tokenizers.text import TextTokenizer, codes_from_tokens, tokens_from_codes


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
