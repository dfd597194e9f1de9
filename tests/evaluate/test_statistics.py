import pytest

from manipi.evaluate.statistics import success_rate

# Newcombe (1998), table I, method 3 (the score interval without continuity correction).
PUBLISHED = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}


@pytest.mark.parametrize(("k", "n"), PUBLISHED)
def test_published_intervals(k, n):
    found = success_rate(k, n)
    assert (round(found.low, 4), round(found.high, 4)) == PUBLISHED[k, n]
    assert found.rate == k / n


@pytest.mark.parametrize("n", [1, 2, 10, 1000])
def test_the_ends(n):
    none, all_ = success_rate(0, n), success_rate(n, n)
    assert (none.rate, none.low) == (0, 0)
    assert (all_.rate, all_.high) == (1, 1)
    assert 0 < none.high < 1
    assert none.high == pytest.approx(1 - all_.low)


def test_the_interval_holds_the_rate_and_narrows():
    widths = []
    for n in (5, 50, 500):
        for k in range(n + 1):
            found = success_rate(k, n)
            assert 0 <= found.low <= found.rate <= found.high <= 1
        half = success_rate(n // 2, n)
        widths.append(half.high - half.low)
    assert widths == sorted(widths, reverse=True)


def test_it_reads_as_a_sentence():
    assert str(success_rate(9, 10)) == "9/10 = 90.0% (95 % interval 59.6% to 98.2%)"


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts(k, n):
    with pytest.raises(AssertionError):
        success_rate(k, n)
