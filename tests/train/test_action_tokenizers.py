"""π0-FAST with each action tokenizer: from the config to a policy that answers in chunks."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from manipi.errors import TokenizerError
from manipi.policy import Policy
from manipi.tokenizers import FastTokenizer, FsqTokenizer
from manipi.tokenizers.fsq import FsqConfig, tensor_shapes
from manipi.train.data import prepare
from manipi.train.loop import train


@pytest.fixture
def folder(tmp_path):
    """`folder("FSQ")` is where a tokenizer of that kind for chunks [4, 4] is, or just its name."""

    def make(kind: str) -> str:
        rng = np.random.default_rng(0)
        if kind == "FAST":
            FastTokenizer.fit(rng.normal(size=(20, 4, 4)), vocab_size=200).save(tmp_path)
        if kind == "FSQ":
            sizes = {"embed_dim": 64, "data_dim": 4, "data_horizon": 4, "num_tokens": 3, "num_layers": 1}
            config = FsqConfig(**sizes, target_codebook_size=256)
            arrays = {name: rng.normal(0, 0.1, shape) for name, shape in tensor_shapes(config, 0).items()}
            FsqTokenizer.from_tree(arrays, asdict(config)).save(tmp_path)
        return kind if kind in ("binning", "dct") else str(tmp_path)

    return make


@pytest.mark.parametrize("kind", ["FAST", "FSQ", "binning", "dct"])
def test_one_step_makes_a_policy(kind, tiny, folder, tmp_path):
    config = tiny("pi0_fast", steps=1, save_every=1, action_tokenizer=folder(kind))
    if kind != "dct":
        config = replace(config, model=replace(config.model, codes=None))
    policy = Policy.load(train(config, tmp_path / "run", show=False))
    assert policy.tokenizers.action.kind.lower() == kind.lower()
    actions = policy.infer(prepare(config, tmp_path / "run").example())["actions"]
    assert actions.shape == (4, 4)
    assert np.isfinite(actions).all()


def test_what_cannot_work_is_refused_before_training(tiny, folder, tmp_path):
    with pytest.raises(TokenizerError, match="name the directory of a published FAST tokenizer"):
        prepare(tiny("pi0_fast", action_tokenizer=str(tmp_path / "absent")), tmp_path / "run")
    config = tiny("pi0_fast", action_tokenizer=folder("FSQ"))
    with pytest.raises(TokenizerError, match="chunks of 4 x 4 numbers\n   found 5 x 4"):
        prepare(replace(config, model=replace(config.model, action_horizon=5)), tmp_path / "run5")
    config = tiny("pi0_fast", action_tokenizer="binning")
    with pytest.raises(TokenizerError, match="19 tokens hold any chunk"):
        prepare(replace(config, model=replace(config.model, max_token_len=18)), tmp_path / "run18")
