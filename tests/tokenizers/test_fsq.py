"""The invariants of FSQ; its numbers were compared with the reference's network on random weights."""

import json
import pickle
from dataclasses import asdict

import numpy as np
import pytest

from manipi.errors import TokenizerError, WeightsMismatchError
from manipi.tokenizers import FsqTokenizer

SHAPE = (16, 7)


def test_codes_are_rounded_digits(fsq, chunks):
    """A network without attention output is a table: its codes can be computed by hand."""
    arrays = {name: np.zeros_like(array) for name, array in fsq.arrays.items()}
    arrays["encoder/q_embed"][:, 0] = [-9, -0.5, 0, 0.5, 9]
    arrays["codebook/proj_down/kernel"][0] = [1, -1]
    table = FsqTokenizer.from_tree(arrays, asdict(fsq.config))
    low = np.rint((np.tanh([-9, -0.5, 0, 0.5, 9]) + 1) * 31 / 2).astype(int)
    assert low.tolist() == [0, 8, 16, 23, 31]  # 15.5 goes to the even 16
    high = np.array([31, 23, 16, 8, 0])
    assert table.encode(chunks[0]) == (low + 32 * high).tolist()


def test_decoding_undoes_the_digits(fsq):
    arrays = {name: np.zeros_like(array) for name, array in fsq.arrays.items()}
    arrays["proj_mean/bias"][:] = np.arange(7)
    arrays["out_scale"] = np.float32(2)
    table = FsqTokenizer.from_tree(arrays, asdict(fsq.config))
    np.testing.assert_array_equal(table.decode([0] * 5, *SHAPE), np.tile(2 * np.arange(7), (16, 1)))


def test_every_code_matters_and_every_action(fsq, chunks):
    codes = fsq.encode(chunks[0])
    first = fsq.decode(codes, *SHAPE)
    assert (first.shape, first.dtype, len(codes)) == (SHAPE, np.float32, 5)
    assert max(codes) < fsq.vocab_size == 1024
    for position in range(5):
        changed = [*codes[:position], (codes[position] + 500) % 1024, *codes[position + 1 :]]
        assert not np.allclose(fsq.decode(changed, *SHAPE), first)
    np.testing.assert_array_equal(fsq.decode(codes, *SHAPE), first)
    assert len({tuple(fsq.encode(chunk * 3)) for chunk in chunks[:20]}) > 1


@pytest.mark.parametrize("causal", [False, True])
def test_a_later_position_is_hidden_where_the_network_is_causal(random_fsq, causal):
    """Among the decoder's queries; what they see of the codes is not a matter of positions in the reference."""
    one = random_fsq(causal=causal)
    later = one.arrays["decoder/q_embed"] * np.where(np.arange(16) == 15, -1, 1)[:, None]
    other = FsqTokenizer.from_tree({**one.arrays, "decoder/q_embed": later}, asdict(one.config))
    codes = [1, 200, 300, 400, 1023]
    same = np.isclose(one.decode(codes, *SHAPE), other.decode(codes, *SHAPE), atol=1e-6).all(axis=1)
    assert same.tolist() == [causal] * 15 + [False]


def test_actions_are_clipped_to_the_bound(random_fsq, fsq, chunks):
    bounded = random_fsq(bound=0.2)
    assert bounded.encode(chunks[0] * 9) == bounded.encode(np.clip(chunks[0] * 9, -0.2, 0.2))
    assert bounded.encode(chunks[0] * 9) != fsq.encode(chunks[0] * 9)


def test_the_state_is_seen_where_there_is_one(random_fsq, fsq, chunks):
    conditioned = random_fsq(state_dim=3, use_state_conditioning=True)
    codes = conditioned.encode(chunks[0], np.zeros(3))
    assert not np.allclose(*(conditioned.decode(codes, *SHAPE, np.full(3, value)) for value in (0.0, 1.0)))
    for tokenizer, state, message in ((conditioned, None, "a state\n"), (fsq, np.zeros(3), "no state: .*\n")):
        with pytest.raises(TokenizerError, match=message):
            tokenizer.encode(chunks[0], state)
        with pytest.raises(TokenizerError, match=message):
            tokenizer.decode(codes, *SHAPE, state)


def test_what_is_no_chunk(fsq, chunks):
    for codes in ([0] * 4, [0] * 6, [], [0, 0, 0, 0, 1024], [-1, 0, 0, 0, 0]):
        with pytest.raises(TokenizerError, match="5 codes from 0 to 1023"):
            fsq.decode(codes, *SHAPE)
    with pytest.raises(TokenizerError, match=r"chunks of 16 x 7 numbers\n   found 7 x 16"):
        fsq.decode([0] * 5, 7, 16)
    with pytest.raises(TokenizerError, match=r"chunks of 16 x 7 numbers\n   found 15 x 7"):
        fsq.encode(chunks[0][:15])
    with pytest.raises(TokenizerError, match=r"nan at index \(0, 3\)"):
        fsq.encode(np.where(np.arange(7) == 3, np.nan, chunks[0]))


def test_tensors_are_accounted_for_in_full(fsq):
    arrays, config = dict(fsq.arrays), asdict(fsq.config)
    del arrays["out_scale"], arrays["encoder/q_embed"]
    arrays["encoder/CrossAttentionLayer_9/Dense_0/bias"] = np.zeros(3)
    arrays["proj/kernel"] = arrays["proj/kernel"].T
    arrays["proj/bias"] = arrays["proj/bias"] * np.nan
    with pytest.raises(WeightsMismatchError) as error:
        FsqTokenizer.from_tree(arrays, config)
    assert error.value.found.split("; ") == [
        "missing encoder/q_embed",
        "missing out_scale",
        "unexpected encoder/CrossAttentionLayer_9/Dense_0/bias",
        "proj/bias with numbers that are not finite",
        "proj/kernel of shape (64, 7) instead of (7, 64)",
    ]


@pytest.mark.parametrize("change", [{"depth": 3}, {"target_codebook_size": 1000}, {"embed_dim": 32}])
def test_a_config_that_cannot_be(fsq, change):
    with pytest.raises(TokenizerError, match="where FSQ config"):
        FsqTokenizer.from_tree(fsq.arrays, asdict(fsq.config) | change)


def test_save_and_load(fsq, chunks, tmp_path):
    fsq.save(tmp_path)
    for again in (FsqTokenizer.load(tmp_path), pickle.loads(pickle.dumps(fsq))):
        assert again.sha256 == fsq.sha256
        assert again.encode(chunks[0]) == fsq.encode(chunks[0])
    config = json.loads((tmp_path / "fsq.json").read_text())
    (tmp_path / "fsq.json").write_text(json.dumps(config | {"bound": 1.0}))
    assert FsqTokenizer.load(tmp_path).sha256 != fsq.sha256
    (tmp_path / "fsq.safetensors").write_bytes((tmp_path / "fsq.safetensors").read_bytes()[:-9])
    with pytest.raises(TokenizerError, match=r"fsq.json and fsq.safetensors"):
        FsqTokenizer.load(tmp_path)
