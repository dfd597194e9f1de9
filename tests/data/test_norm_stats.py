import importlib.util
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path

import numpy as np
import pytest

from manipi.data import norm_stats as stats_module
from manipi.data.dataset import Dataset, action_chunks
from manipi.data.feed.sampler import split_episodes
from manipi.data.norm_stats import (
    NormStatsSketch,
    Sketch,
    Tail,
    Workers,
    _chunks,
    _column,
    _sketch_part,
    beyond_limits,
    compute_norm_stats,
    field_stats,
    merge_sketches,
    per_step_stats,
    read_state,
    rows_fingerprint,
    sketch_norm_stats,
    suspicious_dimensions,
    widened_dimensions,
    with_min_range,
)
from manipi.data.open import open_dataset
from manipi.errors import ConfigError, NormStatsError, UnknownNameError
from manipi.robots import EndEffector, Gripper, Joints, LinkageGripper, Robot, State
from manipi.robots.tabletop import TABLETOP
from manipi.train.data import prepare
from manipi.transforms.actions import ActionSpace
from manipi.transforms.normalize import load_norm_stats, normalize
from manipi.transforms.pipeline import contract
from manipi.types import FieldStats, NormStats

HORIZON = 4
NAMES = ("mean", "std", "q01", "q99", "min", "max")


@pytest.fixture(scope="module")
def toy(toy_dataset):
    return open_dataset(toy_dataset)


def planted(episodes: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """State rows and relative action rows, written out loop by loop: no step beyond the end of an episode counts."""
    states, actions = [], []
    for episode in episodes:
        length = len(episode["actions"])
        for t in range(length):
            state = episode["observation/state"][t]
            states.append(state)
            for step in range(t, min(t + HORIZON, length)):
                position, gripper = episode["actions"][step, :3] - state[:3], 1 - episode["actions"][step, 3:]
                actions.append(np.concatenate([position, gripper]))
    return np.array(states, np.float64), np.array(actions, np.float64)


def compare(found: FieldStats, values: np.ndarray) -> None:
    expected = {"mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0)}
    expected |= {"q01": np.quantile(values, 0.01, axis=0), "q99": np.quantile(values, 0.99, axis=0)}
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-6, atol=1e-8, err_msg=name)


def test_exact_on_the_planted_dataset(toy, toy_episodes):
    stats = compute_norm_stats(toy, TABLETOP, HORIZON, np.arange(toy.num_frames))
    states, actions = planted(toy_episodes)
    compare(stats.state, states)
    compare(stats.actions, actions)
    assert len(actions) < HORIZON * len(states)
    assert stats.num_frames == toy.num_frames == 65
    assert stats.contract == contract(TABLETOP, HORIZON)
    assert stats.data == toy.fingerprint


def test_only_the_rows_asked_for_count(toy, toy_episodes):
    train, held_out = split_episodes(toy, holdout=0.25, seed=0)
    kept = [e for i, e in enumerate(toy_episodes) if toy.starts[i] in set(train.tolist())]
    assert len(kept) == 6
    stats = compute_norm_stats(toy, TABLETOP, HORIZON, train)
    compare(stats.actions, planted(kept)[1])
    assert stats.num_frames == len(train) == toy.num_frames - len(held_out)


def test_statistics_are_of_the_converted_state(toy, toy_episodes):
    """A joint that the model counts the other way: the mean changes its sign, and the quantiles change places."""
    arm = replace(TABLETOP, actions=(Joints(3, relative=True, signs=(1, -1, 1)), Gripper(open=1.0, closed=0.0)))
    stats = compute_norm_stats(toy, arm, HORIZON, np.arange(toy.num_frames))
    states, actions = planted(toy_episodes)
    compare(stats.state, states * [1, -1, 1, 1])
    compare(stats.actions, actions * [1, -1, 1, 1])


def test_a_robot_without_state(toy):
    blind = replace(TABLETOP, state=(), actions=(Gripper(), Gripper(), Gripper(), Gripper()))
    assert read_state(toy, blind).shape == (65, 0)
    stats = compute_norm_stats(toy, blind, 1, np.arange(65))
    assert stats.state.mean.shape == (0,)


def test_suspicious_dimensions():
    values = np.stack([np.full(200, 2.0), np.linspace(0, 1e-5, 200), np.linspace(-1, 1, 200)], axis=1)
    values[0, 1] = 3.0  # an outlier moves, but not the quantiles
    field = field_stats(values)
    notes = suspicious_dimensions(NormStats(state=field, actions=field, num_frames=200, contract="", data=""))
    assert notes[0] == "state[0] never moves: q01 2, q99 2"
    assert notes[1].startswith("state[1] hardly moves: q01 ")
    assert [note.split()[0] for note in notes] == ["state[0]", "state[1]", "actions[0]", "actions[1]"]


def test_outliers_and_limits(toy):
    values = np.linspace(0, 1, 1000)[:, None]
    values[0] = 25.0
    field = field_stats(values)
    notes = suspicious_dimensions(NormStats(state=field, actions=field, num_frames=1000, contract="", data=""))
    assert notes[0].startswith("state[0] has outliers, 0.001001 to 25: q01 ")
    assert notes[0].endswith("up to 24 times their distance beyond them")
    commands = toy.column("actions")[:, 1]
    limited = replace(TABLETOP, actions=(Joints(3, low=(-9.0, float(np.median(commands)), -9.0)), Gripper()))
    (note,) = beyond_limits(toy, limited, np.arange(65))
    assert note.startswith("command[1] joint 2 is outside the robot's limits in 32 frames: ")
    assert beyond_limits(toy, replace(limited, actions=(Joints(3), Gripper())), np.arange(65)) == []


def test_min_range(toy):
    rows = np.arange(toy.num_frames)
    raw = compute_norm_stats(toy, TABLETOP, HORIZON, rows)
    same = compute_norm_stats(toy, TABLETOP, HORIZON, rows, min_range=0.0)
    equal(raw, same)
    width = raw.actions.q99[1] - raw.actions.q01[1]
    stats = compute_norm_stats(toy, TABLETOP, HORIZON, rows, min_range={"actions[1]": 10 * width})
    assert widened_dimensions(raw, stats) == [f"actions[1] widened to a range of {10 * width:.6g}, from {width:.6g}"]
    np.testing.assert_allclose(stats.actions.q99[1] - stats.actions.q01[1], 10 * width)
    np.testing.assert_allclose(stats.actions.q99[1] + stats.actions.q01[1], raw.actions.q99[1] + raw.actions.q01[1])
    assert stats.actions.std[1] == pytest.approx(10 * width / 4.6527)
    for name in NAMES:
        np.testing.assert_array_equal(getattr(stats.state, name), getattr(raw.state, name))
    still = field_stats(np.full((9, 1), 5.0, np.float32))
    floor = with_min_range(NormStats(state=still, actions=still, num_frames=9, contract="", data=""), 0.1)
    for mode in ("zscore", "quantile"):
        assert abs(normalize(np.array([5.01]), floor.state, mode)[0]) < 1
    with pytest.raises(UnknownNameError, match=r"actions\[3\]"):
        with_min_range(raw, {"action[3]": 0.1})
    with pytest.raises(ConfigError, match="a range of 0 or more"):
        with_min_range(raw, -1.0)


# ---- against chunks that are laid out in full


def naive(dataset: Dataset, robot: Robot, horizon: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """State [n, S] and action chunks [n, H, A] as the model sees them, and which of their steps are valid."""
    chunks, valid = action_chunks(dataset, rows, action_key=robot.dataset_key(robot.action_key), horizon=horizon)
    state, space = read_state(dataset, robot)[rows], ActionSpace(robot)
    return space.state_to_model(state), space.to_model(chunks, state).astype(np.float32), valid


def expected(values: np.ndarray) -> FieldStats:
    """As numpy has it."""
    values = values.astype(np.float64)
    q01, q99 = np.quantile(values, (0.01, 0.99), axis=0)
    return FieldStats(values.mean(0), values.std(0), q01, q99, values.min(0), values.max(0))


def near(found: FieldStats, exact: FieldStats, share: float = 0.0) -> None:
    """Mean and deviation to rounding; extremes and quantiles to a share of the range: 0, to the last bit."""
    np.testing.assert_allclose(found.mean, exact.mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.std, exact.std, rtol=1e-9, atol=1e-12)
    for name in ("min", "max", "q01", "q99"):
        gap = np.abs(getattr(found, name) - getattr(exact, name))
        assert (gap <= share * (exact.max - exact.min)).all(), name


def equal(first: NormStats, second: NormStats) -> None:
    for part in ("state", "actions"):
        for name in NAMES:
            found, expected = (getattr(getattr(stats, part), name) for stats in (first, second))
            np.testing.assert_array_equal(found, expected, err_msg=f"{part} {name}")


def some_rows(dataset: Dataset, kind: str) -> np.ndarray:
    rng = np.random.default_rng(1)
    everything = np.arange(dataset.num_frames)
    if kind == "shuffled with holes":
        return rng.permutation(everything)[: dataset.num_frames // 3]
    return split_episodes(dataset, holdout=0.3, seed=0)[0] if kind == "split" else everything


ARMS = {
    "absolute": (Joints(14),),
    "relative": (Joints(14, relative=True),),
    "mixed": (
        Joints(6, relative=True, signs=(1, -1) * 3),
        Gripper(open=0.5, closed=-0.25),
        Joints(6),
        Gripper(relative=True),
    ),
    "linkage": (
        Joints(13, relative=True),
        LinkageGripper(horn=0.022, rod=0.036, finger=(0.018, 0.058), motor=(-0.6, 1.6), angle=(0.4, 1.5)),
    ),
    "relative pose": (EndEffector(rotation="rotvec", relative=True), Joints(7, relative=True), Gripper()),
    "pose": (EndEffector(rotation="euler_xyz"), Joints(8, relative=True, state_start=5)),
}


@pytest.mark.parametrize("kind", ["all", "split", "shuffled with holes"])
@pytest.mark.parametrize("arm", ARMS)
def test_equal_to_chunks_laid_out_in_full(shared_datasets, monkeypatch, arm, kind):
    dataset = open_dataset(shared_datasets / "synthetic_lerobot_v30")
    state = (State("observation.state", 14),)
    robot = Robot(name="arm", cameras={"base": "i"}, state=state, actions=ARMS[arm], action_key="action")
    rows = some_rows(dataset, kind)
    seen, chunks, valid = naive(dataset, robot, 50, rows)
    assert not valid.all()
    states, actions = expected(seen), expected(chunks[valid])
    for block in (2048, 1 << 18):
        monkeypatch.setattr(stats_module, "BLOCK", block)
        stats = compute_norm_stats(dataset, robot, 50, rows)
        # A product of matrices is rounded in another order when its factors lie otherwise in memory.
        near(stats.state, states)
        near(stats.actions, actions, 1e-6 if "pose" in arm else 0.0)
        rough = merge_sketches([sketch_norm_stats([(dataset, robot, half)], 50) for half in (rows[::2], rows[1::2])])
        near(rough.actions, actions, 2**-15)
        assert not np.array_equal(rough.actions.q01, stats.actions.q01)


def test_per_step(toy):
    rows = np.arange(toy.num_frames)
    found = per_step_stats(toy, TABLETOP, 13, rows)
    _, chunks, valid = naive(toy, TABLETOP, 13, rows)
    assert found.q01.shape == (13, 4)
    for step in range(12):
        near(FieldStats(*(getattr(found, name)[step] for name in NAMES)), expected(chunks[valid[:, step], step]))
    assert np.isnan([getattr(found, name)[12] for name in NAMES]).all()  # the longest episode has 12 frames


def test_no_picture_is_read(toy, toy_dataset, tmp_path):
    blind = Path(shutil.copytree(toy_dataset, tmp_path / "blind"))
    shutil.rmtree(blind / "videos")
    rows = np.arange(toy.num_frames)
    expected = compute_norm_stats(toy, TABLETOP, HORIZON, rows)
    equal(compute_norm_stats(open_dataset(blind), TABLETOP, HORIZON, rows), expected)


def test_no_rows(toy):
    with pytest.raises(ConfigError, match="at least one frame"):
        compute_norm_stats(toy, TABLETOP, HORIZON, np.arange(0))


# ---- in pieces


def test_workers_do_not_show(toy, monkeypatch):
    rows = np.arange(toy.num_frames)
    for block in (16, 64):
        monkeypatch.setattr(stats_module, "BLOCK", block)
        one, two, four = (
            compute_norm_stats(toy, TABLETOP, HORIZON, rows, workers=Workers(threads=n)) for n in (1, 2, 4)
        )
        equal(one, two)
        equal(one, four)


def sketch_share(root: Path, rows: np.ndarray, path: Path) -> None:
    stats_module.BLOCK = 8
    sketch_norm_stats([(open_dataset(root), TABLETOP, rows)], HORIZON).save(path)


@pytest.mark.slow
def test_processes_do_not_show(toy, toy_dataset, tmp_path, monkeypatch):
    """Sketches of shares of the rows, from processes of their own, through files, merged in any order."""
    monkeypatch.setattr(stats_module, "BLOCK", 8)
    rows = np.arange(toy.num_frames)
    whole = tmp_path / "whole.npz"
    sketch_norm_stats([(toy, TABLETOP, rows)], HORIZON).save(whole)  # without the exact quantiles, as the shares
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for processes in (1, 2, 4):
            shares = np.split(rows, [16, 32, 48][: processes - 1])
            paths = [tmp_path / f"{processes}_{i}.npz" for i in range(processes)]
            list(pool.map(sketch_share, [toy_dataset] * processes, shares, paths))
            sketches = [NormStatsSketch.load(path) for path in paths]
            equal(merge_sketches(sketches), NormStatsSketch.load(whole).stats())
            equal(merge_sketches(sketches[::-1]), NormStatsSketch.load(whole).stats())


def same(first: Sketch, second: Sketch) -> None:
    np.testing.assert_array_equal(first.counts, second.counts)
    for name in ("num", "total", "squares", "low", "high"):
        assert getattr(first, name) == getattr(second, name), name


def test_merging_is_associative_and_commutative():
    rng = np.random.default_rng(0)
    pieces = [
        rng.normal(3, 1e-3, 500),
        np.zeros(7),
        rng.normal(-40, 9, 300),
        np.full(9, -1e-20),
        rng.integers(0, 2, 90),
        np.zeros(0),
        rng.normal(0, 1e-9, 99),
    ]
    sketches = [Sketch.of(piece.astype(np.float32)) for piece in pieces]
    left = reduce(Sketch.merge, sketches)
    for _ in range(20):
        order = rng.permutation(len(sketches))
        cut = int(rng.integers(1, len(sketches)))
        halves = [reduce(Sketch.merge, [sketches[i] for i in some]) for some in (order[:cut], order[cut:])]
        same(halves[0].merge(halves[1]), left)
    together = np.concatenate(pieces).astype(np.float32)
    direct = Sketch.of(together)
    np.testing.assert_array_equal(direct.counts, left.counts)
    assert len(left.counts) <= 2**16 + 1
    for q in (0.0, 0.01, 0.3, 0.99, 1.0):
        assert abs(left.quantile(q) - np.quantile(together.astype(np.float64), q)) <= left.edges[1] - left.edges[0]


KINDS = {
    "normal": lambda rng: rng.normal(0, 1, 1 << 20),
    "equal": lambda rng: rng.integers(0, 2, 1 << 20),
    "outlier": lambda rng: np.append(rng.normal(0, 1e-6, (1 << 20) - 1), 1e3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [True, False])
def test_quantiles_of_pieces_are_exact_and_keep_few_numbers(kind, weighted):
    rng = np.random.default_rng(0)
    values = rng.permutation(KINDS[kind](rng)).astype(np.float32)
    weights = rng.integers(1, 4, len(values)) if weighted else None
    every = values if weights is None else np.repeat(values, weights)
    for q in (0.01, 0.99):
        tail = Tail(q, every[:: 1 << 6])
        for i in range(0, len(values), 1 << 14):
            tail.add(values[i : i + (1 << 14)], None if weights is None else weights[i : i + (1 << 14)])
        assert sum(map(len, tail.kept)) <= 0.025 * len(every)
        assert tail.quantile(len(every)) == np.quantile(every.astype(np.float64), q)
        unlike = Tail(q, np.array([-1e9, 1e9], np.float32)[[0, 0] if q < 0.5 else [1, 1]])
        unlike.add(values, weights)
        assert unlike.quantile(len(every)) is None


@pytest.mark.parametrize("relative", [True, False])
def test_rows_that_are_unlike_the_others(relative):
    """The sample is of every 64th row, and those alone are large: its limits would keep too few numbers."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (4096, 1)).astype(np.float32)
    values[::64] *= 100
    parts = [partial(_column, values[:, 0], np.arange(4096), None)]
    if relative:
        left = np.ones(4096, np.int64)
        columns = values, np.zeros((4096, 1), np.float32)
        parts = [partial(_chunks, Joints(1, relative=True), range(1), *columns, np.arange(4096), left)]
    (found,) = _sketch_part(parts, 64, False)
    assert found.exact == list(np.quantile(values.astype(np.float64), (0.01, 0.99)))


def test_far_from_zero_nothing_is_lost():
    values = (1e4 + np.random.default_rng(0).normal(0, 0.01, 5000)).astype(np.float32)
    found = field_stats(values[:, None])
    assert found.std[0] == pytest.approx(values.astype(np.float64).std(), rel=1e-12)
    assert field_stats(np.full((5000, 1), 0.1, np.float32)).std == [0.0]


def test_several_datasets(toy):
    split = np.array_split(np.arange(toy.num_frames), 2)
    sketches = [sketch_norm_stats([(toy, TABLETOP, rows)], HORIZON) for rows in split]
    merged = merge_sketches(sketches)
    near(merged.state, expected(naive(toy, TABLETOP, HORIZON, np.arange(65))[0]), 2**-15)
    assert merged.num_frames == 65
    assert merged.data == toy.fingerprint
    other = sketch_norm_stats([(toy, TABLETOP, split[0])], HORIZON + 1)
    with pytest.raises(NormStatsError, match="one robot layout and action horizon"):
        merge_sketches([sketches[0], other])


def test_a_file_that_is_no_sketch(tmp_path):
    path = tmp_path / "no.npz"
    path.write_text("{}")
    with pytest.raises(NormStatsError, match="a sketch of norm stats"):
        NormStatsSketch.load(path)


def test_the_rows_are_part_of_the_fingerprint(toy):
    every, some = (compute_norm_stats(toy, TABLETOP, HORIZON, np.arange(n)) for n in (65, 64))
    assert every.rows == rows_fingerprint(np.arange(65)[::-1]) != some.rows
    assert every.data == some.data


def test_ray_that_is_not_installed(toy, without):
    without("ray")
    with pytest.raises(ConfigError, match=r"the package ray") as error:
        compute_norm_stats(toy, TABLETOP, HORIZON, np.arange(65), workers=Workers(ray=True))
    assert error.value.next == "pip install 'manipi[ray]'"


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs manipi[ray]")
def test_ray_does_not_show(toy):
    rows = np.arange(65)
    equal(
        compute_norm_stats(toy, TABLETOP, HORIZON, rows, workers=Workers(ray=True)),
        compute_norm_stats(toy, TABLETOP, HORIZON, rows),
    )


# ---- the file in a run's folder


def test_the_file_is_reused_and_has_openpis_layout(tiny, tmp_path):
    first = prepare(tiny(), tmp_path).stats["tabletop"]
    path = tmp_path / "norm_stats.json"
    assert json.loads(path.read_text())["norm_stats"]["state"].keys() == {"mean", "std", "q01", "q99"}
    before = path.stat().st_mtime_ns
    again = prepare(tiny(), tmp_path).stats["tabletop"]
    assert path.stat().st_mtime_ns == before
    np.testing.assert_array_equal(again.actions.mean, first.actions.mean)
    assert load_norm_stats(path).num_frames == first.num_frames
    assert load_norm_stats(path).rows == first.rows != ""
    old = json.loads(path.read_text())
    del old["manipi"]["rows"]  # as files were before
    path.write_text(json.dumps(old))
    assert load_norm_stats(path).rows == ""


def spoil(path, **changes):
    data = json.loads(path.read_text())
    data["manipi"] |= changes
    path.write_text(json.dumps(data))


def test_statistics_of_another_dataset(tiny, tmp_path):
    prepare(tiny(), tmp_path)
    path = tmp_path / "norm_stats.json"
    spoil(path, data="0123456789abcdef")
    with pytest.raises(NormStatsError, match=r"an older state of them \(0123456789ab,") as error:
        prepare(tiny(), tmp_path)
    assert error.value.where == str(path)
    assert error.value.next.startswith(f"delete {path}")


def test_statistics_of_another_robot_or_horizon(tiny, tmp_path):
    prepare(tiny(), tmp_path)
    config = tiny()
    longer = replace(config, model=replace(config.model, action_horizon=5))
    with pytest.raises(NormStatsError, match="4 state and 4 action dimensions, horizon 5"):
        prepare(longer, tmp_path)
    other = replace(config, robot=replace(TABLETOP, state=(State("observation/state", 4, unit="mm"),)))
    with pytest.raises(NormStatsError, match="robot 'tabletop'"):
        prepare(other, tmp_path)
