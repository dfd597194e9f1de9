"""FAST: action chunks as short sequences of codes (Pertsch et al. 2025, "FAST: Efficient Action Tokenization").

    actions [H, A]  ──DCT over time──▶  coefficients  ──× scale, round──▶  integers, most of them 0
                                                                              │ − min_token, one character each,
    codes, a tenth as many  ◀──byte-pair encoding──  H*A characters  ◀────────┘ frequency as the slow axis

A published tokenizer spells its characters in UTF-8 bytes, so that a code may stand for half a character; one fitted
here merges whole characters. Shape letters: N chunks, H action horizon, A action dimensions.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int64
from tokenizers import Tokenizer, decoders, models, trainers

from manipi.errors import TokenizerError
from manipi.tokenizers.actions import ActionTokenizer, Spelling, require_finite

_BPE_FILE, _CONFIG_FILE = "tokenizer.json", "processor_config.json"
# Distinct coefficients: as many as UTF-8 has characters of one or two bytes.
_MAX_CHARACTERS = 2048
# The end of an open character, then whole characters of one or two bytes, then the beginning of one that stays open.
_SPELLING = re.compile(rb"([\x80-\xbf]?)(?:[\x00-\x7f]|[\xc2-\xdf][\x80-\xbf])*([\xc2-\xdf]?)")


@dataclass(frozen=True, kw_only=True)
class ReconstructionReport:
    """What a FAST tokenizer loses and costs on a set of chunks, in the units of the actions it was given."""

    max_error: Float64[np.ndarray, "A"]
    mean_error: Float64[np.ndarray, "A"]
    mean_codes: float
    max_codes: int


@dataclass(frozen=True, kw_only=True)
class FastTokenizer(ActionTokenizer):
    """A FAST codec: `encode` and `decode` are inverse up to rounding (at most 0.5 / scale per coefficient).

    A plain value: it pickles into worker processes, and its `sha256` says whether two of them are the same.
    """

    kind: ClassVar[str] = "FAST"
    bpe_json: str = field(repr=False)
    """The byte-pair encoding as the `tokenizers` library writes it (`tokenizer.json`)."""
    scale: float
    min_token: int
    """The integer coefficient that the character 0 stands for."""

    @cached_property
    def bpe(self) -> Tokenizer:
        return Tokenizer.from_str(self.bpe_json)

    @property
    def vocab_size(self) -> int:
        return self.bpe.get_vocab_size()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(f"{self.scale} {self.min_token} {self.bpe_json}".encode()).hexdigest()

    @cached_property
    def byte_level(self) -> bool:
        """Whether the pieces are UTF-8 bytes (published tokenizers) or whole characters (fitted here)."""
        return isinstance(self.bpe.decoder, decoders.ByteLevel)

    @cached_property
    def num_characters(self) -> int:
        """Size of the alphabet, beyond which coefficients saturate."""
        if self.byte_level:
            return _MAX_CHARACTERS
        pieces = self.bpe.get_vocab()
        return next((n for n in range(_MAX_CHARACTERS) if chr(n) not in pieces), _MAX_CHARACTERS)

    @cached_property
    def pieces(self) -> list[bytes]:
        """What each code stands for, in UTF-8."""
        piece_of = {code: piece for piece, code in self.bpe.get_vocab().items()}
        byte_of = _byte_of_symbol() if self.byte_level else {}

        def spell(piece: str) -> bytes:
            return bytes(byte_of[s] for s in piece) if byte_of.keys() >= set(piece) else piece.encode()

        return [spell(piece_of[code]) for code in range(self.vocab_size)]

    @property
    def spellings(self) -> list[Spelling]:
        """In characters, one per coefficient; a code of a byte-level vocabulary may begin or end inside of one."""
        return [_spelling(piece) for piece in self.pieces]

    def num_units(self, horizon: int, action_dim: int) -> int:
        return horizon * action_dim

    def encode(self, actions_HA: Float[np.ndarray, "H A"]) -> list[int]:
        """A chunk of normalised actions to codes. Coefficients beyond the alphabet saturate at its ends.

        Raises:
            TokenizerError: a number is not finite, or the vocabulary lacks a character.
        """
        (text,) = self._texts(np.asarray(actions_HA)[None])
        codes = self.bpe.encode(text, add_special_tokens=False).ids
        # Byte-pair encoding drops what it does not know, without a word.
        if b"".join(self.pieces[code] for code in codes) != text.encode():
            raise TokenizerError(
                expected="a vocabulary with every character of the alphabet",
                found=f"codes that do not spell the {len(text)} characters of the chunk",
                where=f"FAST tokenizer with {self.vocab_size} codes, min_token {self.min_token}",
                next="fit a FAST tokenizer on this dataset",
            )
        return codes

    def num_codes(self, chunks_NHA: Float[np.ndarray, "N H A"]) -> Int64[np.ndarray, "N"]:
        """The length of `encode` of every chunk, in the threads of the library."""
        found = self.bpe.encode_batch_fast(self._texts(chunks_NHA), add_special_tokens=False)
        return np.array([len(one.ids) for one in found], np.int64)

    def _texts(self, chunks_NHA: Float[np.ndarray, "N H A"]) -> list[str]:
        """One character per coefficient, frequency as the slow axis."""
        characters = _quantize(chunks_NHA, self.scale) - self.min_token
        alphabet = np.clip(characters, 0, self.num_characters - 1).astype("<u4")
        return [chunk.tobytes().decode("utf-32-le") for chunk in alphabet]

    def decode(self, codes: Sequence[int], horizon: int, action_dim: int) -> Float32[np.ndarray, "H A"]:
        """Codes to a chunk of normalised actions.

        Args:
            codes: as `encode` returns them, or as a model emits them.
            horizon, action_dim: H and A of the chunk.

        Raises:
            TokenizerError: the codes do not spell exactly horizon * action_dim characters. The published codec returns
                zeros there.
        """
        text, problem = "", ""
        if unknown := [code for code in codes if not 0 <= code < self.vocab_size]:
            problem = f"code {unknown[0]}, where the vocabulary has {self.vocab_size}"
        else:
            spelled = b"".join(self.pieces[code] for code in codes)
            try:
                text = spelled.decode()
            except UnicodeDecodeError as error:
                problem = f"half a character at byte {error.start} of {len(spelled)}"
        if problem or len(text) != horizon * action_dim:
            raise TokenizerError(
                expected=f"codes for {horizon} x {action_dim} = {horizon * action_dim} characters",
                found=problem or f"{len(text)} characters from {len(codes)} codes",
                where="FAST decoding of an action chunk",
                next="decode with CodeConstraint, and check horizon, action dimension and the FAST tokenizer's hash",
            )
        integers = np.array([ord(c) for c in text]).reshape(horizon, action_dim) + self.min_token
        return (dct_matrix(horizon).T @ (integers / self.scale)).astype(np.float32)

    @staticmethod
    def load(directory: str | Path) -> "FastTokenizer":
        """A tokenizer in the published layout: `tokenizer.json` and `processor_config.json`. Runs no remote code.

        Raises:
            TokenizerError: a file is missing or is not of that layout.
        """
        try:
            config = json.loads((Path(directory) / _CONFIG_FILE).read_text(encoding="utf-8"))
            bpe_json = (Path(directory) / _BPE_FILE).read_text(encoding="utf-8")
            fast = FastTokenizer(bpe_json=bpe_json, scale=config["scale"], min_token=config["min_token"])
            if json.loads(bpe_json)["model"]["type"] != "BPE":
                raise ValueError(f"{_BPE_FILE} holds no byte-pair encoding")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TokenizerError(
                expected=f"a FAST tokenizer: {_BPE_FILE}, and {_CONFIG_FILE} with scale and min_token",
                found=repr(error),
                where=str(directory),
                next="name the directory of a published FAST tokenizer, or of one that was fitted and saved",
            ) from error
        return fast

    def save(self, directory: str | Path) -> None:
        """Write the published layout into an existing directory, for `load` or for the published processor."""
        config = {
            "action_dim": None,
            "auto_map": {"AutoProcessor": "processing_action_tokenizer.UniversalActionProcessor"},
            "min_token": self.min_token,
            "processor_class": "UniversalActionProcessor",
            "scale": self.scale,
            "time_horizon": None,
            "vocab_size": self.vocab_size,
        }
        (Path(directory) / _BPE_FILE).write_text(self.bpe_json, encoding="utf-8")
        (Path(directory) / _CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")

    @staticmethod
    def fit(*chunks: Float[np.ndarray, "_N H _A"], scale: float = 10, vocab_size: int = 1024) -> "FastTokenizer":
        """Learn a codec from normalised action chunks. The same chunks always give the same codec.

        Args:
            chunks: normalised actions of the training data, one array per dataset; robots may differ in dimensions.
            scale: finer is more exact and costs more codes; the error per coefficient is at most 0.5 / scale.
            vocab_size: most codes to learn; fewer where the data has no more pairs to merge.

        Raises:
            TokenizerError: no chunks, a number that is not finite, or fewer codes than distinct coefficients.
        """
        if not chunks or any(np.ndim(one) != 3 or 0 in np.shape(one) for one in chunks):
            raise TokenizerError(
                expected="action chunks [N, H, A], none of them 0",
                found=f"shape {', '.join(str(np.shape(one)) for one in chunks)}",
                where="FastTokenizer.fit",
                next="pass at least one chunk",
            )
        sets = [_quantize(one, scale) for one in chunks]
        min_token, max_token = min(int(one.min()) for one in sets), max(int(one.max()) for one in sets)
        num_characters = max_token - min_token + 1
        if num_characters > min(vocab_size, _MAX_CHARACTERS):
            raise TokenizerError(
                expected=f"at most {min(vocab_size, _MAX_CHARACTERS)} distinct coefficients, one code each",
                found=f"coefficients from {min_token} to {max_token}, which are {num_characters}",
                where=f"FastTokenizer.fit with scale {scale}",
                next=f"raise vocab_size (useful up to {_MAX_CHARACTERS}), lower scale, or look for outliers",
            )
        # Over whole characters, each of which is also a code of its own.
        bpe = Tokenizer(models.BPE())
        bpe.decoder = decoders.Fuse()  # type: ignore[assignment]
        alphabet = [chr(n) for n in range(num_characters)]
        settings = {"vocab_size": vocab_size, "min_frequency": 2, "show_progress": False}
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **settings)
        texts = ("".join(map(chr, chunk.ravel() - min_token)) for one in sets for chunk in one)
        bpe.train_from_iterator(texts, trainer)
        return FastTokenizer(bpe_json=bpe.to_str(), scale=scale, min_token=min_token)

    def reconstruction_report(self, chunks: Float[np.ndarray, "N H A"]) -> ReconstructionReport:
        """Encode and decode every chunk, and compare."""
        _, horizon, action_dim = np.shape(chunks)
        codes = [self.encode(chunk) for chunk in chunks]
        decoded = np.stack([self.decode(c, horizon, action_dim) for c in codes])
        error = np.abs(np.asarray(chunks, np.float64) - decoded)
        lengths = [len(c) for c in codes]
        return ReconstructionReport(
            max_error=error.max(axis=(0, 1)),
            mean_error=error.mean(axis=(0, 1)),
            mean_codes=float(np.mean(lengths)),
            max_codes=max(lengths),
        )


def _spelling(piece: bytes) -> Spelling:
    match = _SPELLING.fullmatch(piece)
    if match is None:
        return Spelling(0, 0, 0)
    closes, opens = map(len, match.groups())
    return Spelling(closes, sum(byte & 0xC0 != 0x80 for byte in piece), opens)


def _quantize(chunks_NHA: Float[np.ndarray, "N H A"], scale: float) -> Int[np.ndarray, "N H A"]:
    """Scaled DCT coefficients, rounded half to even."""
    require_finite(chunks_NHA, what="actions for the FAST tokenizer [chunk, time, dimension]")
    chunks_NHA = np.asarray(chunks_NHA, np.float64)
    return np.rint(dct_matrix(chunks_NHA.shape[1]) @ chunks_NHA * scale).astype(np.int64)


@lru_cache
def dct_matrix(horizon: int) -> Float64[np.ndarray, "H H"]:
    """The orthonormal DCT-II, frequency by time: sqrt(2 / H) cos(pi (t + 1/2) f / H), and sqrt(1 / H) for f = 0."""
    frequency, time = np.arange(horizon)[:, None], np.arange(horizon)
    matrix = np.sqrt(2 / horizon) * np.cos(np.pi * (time + 0.5) * frequency / horizon)
    matrix[0] /= np.sqrt(2)
    matrix.flags.writeable = False
    return matrix


@lru_cache
def _byte_of_symbol() -> dict[str, int]:
    """The printable stand-in of each byte in a byte-level vocabulary (the table of GPT-2's tokenizer).

    Printable Latin-1 bytes stand for themselves; the other 68 follow from U+0100 on, in their own order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
