"""Verdicts: published examples, the promise of the sequential test by simulation, and what may be compared."""

import json
import math

import numpy as np
import pytest

from manipi.cli import main
from manipi.errors import ConfigError
from manipi.evaluate.compare import Side, compare_groups, compare_results, may_be_equivalent, read_side
from manipi.evaluate.statistics import (
    SequentialTest,
    groups_difference,
    log_evidence,
    paired_difference,
    success_rate,
    unpaired_difference,
)


@pytest.mark.parametrize(
    ("a", "b", "interval"),
    [
        # Newcombe, Statistics in Medicine 17:873 (1998), Table II, method 10.
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((6, 7), (2, 7), (0.0582, 0.8062)),
        ((5, 56), (0, 29), (-0.0381, 0.1926)),
        ((0, 10), (0, 20), (-0.1611, 0.2775)),
        ((0, 10), (0, 10), (-0.2775, 0.2775)),
        ((10, 10), (0, 20), (0.6791, 1.0)),
        ((10, 10), (0, 10), (0.6075, 1.0)),
    ],
)
def test_unpaired_differences_as_published(a, b, interval):
    found = unpaired_difference(success_rate(*a), success_rate(*b))
    assert (found.low, found.high) == pytest.approx(interval, abs=5e-5)


def test_a_paired_difference_as_published():
    """Airway reactivity, 1, 1, 7 and 12 of 21 pairs: Fagerland, Lydersen and Laake, Stat. Med. 33:2850 (2014)."""
    a = [True, True] + [False] * 19
    b = [True, False] + [True] * 7 + [False] * 12
    found = paired_difference(a, b)
    assert (found.low, found.high) == pytest.approx((-0.507, -0.026), abs=5e-4)


def outcomes(rng, a, b, correlation, studies, trials):
    """Two policies of these success rates on scenes whose difficulty both feel: latent normals of that correlation."""
    scene, own, other = rng.standard_normal((3, studies, trials), np.float32)
    share, rest = math.sqrt(correlation), math.sqrt(1 - correlation)
    quantile = {0.5: 0.0, 0.7: 0.5244005, 0.9: 1.2815516}
    return share * scene + rest * own < quantile[a], share * scene + rest * other < quantile[b]


def decided(a, b):
    """Where the test may stop, for every study and trial."""
    return log_evidence(np.cumsum(a & ~b, axis=1), np.cumsum(b & ~a, axis=1)) >= math.log(20)


@pytest.mark.parametrize(("rate", "correlation"), [(0.5, 0.0), (0.9, 0.5)])
def test_equal_policies_get_a_winner_in_at_most_5_percent_however_often_one_looks(rate, correlation):
    wrong = []
    for seed in range(4):  # 2,000 studies of 2,000 looks, in parts of which each takes little memory
        a, b = outcomes(np.random.default_rng(seed), rate, rate, correlation, 500, 2_000)
        wrong.append(decided(a, b).any(axis=1).mean())
    assert np.mean(wrong) <= 0.05


def test_70_and_50_percent_are_told_apart_in_a_median_of_80_scenes():
    stops = decided(*outcomes(np.random.default_rng(0), 0.7, 0.5, 0.5, 2_000, 400))
    needed = np.where(stops.any(axis=1), stops.argmax(axis=1) + 1, 400)
    assert np.median(needed) <= 80


def test_the_test_counts_as_its_formula_says():
    test = SequentialTest(planned=100)
    for _ in range(6):
        test.add(True, False)
        test.add(True, True)
    assert math.exp(test.log_evidence) == pytest.approx(2**6 / 7)  # 2^m · k! (m - k)! / (m + 1)!
    assert test.winner is None
    for _ in range(2):
        test.add(True, False)
    assert test.winner == "a"
    assert test.p_value == pytest.approx(9 / 2**8)


def test_training_runs_that_happen_to_agree_are_not_more_certain_than_their_trials():
    def group(k):
        return [Side(name="run", success=success_rate(k, 10)) for _ in range(2)]

    found = compare_groups(group(5), group(6), margin=0.05)
    assert found.verdict == "undecided"
    assert (found.low, found.high) == pytest.approx((-0.375, 0.193), abs=0.02)


def test_it_ends_where_no_winner_can_come():
    test = SequentialTest(planned=20)
    for _ in range(11):
        test.add(True, True)
    assert not test.futile  # nine scenes that all go one way would do
    test.add(True, True)
    test.add(True, True)
    assert test.futile


def test_a_forecast_of_more_trials():
    test = SequentialTest()
    for i in range(50):
        test.add(i % 10 < 6, i % 10 < 5)
    median, late = test.more_trials()
    assert 1 <= median <= late
    assert test.more_trials() == (median, late)
    even = SequentialTest()
    for i in range(400):
        even.add(i % 2 == 0, i % 2 == 1)
    assert even.more_trials()[1] is None


def test_training_runs_are_the_sample():
    found = groups_difference([0.8, 0.9, 0.7], [0.5, 0.6, 0.7])
    assert found.difference == pytest.approx(0.2)
    # scipy.stats.ttest_ind(…, equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx((-0.0267, 0.4267), abs=5e-5)


def side(name, wins, *, seed=0, suite="tests/line", count=200):
    success = success_rate(wins, count)
    outcomes = (True,) * wins + (False,) * (count - wins)
    return Side(name=name, success=success, outcomes=outcomes, suite=suite, scenes={"suite": suite, "seed": seed})


def test_verdicts():
    better = compare_results(side("a", 160), side("b", 100), margin=0.05, alpha=0.05)
    assert (better.verdict, better.paired, better.only_a, better.only_b) == ("a", True, 60, 0)
    assert better.low > 0
    worse = compare_results(side("a", 100), side("b", 160), margin=0.05, alpha=0.05)
    assert (worse.verdict, worse.difference) == ("b", -better.difference)
    same = compare_results(side("a", 160), side("b", 161), margin=0.05, alpha=0.05)
    assert same.verdict == "equivalent"
    few = compare_results(side("a", 16, count=20), side("b", 15, count=20), margin=0.05, alpha=0.05)
    assert few.verdict == "undecided"
    assert few.more_trials is not None
    assert "more scenes" in few.sentence(0.05)


def test_other_scenes_are_not_paired_and_other_suites_are_refused():
    found = compare_results(side("a", 160), side("b", 100, seed=1), margin=0.05, alpha=0.05)
    assert (found.paired, found.verdict) == (False, "a")
    assert "seed 0 and 1" in found.sentence(0.05)
    with pytest.raises(ConfigError, match="results of one suite"):
        compare_results(side("a", 160), side("b", 100, suite="tests/other"), margin=0.05, alpha=0.05)


def test_groups_need_two_runs_each():
    with pytest.raises(ConfigError, match="two or more training runs"):
        compare_groups([side("a", 100)], [side("b", 90), side("c", 80)], margin=0.05)
    found = compare_groups([side("a", 190), side("b", 188)], [side("c", 90), side("d", 92)], margin=0.05)
    assert found.verdict == "a"


@pytest.mark.parametrize(
    "data",
    [
        {"per_episode": [{"success": True}, {"success": False}, {"success": True}], "aggregated": {}},
        {"per_task": [{"metrics": {"successes": [True, False]}}, {"metrics": {"successes": [True]}}], "overall": {}},
    ],
)
def test_lerobots_results_are_counts(tmp_path, data):
    (tmp_path / "eval_info.json").write_text(json.dumps(data))
    found = read_side(tmp_path)
    assert (found.success.k, found.success.n, found.outcomes) == (2, 3, None)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"suite": "a", "seed": 0, "trials": [{"index": 1, "success": true}]}', '{"x": 1}']
)
def test_what_is_no_result(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ConfigError):
        read_side(tmp_path)


def test_the_command(tmp_path, capsys):
    for name, wins in (("a", 38), ("b", 20), ("c", 21)):
        rows = [{"index": i, "success": i < wins} for i in range(40)]
        folder = tmp_path / name
        folder.mkdir()
        (folder / "result.json").write_text(
            json.dumps({"suite": "tests/line", "seed": 0, "policy": name, "trials": rows})
        )
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json", str(tmp_path / "out.json")])
    out = json.loads((tmp_path / "out.json").read_text())
    assert (out["verdict"], out["trials"], out["difference"]) == ("a", 40, pytest.approx(0.45))
    assert out["low"] < 0.45 < out["high"]
    assert "A is better: a" in capsys.readouterr().out
    main(["compare", *(str(tmp_path / name) for name in "abc"), "--json", str(tmp_path / "out.json")])
    assert len(json.loads((tmp_path / "out.json").read_text())["comparisons"]) == 3
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "a"), str(tmp_path / "nothing")])
    assert "--suite tabletop/reach" in capsys.readouterr().err


TRIAL = {"index": 0, "success": True}
RESULT = {"suite": "a/b", "seed": 0, "policy": "p", "settings": {}, "trials": [TRIAL]}


@pytest.mark.parametrize(
    "content",
    [
        *(
            {**RESULT, "trials": trials}
            for trials in ([], [1], {}, 3, [{"index": 0}], [{**TRIAL, "success": math.nan}])
        ),
        *({**RESULT, "trials": [{**TRIAL, "index": 1}]}, {**RESULT, "settings": 3}, {**RESULT, "versions": []}),
        {key: RESULT[key] for key in ("suite", "seed", "trials")},
        *({"per_episode": episodes} for episodes in ([], [1], [{}], {}, [{"success": math.nan}], [{"success": "no"}])),
        *(
            {"per_task": tasks}
            for tasks in ([1], [{}], [{"metrics": {"successes": []}}], [{"metrics": {"successes": 1}}])
        ),
        *({}, [], None, 3, "text"),
    ],
)
def test_results_of_odd_shapes(content, tmp_path):
    (tmp_path / "eval_info.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"result\.json"):
        read_side(tmp_path)


def test_a_result_of_another_version_is_not_paired(tmp_path):
    sides = []
    for version in ("0.1.0", "0.2.0"):
        path = tmp_path / f"{version}.json"
        path.write_text(json.dumps({**RESULT, "versions": {"manipi": version}}))
        sides.append(read_side(path))
    found = compare_results(*sides, margin=0.05, alpha=0.05)
    assert not found.paired
    assert "manipi '0.1.0' and '0.2.0'" in found.why_unpaired


def test_training_runs_that_came_out_alike_prove_nothing_by_that():
    def side(k, suite="a/b"):
        return Side(name="one", success=success_rate(k, 10), suite=suite)

    found = compare_groups([side(5), side(5)], [side(4), side(4)], margin=0.05)
    assert found.verdict == "undecided"
    assert found.low < -0.1 < found.difference < 0.3 < found.high
    assert compare_groups([side(5), side(5)], [side(5), side(5)], margin=0.05).verdict == "undecided"
    with pytest.raises(ConfigError, match="results of one suite"):
        compare_groups([side(5), side(5)], [side(5), side(5, "c/d")], margin=0.05)


def test_scenes_are_tried_on_where_equal_policies_may_come_out():
    same = 190 * [(True, True)]
    assert may_be_equivalent(same, 200, 0.05)
    assert not may_be_equivalent(same[:13], 20, 0.05)
    assert may_be_equivalent([*same, *4 * [(True, False)]], 200, 0.05)  # the six that are left may make up for it
    assert not may_be_equivalent([*same[:150], *40 * [(True, False)]], 200, 0.05)
