"""Fixed codes: the DCT tokenizer."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from scipy.fft import dct as scipy_dct

from manipi.errors import TokenizerError
from manipi.tokenizers import DctTokenizer
from manipi.tokenizers.dct import FIT_ERROR, ROUNDING, SATURATED

SHAPE = (16, 7)


def test_codes_are_the_lowest_coefficients_in_order(dct, chunks):
    k = len(dct.lowest)
    numbers = np.rint(scipy_dct(chunks[3], norm="ortho", axis=0)[:k] * dct.scale) - np.array(dct.lowest)
    first_of_place = np.arange(k * 7).reshape(k, 7) * 64
    assert dct.encode(chunks[3]) == (numbers + first_of_place).ravel().tolist()
    assert dct.num_codes(chunks).tolist() == [k * 7] * len(chunks)


def test_the_error_is_the_stated_one(dct, chunks):
    k = len(dct.lowest)
    assert dct.rms_error(chunks) <= FIT_ERROR * np.hypot(1, ROUNDING) * 1.02
    coefficients = scipy_dct(chunks, norm="ortho", axis=1)
    without = lambda n: np.sqrt(np.square(coefficients[:, n:]).sum(1).mean() / 16)  # noqa: E731
    assert without(k) <= FIT_ERROR < without(k - 1)
    finer = DctTokenizer.fit(chunks, error=FIT_ERROR / 2, codes_per_place=128)
    assert len(finer.lowest) > k
    assert finer.rms_error(chunks) < dct.rms_error(chunks) * 0.6


def test_decoding_undoes_all_but_rounding(dct, chunks):
    codes = dct.encode(chunks[0])
    assert dct.encode(dct.decode(codes, *SHAPE)) == codes
    place = dct.places(*SHAPE)[8]
    moved = [*codes[:8], codes[8] + 1, *codes[9:]] if codes[8] + 1 in place else [*codes[:8], codes[8] - 1, *codes[9:]]
    change = np.abs(dct.decode(moved, *SHAPE) - dct.decode(codes, *SHAPE)).sum(axis=0)
    assert (change > 0).tolist() == [d == 1 for d in range(7)]


def test_numbers_beyond_the_codes_saturate(dct, chunks):
    for far in (100.0, -100.0):
        codes = dct.encode(np.full(SHAPE, far))
        ends = [place.stop - 1 if far > 0 else place.start for place in dct.places(*SHAPE)[:7]]
        assert codes[:7] == ends
    assert dct.saturated(np.full((1, *SHAPE), 100.0))[0].all()


def test_a_wide_range_is_met_by_coarser_codes(dct, chunks):
    """As far as the stated error goes; beyond that, more codes are asked for."""
    few = DctTokenizer.fit(chunks, codes_per_place=32)
    assert few.scale < dct.scale
    assert few.saturated(chunks).max() <= SATURATED + 1 / len(chunks)
    assert dct.rms_error(chunks) < few.rms_error(chunks) <= FIT_ERROR * np.sqrt(2)
    with pytest.raises(TokenizerError, match=r"at least ([0-9]+) codes per place\n *found 8, for") as caught:
        DctTokenizer.fit(chunks, codes_per_place=8)
    enough = int(caught.value.expected.split()[2])
    assert DctTokenizer.fit(chunks, codes_per_place=enough).rms_error(chunks) <= FIT_ERROR * 1.5


def test_all_datasets_count(dct, chunks):
    """The one that needs more frequencies, and the other that has the wider range."""
    quick = np.cumsum(np.random.default_rng(1).normal(scale=0.4, size=(200, *SHAPE)), axis=1).clip(-1, 1)
    both = DctTokenizer.fit(chunks, quick, codes_per_place=128)
    assert len(both.lowest) == len(DctTokenizer.fit(quick, codes_per_place=128).lowest) > len(dct.lowest)
    assert both.saturated(chunks).max() <= SATURATED + 1 / len(chunks)
    assert DctTokenizer.fit(chunks) == dct


def test_a_robot_with_fewer_dimensions(chunks):
    arm = chunks[:100, :, :4]
    two = DctTokenizer.fit(chunks, arm)
    codes = two.encode(arm[0])
    assert codes == [c for c, p in zip(two.encode(chunks[0]), two.places(*SHAPE), strict=True) if p.start // 64 % 7 < 4]
    np.testing.assert_allclose(two.decode(codes, 16, 4), two.decode(two.encode(chunks[0]), *SHAPE)[:, :4], atol=1e-6)


def test_what_is_no_chunk(dct, chunks):
    codes = dct.encode(chunks[0])
    swapped = [codes[1], codes[0], *codes[2:]]
    neutral = [63, *codes[1:]]
    for wrong, found in ((codes[:-1], f"{len(codes) - 1} codes"), (swapped, "at place 0"), (neutral, "code 63 at")):
        with pytest.raises(TokenizerError, match=f"codes, each from the 63 of its place\n *found .*{found}"):
            dct.decode(wrong, *SHAPE)
    for shape in ((15, 7), (16, 8)):
        with pytest.raises(TokenizerError, match="chunks of 16 steps and at most 7 dimensions"):
            dct.encode(np.zeros(shape))
    with pytest.raises(TokenizerError, match="finite"):
        dct.encode(np.where(np.arange(7) == 3, np.nan, chunks[0]))
    for nothing in ((), (np.zeros((0, 16, 7)),)):
        with pytest.raises(TokenizerError, match="at least one chunk"):
            DctTokenizer.fit(*nothing)


def test_save_and_load(dct, chunks, tmp_path):
    dct.save(tmp_path)
    for again in (DctTokenizer.load(tmp_path), pickle.loads(pickle.dumps(dct))):
        assert again == dct
        assert again.sha256 == dct.sha256
    assert replace(dct, scale=dct.scale * 2).sha256 != dct.sha256
    (tmp_path / "dct.json").write_text(json.dumps({"scale": 1}))
    with pytest.raises(TokenizerError, match=r"a DCT tokenizer: .*, horizon, lowest"):
        DctTokenizer.load(tmp_path)
