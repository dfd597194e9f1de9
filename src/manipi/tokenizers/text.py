"""Text tokenizers: words to token ids and back, and where action codes live in the vocabulary.

    PaliGemma, 257152 ids                                       ByteTokenizer, 1011 + room for codes
    ┌──────────────────────┬───────────────┬──────────────┐     ┌───────────┬───────┬───────┬─────────┬──────────┐
    │ pad eos bos unk, text│ <loc0000> ... │ <seg000> ... │     │pad eos bos│ bytes │ words │ numbers │          │
    └──────────────────────┴───────────────┴──────────────┘     └───────────┴───────┴───────┴─────────┴──────────┘
         ← action codes 2047 … 1024 … 0 ───┘└ reserved 128             action codes  … 2 1 0 ────┘ (reserved 0)

An action code c has the id `vocab_size - 1 - reserved_ids - c`: codes grow downwards from the end (openpi's rule for
π0-FAST). In PaliGemma's vocabulary the codes above 1023 share their ids with rare text pieces.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import sentencepiece
from jaxtyping import Int

from manipi.errors import ConfigError, IntegrityError, TokenizerError, unknown_name


@dataclass(frozen=True, kw_only=True)
class TokenizerReference:
    """What a checkpoint stores about its tokenizer: enough to build it again and to know that it is the same one.

    All fields are plain JSON values.
    """

    kind: str
    """`sentencepiece` or `byte`."""
    vocab_size: int
    reserved_ids: int
    sha256: str
    """Of the model file, or of the definition where there is no file."""
    file: str | None = None
    """Name of the model file inside the tokenizer directory."""


class SentencePieceTokenizer:
    """A SentencePiece model file; PaliGemma's is the one of the released π checkpoints.

    Args:
        path: the `.model` file.
        reserved_ids: ids at the end that action codes skip (PaliGemma: the 128 `<seg...>` pieces).

    Raises:
        TokenizerError: no such file, no such model in it, or a model without pad, EOS, BOS and unknown.
    """

    FILE_NAME = "tokenizer.model"

    def __init__(self, path: str | Path, *, reserved_ids: int = 128):
        try:
            self._model = Path(path).read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except (OSError, RuntimeError) as error:
            raise TokenizerError(
                expected="a SentencePiece model file",
                found=str(error),
                where=str(path),
                next="name the path of PaliGemma's tokenizer; it lies at gs://big_vision/paligemma_tokenizer.model",
            ) from error
        processor = self._processor
        self.vocab_size, self.reserved_ids = processor.vocab_size(), reserved_ids
        self.pad_id, self.eos_id, self.bos_id = processor.pad_id(), processor.eos_id(), processor.bos_id()
        control_ids = self.pad_id, self.eos_id, self.bos_id, processor.unk_id()
        if min(control_ids) < 0:
            raise TokenizerError(
                expected="pad, EOS, BOS and unknown pieces",
                found=f"the ids {control_ids} (-1: absent)",
                where=str(path),
                next="use PaliGemma's tokenizer, or train the model with all four",
            )
        self.code_capacity = self.vocab_size - reserved_ids - max(control_ids) - 1
        self.reference = TokenizerReference(
            kind="sentencepiece",
            vocab_size=self.vocab_size,
            reserved_ids=reserved_ids,
            sha256=hashlib.sha256(self._model).hexdigest(),
            file=self.FILE_NAME,
        )

    @cached_property
    def pieces_sha256(self) -> str:
        """Of the vocabulary: every piece with its kind, in the order of the ids.

        Files with the same vocabulary may differ in what their trainer noted beside it; this digest does not.
        """
        p, ids = self._processor, list(range(self.vocab_size))
        kinds = (p.is_control, p.is_unknown, p.is_unused, p.is_byte)
        columns = zip(p.id_to_piece(ids), *(kind(ids) for kind in kinds), strict=True)
        # Not `repr`, which escapes what this Python's edition of Unicode cannot print.
        return hashlib.sha256("".join(map(ascii, columns)).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text; pad, BOS and EOS vanish in it."""
        return self._processor.decode([int(i) for i in ids])

    def save(self, directory: Path) -> TokenizerReference:
        (Path(directory) / self.FILE_NAME).write_bytes(self._model)
        return self.reference


_WORDS = """
a an and arm at away back bag ball banana basket bed behind beside between bin black block blue book bottle bowl box
bread brown button can carrot cabinet cloth close coffee cook cube cup cyan down drawer drop egg fold from fork front
gray green gripper hand hang home in insert inside into it knife left lid lift lower microwave middle move mug near of
off on onto open orange out over pan pen pick pink place plate plug pot pour press pull purple push put reach red
remove right rotate shelf sink slide spoon stack sponge stove table take that the then to top touch towel toward tray
turn two under up white wipe with yellow
"""
INSTRUCTION_WORDS = tuple(_WORDS.split())
"""Words that robots are told again and again, each one token of the byte tokenizer."""


class ByteTokenizer:
    """UTF-8 bytes, and one token for each frequent piece of a robot's prompt. Needs no file.

        "Task: reach the zebra, State: 12 200;⏎Action: "
         └──┬─┘└─┬─┘└┬─┘␣ z e b r a└───┬───┘│└─┬─┘└───┬────┘
         format word word   bytes    format number␣ number format

    A whole number from 0 to 255 and a word of `INSTRUCTION_WORDS` are one token each where they stand alone, with the
    space before them or without. Small models learn words faster than spelling. `decode(encode(text)) == text` always.

    Args:
        vocab_size: `NUM_TEXT_IDS`, plus room for action codes at the end.
    """

    _FORMATS = ("Task: ", ", State: ", ";\nAction: ", "Action: ")
    _UNITS = (*INSTRUCTION_WORDS, *map(str, range(256)))
    _PIECES = (*_FORMATS, *_UNITS, *(f" {unit}" for unit in _UNITS))
    NUM_TEXT_IDS = 3 + 256 + len(_PIECES)
    pad_id, eos_id, bos_id = 0, 1, 2
    reserved_ids = 0
    _FIRST_BYTE, _FIRST_PIECE = 3, 259
    # What stands alone has no letter, digit or underscore beside it: "-1 25" holds 1 and 25, "007 a1 256" nothing.
    _PATTERN = re.compile(
        "|".join(map(re.escape, sorted(_FORMATS, key=len, reverse=True)))
        + rf"| ?(?<!\w)(?:{'|'.join(INSTRUCTION_WORDS)}|25[0-5]|2[0-4][0-9]|1[0-9]{{2}}|[1-9]?[0-9])(?!\w)"
    )

    def __init__(self, vocab_size: int = NUM_TEXT_IDS):
        if vocab_size < self.NUM_TEXT_IDS:
            raise ConfigError(
                expected=f"a vocabulary of at least {self.NUM_TEXT_IDS} ids (control, bytes, words, numbers)",
                found=str(vocab_size),
                where="ByteTokenizer.vocab_size",
                next=f"use {self.NUM_TEXT_IDS} plus the number of action codes",
            )
        self.vocab_size, self.code_capacity = vocab_size, vocab_size - self.NUM_TEXT_IDS
        self._ids = {piece: self._FIRST_PIECE + i for i, piece in enumerate(self._PIECES)}
        definition = f"byte tokenizer, {self._PIECES}, {vocab_size} ids"
        digest = hashlib.sha256(definition.encode()).hexdigest()
        self.reference = TokenizerReference(kind="byte", vocab_size=vocab_size, reserved_ids=0, sha256=digest)

    def encode(self, text: str) -> list[int]:
        ids, position = [], 0
        for match in self._PATTERN.finditer(text):
            ids += [self._FIRST_BYTE + byte for byte in text[position : match.start()].encode()]
            ids.append(self._ids[match.group()])
            position = match.end()
        return ids + [self._FIRST_BYTE + byte for byte in text[position:].encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """The text; pad, BOS and EOS vanish in it, and action codes show as `<code7>`."""
        if wrong := [id for id in ids if not 0 <= id < self.vocab_size]:
            raise TokenizerError(
                expected=f"ids from 0 to {self.vocab_size - 1}",
                found=str(wrong[0]),
                where="ByteTokenizer.decode",
                next="check that model and tokenizer have the same vocab_size",
            )
        return b"".join(self._spelled[id] for id in ids).decode(errors="replace")

    @cached_property
    def _spelled(self) -> list[bytes]:
        """What each id stands for."""
        texts = [*self._PIECES, *(f"<code{code}>" for code in reversed(range(self.code_capacity)))]
        return [b""] * 3 + [bytes([byte]) for byte in range(256)] + [text.encode() for text in texts]

    def save(self, directory: Path) -> TokenizerReference:
        return self.reference


TextTokenizer: TypeAlias = SentencePieceTokenizer | ByteTokenizer
"""Words to ids and back, in a vocabulary of `vocab_size` ids; those of pad, BOS and EOS are `pad_id` and so on.

`encode` adds neither BOS nor EOS; that is the prompt format's business. The vocabulary has room for `code_capacity`
action codes, which skip the `reserved_ids` at its very end. `save` writes what `load_tokenizer` needs into an existing
directory, and returns the `reference` that it asks for.
"""


def load_tokenizer(reference: TokenizerReference, directory: str | Path) -> TextTokenizer:
    """The tokenizer that `save` described.

    Raises:
        IntegrityError: its file is missing, or the content differs from the reference.
        UnknownNameError: a kind that this version does not know.
    """
    where = Path(directory) / (reference.file or "")
    if reference.file is not None:
        found = hashlib.sha256(where.read_bytes()).hexdigest() if where.is_file() else "no such file"
        _require_same(reference.sha256, found, where)
    if reference.kind == "byte":
        tokenizer: TextTokenizer = ByteTokenizer(reference.vocab_size)
    elif reference.kind == "sentencepiece":
        tokenizer = SentencePieceTokenizer(where, reserved_ids=reference.reserved_ids)
    else:
        raise unknown_name("tokenizer", reference.kind, ["byte", "sentencepiece"], next="update manipi")
    _require_same(str(reference), str(tokenizer.reference), where)
    return tokenizer


PALIGEMMA_PIECES_SHA256 = "6ef8ab57e8e8de5e83d941e7c5165db4da1a6ed6cad3b0e91348d248140d4802"
"""`SentencePieceTokenizer.pieces_sha256` of PaliGemma's vocabulary, the one of every released checkpoint."""

PALIGEMMA_VOCABULARY = 257_152
"""Its ids, and the rows of the released models' token embedding."""


def require_paligemma(tokenizer: TextTokenizer) -> None:
    """For models of 257,152 ids. Raises TokenizerError where the vocabulary is not PaliGemma's, id by id."""
    found = tokenizer.pieces_sha256 if isinstance(tokenizer, SentencePieceTokenizer) else "no pieces"
    if found != PALIGEMMA_PIECES_SHA256:
        raise TokenizerError(
            expected=f"PaliGemma's tokenizer, 257,152 pieces (sha256 {PALIGEMMA_PIECES_SHA256[:12]})",
            found=f"a {tokenizer.reference.kind} tokenizer of {tokenizer.vocab_size:,} ids ({found[:12]})",
            where="the text tokenizer for a checkpoint that was trained with PaliGemma's",
            next="use gs://big_vision/paligemma_tokenizer.model; with other pieces the prompts would be noise",
        )


def _require_same(expected: str, found: str, where: Path) -> None:
    if found != expected:
        next = "restore the file from the checkpoint it came with; another tokenizer means other token ids"
        raise IntegrityError(expected=expected, found=found, where=str(where), next=next)


def tokens_from_codes(tokenizer: TextTokenizer, codes: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Action codes to token ids: `vocab_size - 1 - reserved_ids - code`, which is its own inverse.

    Raises:
        TokenizerError: a code that the vocabulary has no room for.
    """
    codes = np.asarray(codes, np.int64)
    if codes.size and (codes.min() < 0 or codes.max() >= tokenizer.code_capacity):
        raise TokenizerError(
            expected=f"action codes from 0 to {tokenizer.code_capacity - 1}, the room in the vocabulary",
            found=f"codes from {codes.min()} to {codes.max()}",
            where=f"{type(tokenizer).__name__} of {tokenizer.vocab_size} ids",
            next="raise the tokenizer's vocab_size, or fit an action tokenizer with fewer codes",
        )
    return tokenizer.vocab_size - 1 - tokenizer.reserved_ids - codes


def codes_from_tokens(tokenizer: TextTokenizer, ids: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Token ids to action codes; ids that are no codes give numbers outside [0, code_capacity)."""
    return tokenizer.vocab_size - 1 - tokenizer.reserved_ids - np.asarray(ids, np.int64)
