"""Every suite of the tabletop: its expert, what makes it hard, and that its demonstrations can be trained on."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from manipi.cli import main
from manipi.data.open import open_dataset
from manipi.errors import ConfigError
from manipi.evaluate.suites import FIRST_SCENE, find_suite
from manipi.recipes.registry import load_recipe
from manipi.tabletop.environment import demonstrations
from manipi.tabletop.environment.tabletop import PERTURBATIONS, UNSEEN_PAIRS, WORDINGS, build_scene
from manipi.tabletop.recipes import IMAGE_SIZE
from manipi.tabletop.suites import DEMONSTRATED, SUITES, TabletopSimulator
from manipi.tokenizers import ByteTokenizer
from manipi.tokenizers.prompts import pi05_tokens
from manipi_client.trials import TrialSpec, demonstrate, film

QUARTERS = [[142.42, 140.93, 141.69], [130.74, 126.58, 117.43], [163.11, 158.57, 151.43], [167.46, 161.07, 153.83]]
"""Mean colours of the first picture of tabletop/reach: above left and right, below left and right."""


def simulator(name: str, **options) -> TabletopSimulator:
    return TabletopSimulator(**{**SUITES[name].options, "image_size": 24, **options})


def drive(simulator: TabletopSimulator, name: str, scene: int) -> int:
    """The expert to the end; returns the number of steps."""
    simulator.reset(scene, SUITES[name].tasks[0])
    steps = 0
    while not simulator.success and simulator.failure is None and steps < simulator.max_steps:
        simulator.step(simulator.expert())
        steps += 1
    return steps


def expert_success(name: str, count: int) -> float:
    there = simulator(name)
    wins = 0
    for trial in range(count):
        drive(there, name, SUITES[name].trial(0, trial, execute_steps=8).scene)
        wins += there.success
    return wins / count


@pytest.mark.parametrize("name", SUITES)
def test_the_expert_succeeds(name):
    assert expert_success(name, 40) >= 0.95


@pytest.mark.long
@pytest.mark.parametrize("name", SUITES)
def test_the_expert_succeeds_on_many_scenes(name):
    assert expert_success(name, 200) >= 0.95


def test_the_demos_scenes_did_not_move():
    """A demonstration of version 0.1.0, and the first scene of tabletop/reach."""
    [episode] = demonstrations((1_000_000,), image_size=56)
    assert (episode["task"], len(episode["actions"])) == ("reach the blue block", 12)
    ends = [[0.24256, 0.01549, 0.13315, 0.38132], [0.41639, 0.03878, 0.06088, 0.47983]]
    np.testing.assert_allclose(episode["observation/state"][[0, -1]], ends, atol=1e-4)
    seen = TabletopSimulator(image_size=56).reset(FIRST_SCENE, "reach")
    assert seen["prompt"] == "reach the red block"
    np.testing.assert_allclose(seen["observation/state"], [0.26517, 0.02344, 0.12386, 0.00154], atol=1e-5)
    quarters = seen["observation/image"].reshape(2, 28, 2, 28, 3).mean((1, 3))
    np.testing.assert_allclose(quarters.reshape(4, 3), QUARTERS, atol=0.2)


@pytest.mark.parametrize("name", SUITES)
def test_a_scene_is_a_function_of_its_seed_alone(name):
    fresh, used = simulator(name), simulator(name)
    drive(used, name, 3)
    for there in (fresh, used):
        there.reset(11, SUITES[name].tasks[0])
    for _ in range(12):
        first, second = fresh.observe(), used.observe()
        np.testing.assert_equal(first, second)
        np.testing.assert_equal(first, fresh.observe())  # however often one looks
        assert fresh.prompt != fresh.wrong_prompt == used.wrong_prompt
        action = fresh.expert()
        for there in (fresh, used):
            there.step(action)


def test_a_film_shows_the_same_motion():
    there = simulator("memory")
    made = demonstrate(there, 5, "")
    end = there.position
    spec = TrialSpec(index=0, scene=5, task="", noise=0, execute_steps=8)
    frames = film(there, spec, made["actions"])
    assert len(frames) == len(made["actions"]) + 1
    np.testing.assert_array_equal(there.position, end)


def test_two_steps_have_words_of_their_own():
    there, lengths = simulator("two-step"), []
    for scene in range(5):
        made = demonstrate(there, scene, "two_step")
        target, then = (there._env.goal.steps[step][1] for step in (0, 1))
        assert made["prompt"] == f"push the {target} block to the tray, then touch the {then} one"
        assert list(dict.fromkeys(made["subtasks"])) == [
            f"push the {target} block to the tray",
            f"touch the {then} block",
        ]
        assert made["success"]
        assert target != then
        wrong = there._env.another_instruction(scene)
        assert (wrong.target, wrong.then) == (target, then)
        assert wrong.instruct not in (target, wrong.instruct_then)
        assert wrong.instruct_then != then
        lengths.append(len(made["actions"]))
    assert np.mean(lengths) < 45


def test_two_steps_in_the_wrong_order_are_no_success():
    there = simulator("two-step")
    there.reset(0, "two_step")
    env = there._env
    second = env.block(env.goal.then)
    for height in (0.11, 0.03):
        for _ in range(14):
            there.step(np.array([*second[:2], height, 0.0], np.float32))
    assert env.touched == env.goal.then
    assert (there.success, there.failure, there.collisions) == (False, None, 1)
    assert there.subtask.startswith("push the ")


def test_after_a_second_the_target_is_out_of_sight_and_still_there():
    there = simulator("memory", image_size=56, lock=0)
    colors = {"red": 0, "green": 1, "blue": 2}
    for scene in range(3):
        there.reset(scene, "")
        env, away = there._env, np.array([0.16, 0.2, 0.2, 0.0], np.float32)
        target, place = env.goal.target, env.block(env.goal.target)

        def visible(channel: int = colors[target]) -> bool:
            picture = there.observe()["observation/image"].astype(int)
            others = np.delete(picture, channel, axis=-1).max(axis=-1)
            return bool((picture[..., channel] > 1.7 * others).any())

        for step in range(20):
            assert visible() == (step < 10), step
            there.step(away)
        np.testing.assert_allclose(env.block(target), place, atol=1e-3)
        there.reset(scene, "")
        assert visible()


def test_the_arm_of_memory_starts_later_than_the_policy():
    there, stood = simulator("memory"), []
    for scene in range(30):
        there.reset(scene, "")
        start, steps = there.position, 0
        while np.linalg.norm(there.position - start) < 0.005:
            there.step(there.expert())
            steps += 1
        stood.append(steps - 1)
    assert min(stood) <= 3
    assert 13 <= max(stood) <= 15


def pairs_of(there: TabletopSimulator) -> tuple[str, list[str]]:
    target = there._env.goal.target
    return target, [name for name in there._env.names if name != target]


def test_unseen_pairs_are_in_trials_alone_and_one_word_decides():
    seen_targets, seen_anywhere, unseen = set(), set(), set()
    for options, targets in ((SUITES["pairs"].demonstrated, seen_targets), ({}, unseen)):
        shared, prompts = set(), set()
        there = simulator("pairs", **options)
        for scene in range(60):
            there.reset(scene, "")
            target, others = pairs_of(there)
            color, shape = target.split()
            (other,) = others
            said = {f"reach the {target}": target, f"reach the {color} block": color, f"reach the {shape}": shape}
            assert said[there.prompt] not in (other, *other.split())  # it tells the two apart
            prompts.add(there.prompt.replace(color, "C").replace(shape, "S"))
            assert there.wrong_prompt == f"reach the {other}"
            same = (other.split()[0] == color, other.split()[1] == shape)
            shared.add(same)
            targets.add(target)
            if options:
                seen_anywhere |= {target, *others}
            else:
                assert not set(others) & set(UNSEEN_PAIRS)
        assert prompts == {"reach the C S", *(["reach the C block", "reach the S"] if options else [])}
        assert shared == {(True, False), (False, True), *([(False, False)] if options else [])}
    assert unseen == set(UNSEEN_PAIRS)
    assert len(seen_targets) == 4
    assert not seen_anywhere & unseen
    assert {word for pair in seen_targets for word in pair.split()} >= {w for pair in unseen for w in pair.split()}


def test_nothing_rolls_away():
    there = simulator("pairs", pairs="seen")
    for scene in range(6):
        there.reset(scene, "")
        before = {name: there._env.block(name) for name in there._env.names}
        for _ in range(20):
            there.step(np.array([0.2, 0.0, 0.2, 0.0], np.float32))
        for name, place in before.items():
            np.testing.assert_allclose(there._env.block(name), place, atol=1e-3)


def test_a_crowd_has_every_colour_once_and_room_between():
    there = simulator("crowd")
    for scene in range(20):
        there.reset(scene, "")
        assert there._env.names == SUITES["crowd"].options["colors"]
        places = np.stack([there._env.block(name) for name in there._env.names])
        gaps = np.linalg.norm(places[:, None] - places, axis=-1)[np.triu_indices(len(places), 1)]
        assert gaps.min() >= 0.085


@pytest.mark.parametrize("family", PERTURBATIONS)
def test_a_perturbation_changes_what_it_says_and_nothing_else(family):
    plain, other = simulator("reach", image_size=56), simulator(f"reach-{family}", image_size=56)
    different = []
    for scene in range(8):
        before, after = plain.reset(scene, "reach"), other.reset(scene, "")
        different.append(after["prompt"] != before["prompt"])
        assert different[-1] == (family == "wording")
        moved = np.abs(after["observation/state"] - before["observation/state"])[:3].max() > 1e-6
        assert moved == (family in ("start", "noise"))
        assert (after["observation/image"] != before["observation/image"]).any() == (family != "wording")
        for name in ("red", "green", "blue"):
            np.testing.assert_array_equal(plain._env.block(name), other._env.block(name))
        assert plain._env.goal.target == other._env.goal.target
        assert len(other._env.names) == (6 if family == "distractors" else 3)


def test_start_is_outside_of_what_demonstrations_show():
    there = simulator("reach-start")
    low, high = there._env.action_space.low[:3], there._env.action_space.high[:3]
    for scene in range(20):
        there.reset(scene, "")
        assert ((there.position < low - 1e-6) | (there.position > high + 1e-6)).any()


def test_the_demos_policy_can_read_every_instruction_but_that_of_two_steps():
    tokenizer, longest = ByteTokenizer(), load_recipe("tabletop").model.max_token_len
    shapes = [f"{color} {shape}" for color in ("red", "green", "blue") for shape in ("cube", "cylinder", "ball")]
    prompts = [wording.format("purple block") for wording in WORDINGS] + [f"reach the {pair}" for pair in shapes]
    assert max(len(pi05_tokens(tokenizer, prompt, np.ones(4))) for prompt in prompts) <= longest
    two = "push the purple block to the tray, then touch the orange one"
    assert longest < len(pi05_tokens(tokenizer, two, np.ones(4))) <= 32  # docs/suites.md: --model.max-token-len 32


def test_demonstrations_are_as_large_as_the_recipe_reads():
    assert DEMONSTRATED["image_size"] == IMAGE_SIZE


def test_a_shape_is_part_of_a_name():
    model = build_scene(("red", "blue cylinder", "green ball"))
    assert [model.body(name).geomnum[0] for name in ("red", "blue cylinder", "green ball")] == [1, 1, 1]


@pytest.mark.slow
def test_the_command_records_subtasks(tmp_path, capsys):
    target = tmp_path / "dataset"
    main(["demonstrate", "tabletop/two-step", str(target), "--episodes", "3", "--noise", "0.0", "0.3"])
    assert "3 of 3 episodes succeeded" in capsys.readouterr().out
    dataset = open_dataset(target)
    prompts = [dataset.prompt(row) for row in range(dataset.num_frames)]
    subtasks = [dataset.subtask(row) for row in range(dataset.num_frames)]
    assert all(text.startswith("push the ") and ", then touch the " in text for text in prompts)
    assert {text.split()[0] for text in subtasks} == {"push", "touch"}
    for prompt, subtask in zip(prompts, subtasks):
        assert prompt.startswith(subtask) or subtask.removesuffix(" block") in prompt
    words = pq.read_schema(target / "meta/subtasks.parquet").pandas_metadata  # lerobot reads them as the table's index
    assert words["index_columns"] == ["__index_level_0__"]
    assert find_suite("tabletop/two-step").demonstrated["image_size"] == dataset.features["observation/image"].shape[0]


@pytest.mark.parametrize("options", [{"near": 0.05}, {"near": 0.11, "colors": ("red", "green", "blue")}])
def test_blocks_near_the_tray_need_room(options):
    with pytest.raises(ConfigError, match=r"Tabletop\(near"):
        simulator("two-step", **options)
