import importlib
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from manipi.errors import ConfigError, UnknownNameError
from manipi.tabletop.environment import Tabletop, tabletop


# gymnasium prefers actions in [-1, 1]; ours are metres, because a robot spec converts them.
@pytest.mark.filterwarnings("ignore:.*symmetric and normalized space")
def test_gymnasium_accepts_the_environment():
    env = gymnasium.make("manipi/Tabletop-v0", cameras=("image", "wrist_image"), render_mode="rgb_array")
    check_env(env.unwrapped)
    env.reset(seed=0)
    assert env.render().shape == (480, 480, 3)


def rollout(seed: int, **options) -> list:
    env = Tabletop(image_size=32, cameras=("image", "wrist_image"), tasks=("reach", "push"), **options)
    observation, _ = env.reset(seed=seed)
    record = [observation]
    rng = np.random.default_rng(seed)
    for _ in range(5):
        record.append(env.step(rng.uniform(env.action_space.low, env.action_space.high))[0])
    return [*record, env.data.qpos.copy()]


@pytest.mark.parametrize("options", [{}, {"randomize": True, "shadows": True}])
def test_a_seed_determines_pixels_states_and_prompts(options):
    np.testing.assert_equal(rollout(3, **options), rollout(3, **options))
    one, other = rollout(3, **options)[0], rollout(4, **options)[0]
    assert (one["observation/image"] != other["observation/image"]).any()
    assert (one["observation/state"] != other["observation/state"]).any()


def test_an_episode_is_independent_of_the_one_before():
    fresh, used = Tabletop(randomize=True), Tabletop(randomize=True)
    used.reset(seed=1)
    used.step(np.array([0.3, 0.1, 0.02, 1.0]))
    np.testing.assert_equal(fresh.reset(seed=2), used.reset(seed=2))


def test_an_option_changes_only_what_it_names():
    env = Tabletop()
    _, before = env.reset(seed=5)
    observation, after = env.reset(seed=5, options={"target": "blue", "blocks": {"red": (0.3, 0.1)}})
    assert observation["prompt"] == "reach the blue block"
    np.testing.assert_allclose(after["blocks"]["red"][:2], (0.3, 0.1))
    np.testing.assert_equal(after["blocks"]["green"], before["blocks"]["green"])
    np.testing.assert_equal(after["joints"], before["joints"])


def test_blocks_start_apart_off_the_tray_and_at_rest():
    env = Tabletop(cameras=())
    for seed in range(30):
        _, info = env.reset(seed=seed)
        centers = np.stack(list(info["blocks"].values()))
        gaps = np.linalg.norm(centers[:, None] - centers, axis=-1)[np.triu_indices(3, 1)]
        assert gaps.min() >= tabletop.BLOCK_SPACING
        assert (
            np.abs(centers[:, :2] - tabletop.TRAY_CENTER).max(axis=1).min() > tabletop.TRAY_HALF + tabletop.BLOCK_HALF
        )
        _, _, _, _, info = env.step(np.append(env.tip, 0))
        np.testing.assert_allclose(np.stack(list(info["blocks"].values())), centers, atol=1e-3)


def test_the_tip_goes_where_it_is_sent_at_limited_speed_inside_the_workspace():
    env = Tabletop(cameras=(), max_steps=100, colors=("red",))
    env.reset(seed=0, options={"blocks": {"red": (0.22, 0.14)}})
    for goal in ([0.45, -0.15, 0.1], [0.3, 0.1, 0.15], [9, -9, 9]):
        inside = np.clip(goal, tabletop.WORKSPACE_LOW, tabletop.WORKSPACE_HIGH)
        for _ in range(30):
            before = env.tip
            state = env.step(np.array([*goal, 0.5]))[0]["observation/state"]
            assert np.linalg.norm(env.tip - before) < 1.25 * tabletop.MAX_STEP
        np.testing.assert_allclose(state, [*inside, 0.5], atol=2e-3)


def test_the_tip_pushes_a_block_along_the_table():
    env = Tabletop(cameras=(), tasks=("push",), colors=("red",))
    env.reset(seed=0, options={"blocks": {"red": (0.30, 0.12)}, "tip": (0.24, 0.12, 0.025)})
    for x in np.linspace(0.24, 0.36, 12):
        _, _, _, _, info = env.step(np.array([x, 0.12, 0.025, 0.0]))
        assert info["blocks"]["red"][2] == pytest.approx(tabletop.BLOCK_HALF, abs=2e-3)
    assert info["blocks"]["red"][0] > 0.36 + tabletop.BLOCK_HALF
    assert info["touched"] == "red"


def test_a_block_pressed_from_above_does_not_sink_into_the_table():
    env = Tabletop(cameras=(), tasks=("push",), colors=("red",))
    env.reset(seed=0, options={"blocks": {"red": (0.30, 0.12)}, "tip": (0.30, 0.12, 0.10)})
    for _ in range(20):
        env.step(np.array([0.30, 0.12, 0.02, 0.0]))
        assert env.block("red")[2] > tabletop.BLOCK_HALF - 4e-3
        assert np.isfinite(env.data.qpos).all()


BLOCKS = {"red": (0.25, 0.12), "green": (0.42, 0.0), "blue": (0.25, -0.12)}


def fly_to(env: Tabletop, color: str) -> tuple:
    """Comes down onto a block from above; returns the last step's result."""
    result = ()
    for height in (0.12, 0.05):
        for _ in range(12):
            result = env.step(np.array([*BLOCKS[color], height, 0.0], np.float32))
            if result[2] or result[3]:
                return result
    return result


@pytest.mark.parametrize("color", list(BLOCKS))
def test_reach_is_judged_by_the_first_block_touched(color):
    env = Tabletop(cameras=())
    env.reset(seed=0, options={"target": "red", "blocks": BLOCKS})
    _, reward, terminated, truncated, info = fly_to(env, color)
    assert terminated
    assert not truncated
    assert info["touched"] == color
    assert info["success"] == (color == "red") == bool(reward)
    assert info["failure"] == (None if color == "red" else "wrong_block")


@pytest.mark.parametrize(("instruct", "reaches_target"), [("green", False), ("red", True)])
def test_whoever_follows_a_wrong_prompt_is_judged_by_the_target(instruct, reaches_target):
    env = Tabletop(cameras=())
    options = {"task": "reach", "target": "red", "instruct": instruct, "blocks": BLOCKS}
    observation, info = env.reset(seed=0, options=options)
    assert observation["prompt"] == f"reach the {instruct} block"
    _, _, _, _, info = fly_to(env, observation["prompt"].split()[2])
    assert (info["touched"], info["success"]) == (instruct, reaches_target)
    assert info["target"] == "red"


@pytest.mark.parametrize("task", ["reach", "push"])
def test_doing_nothing_fails_at_max_steps(task):
    env = Tabletop(cameras=(), max_steps=4, tasks=(task,))
    env.reset(seed=0)
    results = [env.step(np.append(env.tip, 0)) for _ in range(4)]
    assert [result[3] for result in results] == [False, False, False, True]
    assert results[-1][4]["failure"] == "max_steps"
    assert not any(result[2] for result in results)


def test_push_succeeds_when_the_target_and_no_other_is_in_the_tray():
    env = Tabletop(cameras=(), tasks=("push",))
    for target, expected in (("red", True), ("blue", False)):
        env.reset(seed=0, options={"target": target, "blocks": {"red": tabletop.TRAY_CENTER, "blue": (0.24, 0.13)}})
        _, _, terminated, _, info = env.step(np.append(env.tip, 0))
        assert info["success"] == terminated == expected


@pytest.mark.parametrize(
    "settings",
    [{"cameras": ("wrist",)}, {"tasks": ("lift",)}, {"colors": ("red", "grean")}, {"pairs": "all"}, {"perturb": "fog"}],
    ids=lambda s: next(iter(s)),
)
def test_an_unknown_name_is_an_error(settings):
    with pytest.raises(UnknownNameError, match=r"did you mean|choose one of"):
        Tabletop(**settings)


@pytest.mark.parametrize("colors", [(), ("red", "red"), tuple(tabletop.COLORS)])
def test_block_colours_must_differ_and_fit(colors):
    with pytest.raises(ConfigError, match="different block colours"):
        Tabletop(colors=colors)


@pytest.mark.parametrize("settings", [{"tray": False}, {"pairs": "seen"}, {"perturb": "wording"}])
def test_what_goes_with_reach_alone(settings):
    with pytest.raises(ConfigError, match="reach alone"):
        Tabletop(tasks=("push",), **settings)
    with pytest.raises(ConfigError, match="2 to 4 different block colours"):
        Tabletop(tasks=("two_step",), colors=("red",))


def test_bad_options_and_actions_are_errors():
    env = Tabletop(cameras=())
    for options in ({"goal": "red"}, {"target": "pink"}, {"instruct": "pink"}, {"blocks": {"pink": (0.3, 0)}}):
        with pytest.raises(UnknownNameError):
            env.reset(options=options)
    env.reset(seed=0)
    for action in (np.zeros(3), np.array([0.3, np.nan, 0.1, 0])):
        with pytest.raises(ConfigError, match="4 finite numbers"):
            env.step(action)


def test_a_missing_simulator_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("manipi.tabletop.environment")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ConfigError, match=r"pip install 'manipi\[demo\]'"):
        importlib.import_module("manipi.tabletop.environment")
