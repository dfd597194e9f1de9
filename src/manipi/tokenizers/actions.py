"""What every action tokenizer is, and the plainest one: 256 equal bins on [-1, 1].

FAST, binning, FSQ and fixed codes (DCT) look the same from outside. Bins also write the state into prompts:

    value     -1      -1 + 1/128            0                   1 - 1/128     1
               ├──────────┼───── ... ───────┼───── ... ────────────┼──────────┤
    bin              0                             128                  255       (1 and above: 255)

Shape letters: H action horizon, A action dimensions.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Float32, Int, Int64

from manipi.errors import TokenizerError

NUM_BINS = 256
_LEFT_EDGES = np.linspace(-1, 1, NUM_BINS + 1)[:-1]


class Spelling(NamedTuple):
    """What one code adds to a chunk, which is a run of units: characters in FAST, codes elsewhere.

    All zero for a code that no chunk holds.
    """

    closes: int
    """1 where the code ends a unit that the code before has left open."""
    begins: int
    """How many units the code begins."""
    opens: int
    """1 where the last of them stays open."""


class ActionTokenizer(Protocol):
    """Action chunks to codes and back: `FastTokenizer`, `BinningTokenizer`, `FsqTokenizer` or `DctTokenizer`.

    Where nothing else is said, each code is a unit of its own.
    """

    kind: ClassVar[str]

    @property
    def vocab_size(self) -> int: ...
    @property
    def sha256(self) -> str:
        """Equal where the same codes mean the same actions."""
        ...

    def encode(self, actions_HA: Float[np.ndarray, "H A"]) -> list[int]: ...
    def num_codes(self, chunks_NHA: Float[np.ndarray, "N H A"]) -> Int64[np.ndarray, "N"]:
        """The length of `encode` of every chunk, many at a time."""
        return np.full(len(chunks_NHA), self.num_units(*chunks_NHA.shape[1:]), np.int64)

    def decode(self, codes: Sequence[int], horizon: int, action_dim: int) -> Float32[np.ndarray, "H A"]:
        """Raises TokenizerError where the codes are no chunk of that shape."""
        ...

    @property
    def spellings(self) -> list[Spelling]:
        """Of every code, for constrained decoding."""
        return [Spelling(closes=0, begins=1, opens=0)] * self.vocab_size

    def places(self, horizon: int, action_dim: int) -> list[range] | None:
        """The codes that each unit of a chunk may be, where every unit has its own; None: any code that fits."""
        return None

    def num_units(self, horizon: int, action_dim: int) -> int:
        """How many units a chunk has. Raises TokenizerError where the tokenizer has no chunks of that shape."""
        ...

    def save(self, directory: Path) -> None:
        """Write what the class's own `load` needs into an existing directory."""
        ...


def bin_indices(values: Float[np.ndarray, "*shape"], *, minus_one_below: bool = False) -> Int[np.ndarray, "*shape"]:
    """The bin of each value: 0 to 255, where everything beyond the range goes into the outermost bins.

    Args:
        values: normalised numbers, of any shape.
        minus_one_below: openpi's rule, under which a value below -1 has the index -1.

    Raises:
        TokenizerError: a value is not finite.
    """
    require_finite(values, what="values to be binned")
    # The comparison runs in float64, where every edge (a multiple of 1/128) and every float32 is exact.
    indices = np.digitize(np.asarray(values, np.float64), _LEFT_EDGES) - 1
    return indices if minus_one_below else np.maximum(indices, 0)


def bin_left_edges(indices: Int[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """The left edge of each bin: at most 1/128 below every value of [-1, 1] that `bin_indices` put there."""
    return (np.asarray(indices) / NUM_BINS * 2 - 1).astype(np.float32)


@dataclass(frozen=True)
class BinningTokenizer(ActionTokenizer):
    """One code per number (RT-2, Brohan et al. 2023): the plain alternative to `FastTokenizer`, used like it."""

    kind: ClassVar[str] = "binning"

    @property
    def vocab_size(self) -> int:
        return NUM_BINS

    @property
    def sha256(self) -> str:
        return hashlib.sha256(f"{NUM_BINS} equal bins on [-1, 1], left edges".encode()).hexdigest()

    def num_units(self, horizon: int, action_dim: int) -> int:
        return horizon * action_dim

    def encode(self, actions_HA: Float[np.ndarray, "H A"]) -> list[int]:
        """H*A codes, time as the slow axis. Actions beyond [-1, 1] saturate."""
        return bin_indices(actions_HA).ravel().tolist()

    def decode(self, codes: Sequence[int], horizon: int, action_dim: int) -> Float32[np.ndarray, "H A"]:
        """The chunk of the bins' left edges.

        Raises:
            TokenizerError: not exactly horizon * action_dim codes, or a code that is no bin.
        """
        found = np.asarray(codes, np.int64)
        if found.size != horizon * action_dim or np.any((found < 0) | (found >= NUM_BINS)):
            raise TokenizerError(
                expected=f"{horizon} x {action_dim} = {horizon * action_dim} codes from 0 to {NUM_BINS - 1}",
                found=f"{found.size} codes" + (f" from {found.min()} to {found.max()}" if found.size else ""),
                where="binned actions",
                next="check that the model was trained with this horizon and action dimension",
            )
        return bin_left_edges(found.reshape(horizon, action_dim))

    def save(self, directory: Path) -> None:
        """Nothing: the class says it all."""

    @staticmethod
    def load(directory: str | Path) -> "BinningTokenizer":
        return BinningTokenizer()


def require_finite(values: np.ndarray, *, what: str) -> None:
    """Raises a TokenizerError that names the first NaN or infinity; binning and rounding would hide it."""
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        index = tuple(bad[0].tolist())
        raise TokenizerError(
            expected="finite numbers",
            found=f"{np.asarray(values)[index]} at index {index} ({len(bad)} of {np.size(values)} are not finite)",
            where=what,
            next="find the episode and frame with `manipi check`, and the dimension in the norm stats",
        )
