"""Fixed codes: each number of a chunk's coarse shape at a place of its own, for models too small to learn FAST's codes.

    actions [H, A] ──DCT over time──▶ [H, A] ──the K lowest frequencies──▶ [K, A] ──× scale, round──▶ K·A codes

    place        0         1       …   A         A+1     …        every chunk has the same number of codes
    number       dim 0     dim 1   …   dim 0     dim 1   …        the lowest frequency (the mean) comes first
                 frequency 0           frequency 1
    codes        0 … S-1   S … 2S-1    …                          in the order of their numbers, none merged

FAST's first code holds most of the decision, and its classes have no order, so that a near miss teaches nothing. Here
neighbouring codes of a place are neighbouring numbers, and each place is learned by itself. The last of the S codes of
a place is in no chunk: training writes it where a code is to be hidden from those behind it.

Shape letters: N chunks, H action horizon, A action dimensions, K frequencies, S codes per place.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

from manipi.errors import TokenizerError
from manipi.tokenizers.actions import ActionTokenizer, Spelling, require_finite
from manipi.tokenizers.fast import dct_matrix

DCT_FILE = "dct.json"
FIT_ERROR = 0.07
"""What leaving out the higher frequencies may cost, as the root mean square of normalised numbers (a range of 2)."""
ROUNDING = 0.25
"""What rounding costs, as a share of that; up to 1 where the codes would not reach otherwise."""
SATURATED = 5e-4
"""Share of a place's numbers, in each dataset, that may lie beyond its codes."""


@dataclass(frozen=True, kw_only=True)
class DctTokenizer(ActionTokenizer):
    """A codec with `codes_per_place` for each of K·A numbers, which a coefficient beyond them saturates at.

    Robots with fewer dimensions than the widest of the run use the places of those that they have.
    """

    kind: ClassVar[str] = "DCT"
    scale: float
    horizon: int
    lowest: tuple[tuple[int, ...], ...]
    """Per frequency and dimension, [K][A]: the integer that the first code of the place stands for."""
    codes_per_place: int
    """S, with the one that is in no chunk."""

    @property
    def vocab_size(self) -> int:
        return len(self.lowest) * len(self.lowest[0]) * self.codes_per_place

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def spellings(self) -> list[Spelling]:
        place = [Spelling(closes=0, begins=1, opens=0)] * (self.codes_per_place - 1) + [Spelling(0, 0, 0)]
        return place * (self.vocab_size // self.codes_per_place)

    def num_units(self, horizon: int, action_dim: int) -> int:
        """Raises TokenizerError for another horizon than that of the fit, and for more dimensions."""
        if horizon != self.horizon or not 0 < action_dim <= len(self.lowest[0]):
            raise TokenizerError(
                expected=f"chunks of {self.horizon} steps and at most {len(self.lowest[0])} dimensions",
                found=f"{horizon} x {action_dim}",
                where="DCT tokenizer",
                next="use the action_horizon that it was fitted with, or fit one (action_tokenizer='dct')",
            )
        return len(self.lowest) * action_dim

    def places(self, horizon: int, action_dim: int) -> list[range]:
        self.num_units(horizon, action_dim)
        width, size = len(self.lowest[0]), self.codes_per_place
        firsts = [(f * width + d) * size for f in range(len(self.lowest)) for d in range(action_dim)]
        return [range(first, first + size - 1) for first in firsts]

    def encode(self, actions_HA: Float[np.ndarray, "H A"]) -> list[int]:
        """K·A codes, frequency as the slow axis.

        Raises:
            TokenizerError: a number is not finite, or the chunk has another shape than the tokenizer's.
        """
        actions_HA = np.asarray(actions_HA)
        firsts = [place.start for place in self.places(*actions_HA.shape)]
        numbers_KA = self._numbers(actions_HA[None])[0]
        return (np.clip(numbers_KA, 0, self.codes_per_place - 2).ravel() + firsts).tolist()

    def decode(self, codes: Sequence[int], horizon: int, action_dim: int) -> Float32[np.ndarray, "H A"]:
        """The chunk that has these coefficients, and no higher ones.

        Raises:
            TokenizerError: not one code per place, or a code that is not of its place.
        """
        places, (k, a) = self.places(horizon, action_dim), (len(self.lowest), action_dim)
        wrong = [i for i, (code, place) in enumerate(zip(codes, places, strict=False)) if code not in place]
        if len(codes) != len(places) or wrong:
            raise TokenizerError(
                expected=f"{k} x {a} = {len(places)} codes, each from the {self.codes_per_place - 1} of its place",
                found=f"code {codes[wrong[0]]} at place {wrong[0]}" if wrong else f"{len(codes)} codes",
                where="DCT decoding of an action chunk",
                next="decode with CodeConstraint, and check the DCT tokenizer's hash",
            )
        numbers_KA = np.reshape([code - place.start for code, place in zip(codes, places, strict=True)], (k, a))
        coefficients_KA = (numbers_KA + np.array(self.lowest)[:, :a]) / self.scale
        return (dct_matrix(horizon)[:k].T @ coefficients_KA).astype(np.float32)

    def _numbers(self, chunks_NHA: Float[np.ndarray, "N H A"]) -> Int64[np.ndarray, "N K A"]:
        """Codes within their place, before they saturate."""
        k, a = len(self.lowest), chunks_NHA.shape[2]
        numbers_NKA = np.rint(_coefficients(chunks_NHA)[:, :k] * self.scale).astype(np.int64)
        return numbers_NKA - np.array(self.lowest)[:, :a]

    def saturated(self, chunks_NHA: Float[np.ndarray, "N H A"]) -> Float64[np.ndarray, "K A"]:
        """Share of each place's numbers that lie beyond its codes."""
        numbers_NKA = self._numbers(chunks_NHA)
        return ((numbers_NKA < 0) | (numbers_NKA > self.codes_per_place - 2)).mean(axis=0)

    def rms_error(self, chunks_NHA: Float[np.ndarray, "N H A"]) -> float:
        """Root mean square of what encoding and decoding change."""
        decoded = [self.decode(self.encode(chunk), *chunk.shape) for chunk in chunks_NHA]
        return float(np.sqrt(np.mean(np.square(np.stack(decoded) - chunks_NHA))))

    def save(self, directory: Path) -> None:
        (Path(directory) / DCT_FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def load(directory: str | Path) -> "DctTokenizer":
        """Raises TokenizerError where the file is missing or broken."""
        try:
            fields = json.loads((Path(directory) / DCT_FILE).read_text(encoding="utf-8"))
            return DctTokenizer(**{**fields, "lowest": tuple(map(tuple, fields["lowest"]))})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise TokenizerError(
                expected=f"a DCT tokenizer: {DCT_FILE} with scale, horizon, lowest and codes_per_place",
                found=repr(error),
                where=str(directory),
                next="name the directory of a DCT tokenizer that was saved",
            ) from error

    @staticmethod
    def fit(
        *chunks: Float[np.ndarray, "_N H _A"], codes_per_place: int = 64, error: float = FIT_ERROR
    ) -> "DctTokenizer":
        """The fewest frequencies and the coarsest scale that keep to the error, in every dataset.

        Args:
            chunks: normalised actions, one array per dataset, all of one horizon.
            error: root mean square that the missing frequencies may cost. Rounding costs a quarter of it, or up to all
                of it where a place has too few codes for its range.

        Raises:
            TokenizerError: no chunks, a number that is not finite, or too few codes per place even then.
        """
        if not chunks or any(0 in one.shape for one in chunks):
            raise TokenizerError(
                expected="action chunks [N, H, A], none of them 0",
                found=f"shapes {[one.shape for one in chunks]}",
                where="DctTokenizer.fit",
                next="pass at least one chunk",
            )
        horizon, sets = chunks[0].shape[1], [_coefficients(one) for one in chunks]
        # By Parseval, the coefficients that are left out are the error that they leave.
        missing = [np.cumsum(np.square(one).mean(axis=(0, 2))[::-1])[::-1] / horizon for one in sets]
        k = next(k for k in range(1, horizon + 1) if all(sum(m[k : k + 1]) <= error**2 for m in missing))
        # Rounding to steps of s costs s² / 12 per coefficient, of which K in H are kept.
        coarsest = math.sqrt(k / horizon / 12) / error
        # The widest range of all datasets, each without its farthest numbers: small ones count as much as large ones.
        width = max(one.shape[2] for one in sets)
        low_KA, high_KA = np.full((k, width), np.inf), np.full((k, width), -np.inf)
        for one in sets:
            low, high = np.quantile(one[:, :k], (SATURATED / 2, 1 - SATURATED / 2), axis=0)
            mine = np.s_[:, : one.shape[2]]
            low_KA[mine], high_KA[mine] = np.minimum(low_KA[mine], low), np.maximum(high_KA[mine], high)
        room = (codes_per_place - 2) / float(np.max(high_KA - low_KA, initial=1e-6))
        if room < coarsest:
            raise TokenizerError(
                expected=f"at least {math.ceil(coarsest / room * (codes_per_place - 2)) + 2} codes per place",
                found=f"{codes_per_place}, for {k} frequencies and an error of {error} by rounding",
                where="DctTokenizer.fit",
                next="raise model.codes.per_place, or look for outliers with `manipi stats`",
            )
        scale = min(coarsest / ROUNDING, room)
        lowest = np.rint((low_KA + high_KA) / 2 * scale).astype(np.int64) - (codes_per_place - 1) // 2
        integers = tuple(map(tuple, lowest.tolist()))
        return DctTokenizer(scale=scale, horizon=horizon, lowest=integers, codes_per_place=codes_per_place)


def _coefficients(chunks_NHA: Float[np.ndarray, "N H A"]) -> Float64[np.ndarray, "N H A"]:
    require_finite(chunks_NHA, what="actions for the DCT tokenizer [chunk, time, dimension]")
    return dct_matrix(chunks_NHA.shape[1]) @ np.asarray(chunks_NHA, np.float64)
