"""Decoding that cannot go wrong: which token may come next, so that the codes always spell one whole action chunk.

    "Action: "      codes, H*A characters in all      "|"  EOS  pad  pad ...
    forced          free, as long as they fit         forced

A code fits when it begins no more characters than remain, and when it closes the character that the code before left
open, if it did (the codes of published FAST tokenizers are runs of UTF-8 bytes). Since single characters are codes too,
every sequence can be completed.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from manipi.errors import TokenizerError
from manipi.tokenizers.fast import FastTokenizer
from manipi.tokenizers.prompts import ACTION_MARKER, ACTION_TERMINATOR
from manipi.tokenizers.text import TextTokenizer, codes_from_tokens, tokens_from_codes

# The end of an open character, then whole characters of one or two bytes, then the beginning of one that stays open.
_SPELLING = re.compile(rb"([\x80-\xbf]?)(?:[\x00-\x7f]|[\xc2-\xdf][\x80-\xbf])*([\xc2-\xdf]?)")


class CodeConstraint:
    """The tokens that may follow, for one FAST tokenizer, one text tokenizer and one chunk shape.

    Raises:
        TokenizerError: the text vocabulary has no room of its own for the codes, or they cannot complete every chunk.
    """

    def __init__(self, fast: FastTokenizer, tokenizer: TextTokenizer, horizon: int, action_dim: int):
        self._tokenizer, self._num_characters = tokenizer, horizon * action_dim
        self._head = tokenizer.encode(ACTION_MARKER)
        self._tail = [*tokenizer.encode(ACTION_TERMINATOR), tokenizer.eos_id]
        self._tokens = tokens_from_codes(tokenizer, np.arange(fast.vocab_size))
        closes, begins, opens = np.array([_spelling(piece) for piece in fast.pieces]).T
        self._closes, self._begins, self._opens = closes.tolist(), begins.tolist(), opens.tolist()
        # Per state (between characters, inside one): the codes by length, and how many of them fit what remains.
        by_length = np.argsort(begins, kind="stable")
        usable_in = [(closes + begins > 0) & (closes == inside) for inside in (0, 1)]
        self._codes = [by_length[usable[by_length]] for usable in usable_in]
        lengths = np.arange(self._num_characters + 1)
        self._num_fitting = [np.searchsorted(begins[codes], lengths, side="right") for codes in self._codes]
        self._require_completable()
        if set(self._tail) & set(self._tokens.tolist()):
            raise TokenizerError(
                expected=f"a vocabulary in which {ACTION_TERMINATOR!r} and EOS are not also action codes",
                found=f"{fast.vocab_size} codes from id {self._tokens.min()} on, and the end marked by {self._tail}",
                where=f"{type(tokenizer).__name__} of {tokenizer.vocab_size} ids",
                next="use a larger text vocabulary, or fit a FAST tokenizer with fewer codes",
            )

    def mask(self, emitted_ids: Sequence[int]) -> Bool[np.ndarray, "vocab_size"]:
        """True for every token that may follow `emitted_ids`, which are all tokens emitted since the prompt's end.

        Raises:
            TokenizerError: `emitted_ids` already break the rule.
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
        remaining, inside = self._num_characters, 0
        codes = codes_from_tokens(self._tokenizer, np.array(ids[head_len:], np.int64)).tolist()
        for position, code in enumerate(codes):
            if remaining == 0 and not inside:
                return self._forced(self._tail, ids[head_len + position :], head_len + position)
            if not self._fits(code, remaining, inside):
                expected = f"a code that fits {remaining} more characters"
                raise _broken(expected, ids[head_len + position], head_len + position)
            remaining, inside = remaining - self._begins[code], self._opens[code]
        if remaining == 0 and not inside:
            return self._forced(self._tail, [], len(ids))
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

    def _require_completable(self) -> None:
        between, inside = self._num_fitting
        if between[1] == 0 or (any(self._opens) and inside[0] == 0):
            raise TokenizerError(
                expected="codes for single characters, and for the end of a character that a code leaves open",
                found=f"{between[1]} and {inside[0]} such codes among {len(self._begins)}",
                where="the FAST tokenizer's vocabulary",
                next="use a published FAST tokenizer, or fit one with FastTokenizer.fit",
            )


def _spelling(piece: bytes) -> tuple[int, int, int]:
    """Whether a piece closes an open character, how many it begins, and whether it leaves the last one open.

    All zero for a piece that never occurs in the spelling of a chunk.
    """
    match = _SPELLING.fullmatch(piece)
    if match is None:
        return 0, 0, 0
    closes, opens = map(len, match.groups())
    return closes, sum(byte & 0xC0 != 0x80 for byte in piece), opens


def _broken(expected: str, found: int, position: int) -> TokenizerError:
    return TokenizerError(
        expected=expected,
        found=f"token {found}",
        where=f"position {position} of the emitted tokens",
        next="choose every token under CodeConstraint.mask, and pass all tokens since the end of the prompt",
    )
