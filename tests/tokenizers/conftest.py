"""Tokenizers that the tests share: fitted ones, which need no file, and published ones, where the shared data is."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from manipi.tokenizers import DctTokenizer, FastTokenizer, FsqTokenizer, SentencePieceTokenizer
from manipi.tokenizers.fsq import FsqConfig, tensor_shapes

SHARED = Path(os.environ.get("MANIPI_SHARED", Path(__file__).parents[3] / "shared"))


def shared(relative: str) -> Path:
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{path} is absent; set MANIPI_SHARED to the shared data")
    return path


@pytest.fixture(scope="session")
def chunks() -> np.ndarray:
    """Smooth random motions, 200 chunks of 16 steps and 7 dimensions."""
    steps = np.random.default_rng(0).normal(scale=0.1, size=(200, 16, 7))
    return np.cumsum(steps, axis=1).clip(-1, 1)


@pytest.fixture(scope="session")
def fitted(chunks) -> FastTokenizer:
    return FastTokenizer.fit(chunks, scale=10, vocab_size=512)


@pytest.fixture(scope="session")
def dct(chunks) -> DctTokenizer:
    return DctTokenizer.fit(chunks)


@pytest.fixture(scope="session")
def universal() -> FastTokenizer:
    return FastTokenizer.load(shared("tokenizers/fast"))


@pytest.fixture(scope="session")
def calvin() -> FastTokenizer:
    return FastTokenizer.load(shared("tokenizers/fast_calvin"))


@pytest.fixture(scope="session")
def paligemma() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(shared("tokenizers/paligemma_tokenizer.rebuilt.model"))


@pytest.fixture(scope="session")
def small_sp_path() -> Path:
    return shared("golden/tokenizer/small_sp.model")


@pytest.fixture(scope="session")
def random_fsq() -> Callable[..., FsqTokenizer]:
    """`random_fsq(causal=True)` has random tensors, small enough that not all digits end up at their bounds."""

    def make(state_dim: int = 0, **changes) -> FsqTokenizer:
        sizes = {"embed_dim": 64, "data_dim": 7, "data_horizon": 16, "num_tokens": 5, "num_layers": 2}
        config = FsqConfig(**sizes | {"target_codebook_size": 2**10} | changes)
        shapes, rng = tensor_shapes(config, state_dim), np.random.default_rng(0)
        arrays = {name: rng.normal(0, 0.15, shapes[name]) for name in shapes}
        return FsqTokenizer.from_tree(arrays, asdict(config))

    return make


@pytest.fixture(scope="session")
def fsq(random_fsq) -> FsqTokenizer:
    """For the shape of `chunks`."""
    return random_fsq()
