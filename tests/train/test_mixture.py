"""Two datasets and two robots in one run: shares, statistics, checkpoints."""

from dataclasses import replace

import numpy as np
import pytest

from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.data.review.check import check_dataset
from manipi.errors import ConfigError, MissingFeatureError, UnknownNameError
from manipi.policy import Policy
from manipi.robots import Gripper, Joints, Robot, State
from manipi.robots.tabletop import TABLETOP
from manipi.tokenizers import DctTokenizer, FastTokenizer
from manipi.train.config import DatasetConfig
from manipi.train.data import chunks_to_fit, open_demonstrations, prepare
from manipi.train.loop import train

ARM = Robot(
    name="arm",
    cameras={"base": "front"},
    state=(State("joints", 3),),
    actions=(Joints(2, relative=True), Gripper()),
    action_key="command",
    dataset_keys={"front": "images/front"},
    control_hz=20.0,
)
LENGTHS = (9, 6, 8, 7)


@pytest.fixture(scope="module")
def arm_dataset(tmp_path_factory):
    """Another robot, with pictures of another size under another name, and numbers a hundred times as large."""
    features = {
        "images/front": Feature(kind="image", shape=(24, 32, 3), dtype="video"),
        "joints": Feature(kind="vector", shape=(3,), dtype="float32"),
        "command": Feature(kind="vector", shape=(3,), dtype="float32"),
    }
    root, rng = tmp_path_factory.mktemp("arm") / "dataset", np.random.default_rng(0)
    with LeRobotWriter(root, fps=20, features=features, robot_type="arm") as writer:
        for length in LENGTHS:
            joints = (100 + 100 * rng.standard_normal((length, 3))).astype(np.float32)
            images = rng.integers(0, 256, (length, 24, 32, 3), dtype=np.uint8)
            episode = {"images/front": images, "joints": joints, "command": joints}
            writer.add_episode(episode, task="wave")
    return root


@pytest.fixture
def mixed(tiny, toy_dataset, arm_dataset):
    """A recipe of three parts tabletop and one part arm."""

    def mixed(**changes):
        sets = (
            DatasetConfig(path=str(toy_dataset), weight=3),
            DatasetConfig(path=str(arm_dataset), weight=1, robot=ARM),
        )
        config = tiny(batch_size=8, **changes)
        return replace(config, data=replace(config.data, path="", mixture=sets))

    return mixed


def test_batches_hold_the_shares(mixed, tmp_path):
    config = mixed(steps=100)
    data = prepare(config, tmp_path)
    shares = {share.robot: share for share in data.report()}
    assert {name: share.share for name, share in shares.items()} == {"tabletop": 0.75, "arm": 0.25}
    assert shares["arm"].held_out in LENGTHS  # one whole episode
    assert shares["arm"].frames + shares["arm"].held_out == sum(LENGTHS)
    assert shares["arm"].epochs == 0.25 * 100 * 8 / shares["arm"].frames
    prompts = []
    with data.loader(0) as loader:
        for step, batch, _ in loader:
            prompts += [
                data.tokenizers.text.decode(t[v].tolist()) for t, v in zip(batch["tokens"], batch["token_valid"])
            ]
            if step == 49:
                break
    assert 0.15 < np.mean(["wave" in prompt for prompt in prompts]) < 0.35
    assert all("wave" in prompt or "reach it" in prompt for prompt in prompts)


def test_every_robot_has_its_own_scale(mixed, tmp_path):
    data = prepare(mixed(), tmp_path)
    assert data.stats["arm"].state.mean.mean() > 30
    assert data.stats["tabletop"].state.mean.max() < 30
    assert (tmp_path / "robots/arm/norm_stats.json").is_file()
    for one in data.sets:
        samples = one.source.samples(one.rows)
        stats = data.stats[one.source.pipeline.robot.name]
        assert stats.num_frames == len(one.rows)
        assert np.abs(np.mean([s["actions"][0, :3] for s in samples], axis=0)).max() < 1.5


def test_a_checkpoint_serves_every_robot_that_it_was_trained_on(mixed, tmp_path):
    checkpoint = train(mixed(steps=2), tmp_path / "run", show=False)
    policy = Policy.load(checkpoint)
    assert policy.robot == TABLETOP
    arm = Policy.load(checkpoint, robot="arm")
    assert arm.robot == ARM
    observation = {"front": np.zeros((24, 32, 3), np.uint8), "joints": np.full(3, 100, np.float32), "prompt": "wave"}
    actions = arm.infer(observation)["actions"]
    assert actions.shape == (4, 3)
    assert np.abs(actions[:, :2]).max() > 5  # in the arm's units
    with pytest.raises(UnknownNameError, match=r"(?s)arm, tabletop.*did you mean arm"):
        Policy.load(checkpoint, robot="arn")


def test_two_datasets_of_one_robot_share_their_statistics(tiny, toy_dataset, tmp_path):
    sets = tuple(DatasetConfig(path=str(toy_dataset), episodes=numbers) for numbers in ((0, 1, 2, 3), (4, 5, 6, 7)))
    config = tiny()
    config = replace(config, data=replace(config.data, path="", mixture=sets, holdout=0.0))
    parts = prepare(config, tmp_path / "parts")
    whole = prepare(replace(tiny(), data=replace(tiny().data, holdout=0.0)), tmp_path / "whole")
    ours, expected = parts.stats["tabletop"], whole.stats["tabletop"]
    assert ours.num_frames == expected.num_frames
    for name in ("mean", "std", "min", "max"):
        np.testing.assert_allclose(getattr(ours.actions, name), getattr(expected.actions, name), rtol=1e-12)
    width = expected.actions.max - expected.actions.min
    assert (np.abs(ours.actions.q99 - expected.actions.q99) <= width * 2**-15).all()


@pytest.mark.parametrize("kind", ["fit", "dct"])
def test_action_tokenizers_are_fitted_to_all_datasets(kind, mixed, tmp_path):
    config = mixed(kind="pi0_fast", action_tokenizer=kind)
    config = config if kind == "dct" else replace(config, model=replace(config.model, codes=None))
    data, opened = prepare(config, tmp_path), open_demonstrations(config)
    ours, theirs = chunks_to_fit(config, opened, data.stats)
    assert [len(ours), len(theirs)] == [len(one.rows) for one in opened]
    codec, fit = data.tokenizers.action, DctTokenizer.fit if kind == "dct" else FastTokenizer.fit
    assert codec.sha256 == fit(ours, theirs).sha256 != fit(ours).sha256


def test_one_name_for_two_robots(mixed, tmp_path):
    config = mixed()
    impostor = replace(ARM, name="tabletop")
    sets = (config.data.mixture[0], replace(config.data.mixture[1], robot=impostor))
    with pytest.raises(ConfigError, match=r"(?s)one layout of states and actions per robot.*'tabletop'"):
        prepare(replace(config, data=replace(config.data, mixture=sets)), tmp_path)


def test_a_mixture_without_the_recipes_robot(mixed, tmp_path):
    config = mixed()
    with pytest.raises(ConfigError, match="only demonstrations of arm"):
        prepare(replace(config, data=replace(config.data, mixture=config.data.mixture[1:])), tmp_path)


def test_datasets_seen_from_a_root(tiny, toy_dataset, tmp_path):
    config = tiny()
    data = replace(config.data, path="", root=str(toy_dataset.parent), mixture=(DatasetConfig(path="dataset"),))
    assert prepare(replace(config, data=data), tmp_path).main.source.dataset.root == toy_dataset.resolve()


@pytest.mark.parametrize("cache", ["none", "raw"])
def test_an_optional_camera_may_be_absent_from_one_of_the_datasets(cache, tiny, toy_dataset, tmp_path, capsys):
    """The toy's robot with a wrist camera, which one dataset has and the other lacks."""
    two = replace(TABLETOP, cameras=TABLETOP.cameras | {"left_wrist": "wrist"}, optional=("left_wrist",))
    features = {
        "observation/image": Feature(kind="image", shape=(16, 16, 3), dtype="video"),
        "wrist": Feature(kind="image", shape=(16, 16, 3), dtype="video"),
        "observation/state": Feature(kind="vector", shape=(4,), dtype="float32"),
        "actions": Feature(kind="vector", shape=(4,), dtype="float32"),
    }
    rng = np.random.default_rng(0)
    with LeRobotWriter(tmp_path / "both", fps=10, features=features, robot_type="two") as writer:
        for _ in range(4):
            values = {k: rng.normal(size=(6, 4)) for k in ("observation/state", "actions")}
            grey = np.full((6, 16, 16, 3), 128, np.uint8)
            writer.add_episode({**values, "observation/image": grey, "wrist": grey}, task="reach it")
    sets = (DatasetConfig(path=str(toy_dataset)), DatasetConfig(path=str(tmp_path / "both")))
    config = tiny(steps=2, save_every=2)
    model = replace(config.model, cameras=("base", "left_wrist"))
    config = replace(config, robot=two, model=model, data=replace(config.data, path="", mixture=sets, cache=cache))
    data = prepare(config, tmp_path / "run")
    assert "absent  dataset: the optional camera 'left_wrist' (wrist)" in capsys.readouterr().out
    about = [f.severity for f in check_dataset(toy_dataset, robot=two).findings if "'left_wrist'" in f.what]
    assert about == ["warning"]
    for one, valid in zip(data.sets, ([True, False], [True, True]), strict=True):
        (sample,) = one.to_train_on.samples(one.rows[:1])
        assert sample["image_valid"].tolist() == valid
        assert sample["images"][1].any() == valid[1]
    policy = Policy.load(train(config, tmp_path / "run", show=False))
    observation = {key: value for key, value in data.example().items() if key != "prompt"}
    assert policy.infer({**observation, "prompt": "reach it"})["actions"].shape == (4, 4)
    with pytest.raises(MissingFeatureError, match="image 'wrist'"):
        prepare(replace(config, robot=replace(two, optional=())), tmp_path / "other")


@pytest.mark.parametrize("kind", ["pi05", "pi0_fast", "pi0"])
def test_a_state_wider_than_the_actions_is_legal_where_it_is_text(kind, tiny, tmp_path):
    """From training to answers; π0 alone has a network that reads it."""
    wide = Robot(
        name="wide", cameras={"base": "i"}, state=(State("s", 6),), actions=(Joints(4),), action_key="a", control_hz=10
    )
    features = {
        "i": Feature(kind="image", shape=(16, 16, 3), dtype="video"),
        "s": Feature(kind="vector", shape=(6,), dtype="float32"),
        "a": Feature(kind="vector", shape=(4,), dtype="float32"),
    }
    rng = np.random.default_rng(0)
    with LeRobotWriter(tmp_path / "data", fps=10, features=features, robot_type="wide") as writer:
        for _ in range(4):
            values = {"s": rng.normal(size=(6, 6)), "a": rng.normal(size=(6, 4))}
            writer.add_episode({"i": np.zeros((6, 16, 16, 3), np.uint8), **values}, task="reach it")
    config = tiny(kind, steps=1, save_every=1)
    assert config.model.action_dim == 4
    config = replace(config, robot=wide, data=replace(config.data, path=str(tmp_path / "data")))
    if kind == "pi0":
        with pytest.raises(ConfigError, match="at most 4 dimensions\n   found cameras base; 6 dimensions"):
            train(config, tmp_path / "run", show=False)
        return
    policy = Policy.load(train(config, tmp_path / "run", show=False))
    seen = {"i": np.zeros((16, 16, 3), np.uint8), "s": np.arange(6.0), "prompt": "reach it"}
    assert policy.infer(seen)["actions"].shape == (4, 4)
    last = (
        policy.pipeline.encode(seen)[0]["tokens"],
        policy.pipeline.encode({**seen, "s": np.arange(6.0) - 9})[0]["tokens"],
    )
    assert not np.array_equal(*last)  # the words hold all six


@pytest.mark.parametrize(("rate", "said"), [(10, False), (30, True)])
def test_a_dataset_of_another_rate_than_the_robots_is_told(rate, said, tiny, tmp_path, capsys):
    config = tiny()
    prepare(replace(config, robot=replace(config.robot, control_hz=rate)), tmp_path / "run")
    told = "rate    dataset: 'tabletop' runs at 30 Hz, the dataset at 10 Hz" in capsys.readouterr().out
    assert told == said
