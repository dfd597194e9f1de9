import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manipi.errors import NormStatsError
from manipi.robots import Joints, Robot, State
from manipi.transforms.normalize import (
    Normalize,
    contract,
    load_norm_stats,
    normalize,
    read_openpi_stats,
    save_norm_stats,
    unnormalize,
)
from manipi.types import FieldStats, NormStats

FIELDS = ("mean", "std", "q01", "q99", "min", "max")


def field(rng: np.random.Generator, dims: int) -> FieldStats:
    low = rng.normal(size=dims) * 10
    width = rng.uniform(0.01, 10, dims)
    return FieldStats(low + width / 2, width / 4, low, low + width, low - 1, low + width + 1)


def random_stats(seed: int, state: int = 3, actions: int = 4) -> NormStats:
    rng = np.random.default_rng(seed)
    return NormStats(state=field(rng, state), actions=field(rng, actions), num_frames=7, contract="c", data="d")


@pytest.mark.parametrize("mode", ["zscore", "quantile"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), batch=st.sampled_from([(), (2,), (2, 3)]))
def test_decoding_undoes_encoding(mode, seed, batch):
    stats, rng = random_stats(seed), np.random.default_rng(seed + 1)
    actions = (stats.actions.mean + stats.actions.std * rng.normal(size=(*batch, 5, 4))).astype(np.float32)
    step = Normalize(stats, mode)
    sample = {"actions": actions, "state": rng.normal(size=(*batch, 3)).astype(np.float32), "prompt": "kept"}
    encoded = step.encode(sample)
    assert encoded["actions"].dtype == encoded["state"].dtype == np.float32
    assert encoded["prompt"] == "kept"
    np.testing.assert_allclose(step.decode(encoded["actions"], sample), actions, rtol=1e-5, atol=2e-5)


def test_what_the_modes_mean():
    stats = random_stats(0).actions
    np.testing.assert_allclose(normalize(stats.mean, stats, "zscore"), 0, atol=1e-6)
    np.testing.assert_allclose(normalize(stats.mean + stats.std, stats, "zscore"), 1, atol=1e-3)
    np.testing.assert_allclose(normalize(stats.q01, stats, "quantile"), -1, atol=1e-6)
    np.testing.assert_allclose(normalize(stats.q99, stats, "quantile"), 1, atol=1e-3)
    np.testing.assert_allclose(unnormalize(np.zeros(4), stats, "quantile"), (stats.q01 + stats.q99) / 2, rtol=1e-4)


def test_a_dimension_that_never_moves_stays_finite():
    still = FieldStats(*([np.array([5.0])] + [np.array([0.0])] + [np.array([5.0])] * 4))
    for mode, seen in (("zscore", 0.0), ("quantile", -1.0)):
        encoded = normalize(np.array([5.0]), still, mode)
        assert encoded == [seen]
        np.testing.assert_allclose(unnormalize(encoded, still, mode), [5.0], atol=1e-6)


def test_the_file_has_openpis_layout_and_comes_back(tmp_path):
    stats, path = random_stats(3), tmp_path / "new" / "norm_stats.json"
    save_norm_stats(stats, path)
    written = json.loads(path.read_text())["norm_stats"]
    assert written.keys() == {"state", "actions"}
    for name in ("mean", "std", "q01", "q99"):
        assert written["actions"][name] == getattr(stats.actions, name).tolist()
    back = load_norm_stats(path)
    assert (back.num_frames, back.contract, back.data) == (7, "c", "d")
    for part in ("state", "actions"):
        for name in FIELDS:
            found, expected = getattr(getattr(back, part), name), getattr(getattr(stats, part), name)
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == np.float64


def test_a_file_without_provenance_is_refused(tmp_path):
    with pytest.raises(NormStatsError, match="no such file"):
        load_norm_stats(tmp_path / "absent.json")
    (tmp_path / "openpi.json").write_text('{"norm_stats": {}}')
    with pytest.raises(NormStatsError, match=r"top keys \['norm_stats'\]"):
        load_norm_stats(tmp_path / "openpi.json")


ARM = Robot(name="arm", cameras={"base": "i"}, state=(State("s", 2),), actions=(Joints(3),))


def openpi_file(path, **changes) -> None:
    """Wider than the robot, as openpi pads them; a change to None removes the name."""
    field = {"mean": [0.0, 1.0, 2.0, 0.0], "std": [1.0, 2.0, 3.0, 0.0]}
    field |= {"q01": [-2.0, -3.0, -4.0, 0.0], "q99": [2.0, 5.0, 8.0, 0.0]} | changes
    found = {name: values for name, values in field.items() if values is not None}
    path.write_text(json.dumps({"norm_stats": {"state": found, "actions": found}}))


def test_openpis_file_is_cut_to_the_robot(tmp_path):
    path = tmp_path / "norm_stats.json"
    openpi_file(path)
    stats = read_openpi_stats(path, ARM, action_horizon=5)
    assert stats.state.mean.tolist() == [0, 1]
    assert stats.actions.q99.tolist() == stats.actions.max.tolist() == [2, 5, 8]
    assert (stats.num_frames, stats.data, stats.contract) == (0, "", contract(ARM, 5))
    save_norm_stats(stats, tmp_path / "ours.json")
    again = read_openpi_stats(tmp_path / "ours.json", ARM, action_horizon=5)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(again.actions, name), getattr(stats.actions, name))


@pytest.mark.parametrize("how", ["absent", "null"])
def test_without_quantiles_only_the_zscore_is_there(tmp_path, how):
    path = tmp_path / "norm_stats.json"
    openpi_file(path, q01=None, q99=None)
    if how == "null":
        data = json.loads(path.read_text())
        data["norm_stats"]["actions"] |= {"q01": None, "q99": None}
        path.write_text(json.dumps(data))
    stats = read_openpi_stats(path, ARM, action_horizon=5)
    assert stats.actions.min.tolist() == [-3, -5, -7]
    Normalize(stats, "zscore").encode({"state": np.zeros(2)})
    with pytest.raises(NormStatsError, match="q01 and q99 for quantile"):
        Normalize(stats, "quantile")
    save_norm_stats(stats, path)
    assert json.loads(path.read_text())["norm_stats"]["actions"]["q01"] is None
    assert np.isnan(load_norm_stats(path).actions.q01).all()


BAD_FILES = {
    "too narrow": ({"std": [1.0]}, r"'std' with at least 2 finite numbers\n   found \[1.0\]"),
    "no mean": ({"mean": None}, "'mean' with at least 2 finite numbers\n   found None"),
    "NaN": ({"q01": [float("nan")] * 4}, "'q01' with at least 2 finite numbers"),
    "text": ({"mean": ["a", "b"]}, "'mean' with at least 2"),
    "swapped quantiles": ({"q01": [3.0] * 4}, "q01 below q99"),
    "a negative deviation": ({"std": [-1.0] * 4}, "deviations above 0"),
    "all deviations zero": ({"std": [0.0] * 4}, "deviations above 0"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_of_openpi_that_cannot_be_right(tmp_path, case):
    changes, message = BAD_FILES[case]
    openpi_file(tmp_path / "norm_stats.json", **changes)
    with pytest.raises(NormStatsError, match=message) as error:
        read_openpi_stats(tmp_path / "norm_stats.json", ARM, action_horizon=5)
    assert error.value.where.endswith("norm_stats.json, state")


def test_files_that_are_not_openpis(tmp_path):
    with pytest.raises(NormStatsError, match="no such file"):
        read_openpi_stats(tmp_path / "absent.json", ARM, action_horizon=5)
    (tmp_path / "a.json").write_text('{"norm_stats": {"state": {}}}')
    with pytest.raises(NormStatsError, match=r"keys \['state'\]"):
        read_openpi_stats(tmp_path / "a.json", ARM, action_horizon=5)
