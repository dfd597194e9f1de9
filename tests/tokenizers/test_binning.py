import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from manipi.errors import TokenizerError
from manipi.tokenizers import BinningTokenizer
from manipi.tokenizers.actions import bin_indices, bin_left_edges


@given(hnp.arrays(np.float32, (5, 3), elements=st.floats(-1, 1, width=32)))
def test_decoding_is_at_most_one_bin_below(actions):
    codes = BinningTokenizer().encode(actions)
    error = actions - BinningTokenizer().decode(codes, 5, 3)
    assert error.min() >= 0
    # The upper end of the range shares the last bin, and so is a whole bin width away from its left edge.
    assert error.max() <= 1 / 128


def test_every_bin_survives_a_round_trip():
    bins = np.arange(256)
    np.testing.assert_array_equal(bin_indices(bin_left_edges(bins)), bins)


def test_beyond_the_range():
    values = np.array([-9, np.nextafter(-1, -2), -1, 1, 9])
    assert bin_indices(values).tolist() == [0, 0, 0, 255, 255]
    assert bin_indices(values, minus_one_below=True).tolist() == [-1, -1, 0, 255, 255]


@pytest.mark.parametrize("codes", [[], [1] * 5, [1] * 7, [1, 1, 1, 1, 1, 256], [1, 1, 1, 1, 1, -1]])
def test_codes_that_are_no_chunk(codes):
    with pytest.raises(TokenizerError, match="3 x 2 = 6 codes from 0 to 255"):
        BinningTokenizer().decode(codes, 3, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(bad):
    with pytest.raises(TokenizerError, match=r"index \(0, 1\)"):
        BinningTokenizer().encode(np.array([[0, bad]]))
