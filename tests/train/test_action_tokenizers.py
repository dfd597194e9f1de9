"""π0-FAST with each action tokenizer: from the config to a policy that answers in chunks."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from manipi.errors import ConfigError, TokenizerError
from manipi.model import VLA, ModelInput
from manipi.policy import Policy
from manipi.tokenizers import ByteTokenizer, FastTokenizer, FsqTokenizer
from manipi.tokenizers.fsq import FsqConfig, tensor_shapes
from manipi.train.data import prepare
from manipi.train.loop import train
from manipi.train.step.state import TrainState
from manipi.train.step.step import draw_hidden, train_step


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


def test_codes_at_other_ids_than_the_model_is_told(tiny, tmp_path):
    config = tiny("pi0_fast")
    codes = config.model.codes
    assert codes.first_id == ByteTokenizer.NUM_TEXT_IDS
    wrong = [
        ({"codes": replace(codes, first_id=codes.first_id + 8)}, "dct", "16 places of 64 ids, from 1019 to 2042"),
        (
            {"codes": replace(codes, places=1)},
            "dct",
            r"(?s)1 places of 64.*a DCT tokenizer with [0-9]+ places of 64 ids",
        ),
        ({}, "binning", "(?s)16 places of 64.*a binning tokenizer with codes without places"),
    ]
    for number, (changes, action, message) in enumerate(wrong):
        bad = replace(config, action_tokenizer=action, model=replace(config.model, **changes))
        with pytest.raises(ConfigError, match=message):
            prepare(bad, tmp_path / str(number))


def test_hidden_samples_are_drawn_by_seed_step_and_row(tiny, tmp_path):
    whole = draw_hidden(42, 7, 400, 0.75)
    assert 0.65 < whole.float().mean() < 0.85
    assert torch.equal(draw_hidden(42, 7, 400, 0.75), whole)
    for other in ((42, 8), (43, 7)):
        assert not torch.equal(draw_hidden(*other, 400, 0.75), whole)

    def losses(share: float, **changes) -> list[float]:
        config = tiny("pi0_fast", steps=1, batch_size=4, **changes)
        config = replace(config, model=replace(config.model, codes=replace(config.model.codes, hidden=share)))
        state, inputs = TrainState.of(VLA(config.policy_model), config), batch_of(config)
        return train_step(state, inputs, config)[1].tolist()

    def batch_of(config) -> ModelInput:
        with prepare(config, tmp_path).loader(0) as loader:
            return ModelInput.from_numpy(next(iter(loader))[1])

    none, all, some = losses(0.0), losses(1.0), losses(0.5)
    hidden = draw_hidden(42, 0, 4, 0.5).tolist()
    assert 0 < sum(hidden) < 4
    assert some == pytest.approx([a if one else n for one, n, a in zip(hidden, none, all, strict=True)])
    assert all != pytest.approx(none)
    assert losses(0.5, accumulate=2) == pytest.approx(some)


def test_what_cannot_work_is_refused_before_training(tiny, folder, tmp_path):
    with pytest.raises(TokenizerError, match="name the directory of a published FAST tokenizer"):
        prepare(tiny("pi0_fast", action_tokenizer=str(tmp_path / "absent")), tmp_path / "run")
    config = tiny("pi0_fast", action_tokenizer=folder("FSQ"))
    config = replace(config, model=replace(config.model, codes=None))
    with pytest.raises(TokenizerError, match="chunks of 4 x 4 numbers\n   found 5 x 4"):
        prepare(replace(config, model=replace(config.model, action_horizon=5)), tmp_path / "run5")
    config = replace(config, action_tokenizer="binning")
    with pytest.raises(TokenizerError, match="19 tokens hold any chunk"):
        prepare(replace(config, model=replace(config.model, max_token_len=18)), tmp_path / "run18")
