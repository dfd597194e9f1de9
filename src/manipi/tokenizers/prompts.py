"""The prompt format of each model, and decoding that keeps to it.

    π0      BOS  text  newline
    π0.5    BOS  "Task: text, State: 0 128 255;⏎Action: "
    π0-FAST BOS  "Task: text, State: 0 128 255;⏎"  │  "Action: "  codes  "|"  EOS
            └────────── prefix ─────────────────┘  └───────── postfix ──────────┘
    causal  0 0 0 ...                              1 1 1 ...       each token sees the whole prefix and the past
    loss    0 0 0 ...                              1 1 1 ...       the postfix is what the model learns to emit

The formats are openpi's, because the released weights were trained on them. With text that the model learns to write
(ours; the published models' separators are not known) the marker comes behind it, and codes follow on a branch:

    π0.5    BOS  "Task: text, State: 0 128 255;⏎"  │ "Subtask: "  text ⏎  "Action: " ┊ codes  "|"  EOS
    π0      BOS  text  newline                     │ "Subtask: "  text ⏎             ┊ codes  "|"  EOS
    both    BOS  question  newline                 │ "Answer: "   text ⏎
    causal  0 0 0 ...                                1 1 1 ...                         1 1 1 ...
    loss    0 0 0 ...                                0 0 0 ...    1 1 1   0 0 0 ...    1 1 1 ...

Constrained decoding allows the tokens that may come next, so that the codes always spell one whole action chunk:

    "Action: "      codes, as many units as a chunk has      "|"  EOS  pad  pad ...
    forced          free, as long as they fit                forced

A unit is a character in FAST and a code elsewhere (`ActionTokenizer.spellings`). A code fits when it begins no
more units than remain, and when it closes the unit that the code before left open, if it did (the codes of published
FAST tokenizers are runs of UTF-8 bytes). Since single units are codes too, every sequence can be completed, unless the
tokens run out: then decoding stops with an error instead of a part of a chunk.

Shape letters: L prompt length (max_len), S state dimensions, H action horizon, A action dimensions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int64

from manipi.errors import TokenizerError, shown
from manipi.tokenizers.actions import ActionTokenizer, bin_indices
from manipi.tokenizers.text import TextTokenizer, codes_from_tokens, tokens_from_codes

ACTION_MARKER = "Action: "
ACTION_TERMINATOR = "|"
SUBTASK_MARKER, ANSWER_MARKER = "Subtask: ", "Answer: "


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


class Run(NamedTuple):
    """Tokens of one kind, which follow each other."""

    ids: list[int]
    causal: bool = False
    loss: bool = False


def pi05_tokens(
    tokenizer: TextTokenizer, prompt: str, state: Float[np.ndarray, "S"] | None, *, minus_one_below: bool = False
) -> list[int]:
    """π0.5's format, however long: the state is part of the text, one bin number per dimension.

    Args:
        prompt: the instruction. Underscores and newlines become spaces; case stays.
        state: normalised to [-1, 1], before padding to the model's width; None gives π0's format, which is π0.5's for
            robots whose state is not in the prompt.
        minus_one_below: openpi's rule for a state below -1, whose bin reads "-1"; by default it is 0.

    Raises:
        TokenizerError: a state that is not finite.
    """
    clean = prompt.strip().replace("_", " ").replace("\n", " ")
    if state is None:
        # The newline is encoded apart: SentencePiece could otherwise merge it with what precedes.
        return [tokenizer.bos_id, *tokenizer.encode(clean), *tokenizer.encode("\n")]
    text = f"Task: {clean}, State: {_state_words(state, minus_one_below)};\n{ACTION_MARKER}"
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def text_runs(
    tokenizer: TextTokenizer,
    prompt: str,
    state: Float[np.ndarray, "S"] | None,
    marker: str,
    text: str | None,
    *,
    minus_one_below: bool = False,
) -> tuple[list[int], list[Run]]:
    """A prompt and the text that the model writes behind it, or shall write where it is None, for `padded`.

    Args:
        prompt, state, minus_one_below: as in `pi05_tokens`.
        marker: `SUBTASK_MARKER`, after which actions follow, or `ANSWER_MARKER`, after which nothing does.
        text: underscores and newlines become spaces.
    """
    if state is None:
        prefix = pi05_tokens(tokenizer, prompt, None)
    else:
        prefix = fast_prefix(tokenizer, prompt.replace("\n", " "), state, minus_one_below=minus_one_below)
    runs = [Run(tokenizer.encode(marker), causal=True)]
    if text is None:
        return prefix, runs
    written = [*tokenizer.encode(text.strip().replace("_", " ").replace("\n", " ")), *tokenizer.encode("\n")]
    runs.append(Run(written, causal=True, loss=True))
    acts = marker == SUBTASK_MARKER and state is not None
    return prefix, [*runs, Run(tokenizer.encode(ACTION_MARKER), causal=True)] if acts else runs


def fast_prefix(
    tokenizer: TextTokenizer,
    prompt: str,
    state: Float[np.ndarray, "S"],
    *,
    lower_case: bool = False,
    minus_one_below: bool = False,
) -> list[int]:
    """π0-FAST's format up to the actions, however long.

    Args:
        prompt: the instruction. Underscores become spaces; newlines and case stay.
        state, minus_one_below: as in `pi05_tokens`.
        lower_case: lower-case the instruction, as openpi does for π0-FAST alone.

    Raises:
        TokenizerError: a state that is not finite.
    """
    clean = (prompt.lower() if lower_case else prompt).strip().replace("_", " ")
    text = f"Task: {clean}, State: {_state_words(state, minus_one_below)};\n"
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def fast_postfix(tokenizer: TextTokenizer, codes: Sequence[int]) -> list[int]:
    """The actions in π0-FAST's format, which the model learns to emit. Raises as `tokens_from_codes` does."""
    return [*tokenizer.encode(ACTION_MARKER), *code_tokens(tokenizer, codes)]


def code_tokens(tokenizer: TextTokenizer, codes: Sequence[int]) -> list[int]:
    """The codes and their end mark, behind "Action: ". Raises as `tokens_from_codes` does."""
    tokens = tokens_from_codes(tokenizer, np.array(codes, np.int64)).tolist()
    return [*tokens, *tokenizer.encode(ACTION_TERMINATOR), tokenizer.eos_id]


def padded(
    tokenizer: TextTokenizer,
    prefix: list[int],
    max_len: int,
    *,
    postfix: Sequence[int] = (),
    text: Sequence[Run] = (),
    truncate: bool = False,
) -> TokenizedPrompt:
    """The prompt that the model reads.

    Args:
        prefix: what it is given.
        max_len: length of the result.
        postfix: what π0-FAST is trained to emit; none at inference, where it emits all of it itself.
        text: what follows the prefix where text is written (`text_runs`).
        truncate: cut an overlong prompt at max_len, as openpi does, instead of raising.

    Raises:
        TokenizerError: more than max_len tokens.
    """
    runs = [Run(prefix), *text, Run(list(postfix), causal=True, loss=True)]
    ids = [token for run in runs for token in run.ids]
    if len(ids) > max_len and not truncate:
        emitted, kind = sum(len(run.ids) for run in runs if run.loss), "text" if text else "actions"
        raise TokenizerError(
            expected=f"at most {max_len} tokens (max_token_len)",
            found=f"{len(ids)} tokens: {len(ids) - emitted} of prompt and {emitted} of {kind}",
            where=f"the prompt {shown(tokenizer.decode(prefix), 300)}",
            next=f"raise max_token_len to at least {len(ids)}, or shorten the instruction",
        )
    valid = np.arange(max_len) < len(ids)
    tokens, marks = np.full(max_len, tokenizer.pad_id, np.int64), np.zeros((2, max_len), bool)
    tokens[valid] = ids[:max_len]
    for mark, each in zip(marks, ("causal", "loss"), strict=True):
        mark[valid] = np.repeat([getattr(run, each) for run in runs], [len(run.ids) for run in runs])[:max_len]
    return TokenizedPrompt(tokens=tokens, valid=valid, causal=marks[0], loss=marks[1])


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


def _state_words(state: Float[np.ndarray, "S"], minus_one_below: bool) -> str:
    return " ".join(map(str, bin_indices(state, minus_one_below=minus_one_below).tolist()))


class CodeConstraint:
    """The tokens that may follow, for one action tokenizer, one text tokenizer and one chunk shape.

    Args:
        max_tokens: how many tokens the model may emit in all.
        marked: whether it emits "Action: " first; otherwise the prompt ends with that.
        setting: of the model, that says `max_tokens`.

    Raises:
        TokenizerError: the text vocabulary has no room of its own for the codes, the codes cannot complete every chunk,
            the action tokenizer has no chunks of that shape, or even the shortest spelling has too many tokens.
    """

    def __init__(
        self,
        action: ActionTokenizer,
        tokenizer: TextTokenizer,
        horizon: int,
        action_dim: int,
        max_tokens: int,
        *,
        marked: bool = True,
        setting: str = "max_token_len",
    ):
        self._setting = setting
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._num_units, self._places = action.num_units(horizon, action_dim), action.places(horizon, action_dim)
        self._head = tokenizer.encode(ACTION_MARKER) if marked else []
        self._tail = [*tokenizer.encode(ACTION_TERMINATOR), tokenizer.eos_id]
        self._tokens = tokens_from_codes(tokenizer, np.arange(action.vocab_size))
        self._spellings = action.spellings
        closes, begins, opens = np.array(self._spellings).T
        self._longest, broken_units = int(begins.max()), bool(opens.any())
        self._codes_per_unit = 2 if broken_units else 1  # One to open it, and one to close it.
        # Per state (between units, inside one): the codes by length, and how many of them fit what remains.
        by_length = np.argsort(begins, kind="stable")
        usable_in = [(closes + begins > 0) & (closes == inside) for inside in (0, 1)]
        self._codes = [by_length[usable[by_length]] for usable in usable_in]
        lengths = np.arange(self._num_units + 1)
        self._num_fitting = [np.searchsorted(begins[codes], lengths, side="right") for codes in self._codes]
        between, inside = self._num_fitting
        if between[1] == 0 or (broken_units and inside[0] == 0):
            raise TokenizerError(
                expected="codes for single characters, and for the end of a character that a code leaves open",
                found=f"{between[1]} and {inside[0]} such codes among {len(begins)}",
                where=f"the {action.kind} tokenizer's vocabulary",
                next="use a published FAST tokenizer, or fit one with FastTokenizer.fit",
            )
        if set(self._tail) & set(self._tokens.tolist()):
            raise TokenizerError(
                expected=f"a vocabulary in which {ACTION_TERMINATOR!r} and EOS are not also action codes",
                found=f"{action.vocab_size} codes from id {self._tokens.min()} on, and the end marked by {self._tail}",
                where=f"{type(tokenizer).__name__} of {tokenizer.vocab_size} ids",
                next=f"use a larger text vocabulary, or a {action.kind} tokenizer with fewer codes",
            )
        self._require_budget(self._num_units, 0, len(self._head))

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
            closes, begins, opens = self._spellings[code] if 0 <= code < len(self._spellings) else (0, 0, 0)
            misplaced = self._places is not None and code not in self._places[self._num_units - remaining]
            if closes != inside or begins > remaining or closes + begins == 0 or misplaced:
                expected = f"a code that fits {remaining} more units"
                raise _broken(expected, ids[head_len + position], head_len + position)
            remaining, inside = remaining - begins, opens
        if remaining == 0 and not inside:
            return self._forced(self._tail, [], len(ids))
        self._require_budget(remaining, inside, len(ids))
        if self._places is not None:
            place = self._places[self._num_units - remaining]
            return self._tokens[place.start : place.stop]
        return self._tokens[self._codes[inside][: self._num_fitting[inside][remaining]]]

    def _forced(self, wanted: list[int], emitted: list[int], start: int) -> Int[np.ndarray, "1"]:
        """The next of `wanted`, and padding behind its end; `start` is the position of `emitted` in the sequence."""
        padded = wanted + [self._tokenizer.pad_id] * (len(emitted) + 1 - len(wanted))
        for position, (expected, found) in enumerate(zip(padded, emitted, strict=False)):
            if found != expected:
                raise _broken(f"the forced token {expected}", found, start + position)
        return np.array(padded[len(emitted) : len(emitted) + 1])

    def _require_budget(self, remaining: int, inside: int, num_emitted: int) -> None:
        """Raises where `max_tokens` come before the end even if only the longest codes follow."""
        fewest = max(math.ceil(remaining / self._longest), inside) + len(self._tail)
        if num_emitted + fewest > self._max_tokens:
            always_enough = len(self._head) + self._codes_per_unit * self._num_units + len(self._tail)
            raise TokenizerError(
                expected=f"a whole action chunk within {self._max_tokens} tokens ({self._setting})",
                found=f"{remaining} of its {self._num_units} units missing after {num_emitted} tokens",
                where="decoding of action codes",
                next=f"raise {self._setting}; {always_enough} tokens hold any chunk, however badly it compresses",
            )


def _broken(expected: str, found: int, position: int) -> TokenizerError:
    return TokenizerError(
        expected=expected,
        found=f"token {found}",
        where=f"position {position} of the emitted tokens",
        next="choose every token under CodeConstraint.mask, and pass all tokens since the end of the prompt",
    )
