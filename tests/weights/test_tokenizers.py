"""Tokenizers in folders, each recognised by its files."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from manipi.errors import TokenizerError, WeightsMismatchError
from manipi.tokenizers import ByteTokenizer, FastTokenizer, FsqTokenizer
from manipi.tokenizers.fsq import FsqConfig, tensor_shapes
from manipi.weights.layouts import open_action_tokenizer, open_text_tokenizer
from manipi.weights.stores import ArrayInfo, write_tree

CONFIG = FsqConfig(
    embed_dim=64, data_dim=2, data_horizon=3, num_tokens=4, num_layers=1, target_codebook_size=256, causal=True
)


@pytest.fixture(scope="module")
def fsq() -> FsqTokenizer:
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(0, 0.3, shape) for name, shape in tensor_shapes(CONFIG, 0).items()}
    return FsqTokenizer.from_tree(arrays, dataclasses.asdict(CONFIG))


def write_released(folder, arrays, config) -> None:
    """The layout of the released one: an Orbax step with tensors and config."""
    (folder / "1000/params").mkdir(parents=True)
    (folder / "1000/config").mkdir()
    (folder / "1000/config/metadata").write_text(json.dumps(config))
    infos = {name: ArrayInfo(array.shape, torch.float32) for name, array in arrays.items()}
    tensors = [(name, None, torch.from_numpy(np.array(array))) for name, array in arrays.items()]
    write_tree(folder / "1000/params", infos, tensors)


def test_the_released_layout_of_fsq(fsq, tmp_path):
    write_released(tmp_path, fsq.arrays, dataclasses.asdict(CONFIG))
    assert open_action_tokenizer(str(tmp_path)).sha256 == fsq.sha256
    (tmp_path / "1000/config/metadata").write_text("{")
    with pytest.raises(TokenizerError, match="params/ and config/metadata"):
        open_action_tokenizer(str(tmp_path))


def test_fsq_tensors_that_do_not_fit_their_config(fsq, tmp_path):
    write_released(tmp_path, fsq.arrays, dataclasses.asdict(CONFIG) | {"num_layers": 2})
    with pytest.raises(WeightsMismatchError, match="missing decoder/CrossAttentionLayer_1/Dense_0/bias; "):
        open_action_tokenizer(str(tmp_path))


def test_each_kind_is_recognised(fsq, tmp_path):
    fast = FastTokenizer.fit(np.random.default_rng(0).normal(size=(20, 3, 2)), vocab_size=200)
    for name, tokenizer in (("fsq", fsq), ("fast", fast)):
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
        assert open_action_tokenizer(str(tmp_path / name)).sha256 == tokenizer.sha256
    assert open_action_tokenizer("binning").kind == "binning"
    with pytest.raises(TokenizerError, match="the directory of a published FAST tokenizer"):
        open_action_tokenizer(str(tmp_path))
    assert open_text_tokenizer("byte", fast).vocab_size == ByteTokenizer.NUM_TEXT_IDS + fast.vocab_size
    with pytest.raises(TokenizerError, match="a SentencePiece model file"):
        open_text_tokenizer(str(tmp_path / "absent.model"), None)
