"""What every action tokenizer is: FAST, binning and FSQ look the same from outside.

Shape letters: H action horizon, A action dimensions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Float32, Int64


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


ONE_UNIT = Spelling(closes=0, begins=1, opens=0)


class ActionTokenizer(Protocol):
    """Action chunks to codes and back: `FastTokenizer`, `BinningTokenizer` or `FsqTokenizer`."""

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
        ...

    def decode(self, codes: Sequence[int], horizon: int, action_dim: int) -> Float32[np.ndarray, "H A"]:
        """Raises TokenizerError where the codes are no chunk of that shape."""
        ...

    @property
    def spellings(self) -> list[Spelling]:
        """Of every code, for constrained decoding."""
        ...

    def num_units(self, horizon: int, action_dim: int) -> int:
        """How many units a chunk has. Raises TokenizerError where the tokenizer has no chunks of that shape."""
        ...

    def save(self, directory: Path) -> None:
        """Write what the class's own `load` needs into an existing directory."""
        ...
