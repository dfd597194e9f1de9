"""Validation against the same numbers worked out frame by frame, and that a run never feels it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from manipi.checkpoints.native import seal, verify
from manipi.cli import main
from manipi.cli.train import VALIDATION_SEED, rollouts_of
from manipi.data.dataset import command_units
from manipi.data.feed.mixture import frames_of
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.errors import ConfigError, SimulatorError, UnknownNameError
from manipi.evaluate.evaluation import Evaluation, Settings
from manipi.evaluate.policies import open_policy
from manipi.evaluate.suites import find_suite
from manipi.model import ModelInput
from manipi.policy import Policy
from manipi.robots import EndEffector, Gripper, Joints, Robot, State
from manipi.train.config import DatasetConfig, ValidationConfig
from manipi.train.data import prepare
from manipi.train.loop import train
from manipi.train.run.folder import Run, append_log, read_log
from manipi.train.step.state import TrainState
from manipi.train.step.step import draw_noise
from manipi.train.watch.validation import HeldOutFrames, _about_prompts
from manipi.transforms.pipeline import observation_of

OF_THE_CLOCK = {"time", "seconds"}
SMALL = ValidationConfig(every=2, samples=8, batch_size=3, raw=True)
every_kind = pytest.mark.parametrize("kind", ["pi05", "pi0", "pi0_fast"])


def records(folder: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in OF_THE_CLOCK} for r in read_log(folder / "validation.jsonl")]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """`run("pi0")` is the folder of four steps of that policy with two validations, the second at the end."""
    made: dict[str, Path] = {}

    def train_once(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(f"validated_{kind}") / "run"
            # Between and beside the checkpoints of steps 3 and 4.
            train(tiny(kind, steps=4, save_every=3, validation=SMALL), made[kind], show=False)
        return made[kind]

    return train_once


@pytest.fixture(scope="module")
def told(toy_episodes, toy_dataset, tmp_path_factory) -> Path:
    """The toy dataset with two prompts of one length."""
    from manipi.data.open import open_dataset

    features = {k: f for k, f in open_dataset(toy_dataset).features.items() if k in toy_episodes[0]}
    root = tmp_path_factory.mktemp("told") / "dataset"
    with LeRobotWriter(root, fps=10, features=features, robot_type="tabletop", pix_fmt="yuv444p") as writer:
        for number, episode in enumerate(toy_episodes):
            writer.add_episode(episode, task=("take it", "drop it")[number % 2])
    return root


def frames(config, folder):
    """The held-out frames of a run's first dataset, and the data."""
    data = prepare(config, folder)
    return HeldOutFrames(data.main, data.stats[config.robot.name], config), data


# ---- it changes nothing


@every_kind
def test_a_run_without_validation_ends_with_the_same_bits(kind, run, tiny, tmp_path):
    torch.manual_seed(1)
    plain = train(tiny(kind, steps=4, save_every=3), tmp_path, show=False)
    states = [TrainState.initial(tiny(kind)) for _ in range(2)]
    for state, folder in zip(states, (plain, run(kind) / "checkpoints/4"), strict=True):
        state.load(folder / "train_state")
    left, right = (state._tensors() for state in states)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert not (tmp_path / "validation").exists()


def test_it_draws_no_random_numbers_of_others(tiny, run, tmp_path):
    config = tiny(validation=SMALL)
    policy, state = Policy.load(run("pi05") / "checkpoints/4"), TrainState.initial(config)
    before, mode = torch.random.get_rng_state(), state.model.training
    held_out, _ = frames(config, tmp_path)
    held_out.measure(policy, state.model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert state.model.training == mode
    assert all(p.grad is None for p in state.model.parameters())


@pytest.mark.parametrize("kind", ["pi05", "pi0_fast"])
def test_a_resumed_run_has_the_same_validations(kind, run, tiny, tmp_path):
    config = tiny(kind, steps=4, save_every=3, validation=SMALL)
    train(config, tmp_path, stop_at=3, show=False)
    # What a killed run may leave: a validation after its last checkpoint, and half a line.
    append_log(tmp_path / "validation.jsonl", {"step": 4, "loss": 0.0, "action_error": 0.0})
    with (tmp_path / "validation.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    train(config, tmp_path, show=False)
    assert [record["step"] for record in records(tmp_path)] == [2, 4]
    assert records(tmp_path) == records(run(kind))


# ---- its numbers


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_numbers_frame_by_frame(kind, run, tiny, tmp_path):
    """Losses and sampled actions one frame at a time, through `infer`, as a robot would ask."""
    folder = run(kind)
    config = tiny(kind, validation=SMALL)
    policy, data = Policy.load(folder / "checkpoints/4"), prepare(config, tmp_path)
    held_out = data.main.held_out
    rows = held_out[np.unique(np.linspace(0, len(held_out) - 1, 8).round().astype(int))]
    noise, timesteps = draw_noise(config.seed, -1, 8, 2, 4, config.model.action_dim)
    squared, elements, errors = 0.0, 0.0, []
    commands = data.main.source.dataset.column("actions")[data.main.rows].astype(float)
    travel = np.quantile(commands, 0.99, axis=0) - np.quantile(commands, 0.01, axis=0)
    for i, frame in enumerate(frames_of(config.robot, 4, data.main.source.dataset, rows)):
        batch = {k: v[None] for k, v in data.main.source.pipeline.encode_frame(frame).items()}
        with torch.no_grad():
            loss = policy.model(ModelInput.from_numpy(batch), noise[i : i + 1, 0], timesteps[i : i + 1, 0])
        squared, elements = squared + float(loss.loss * loss.weight), elements + float(loss.weight)
        for draw in noise[i].numpy():
            actions = policy.infer(observation_of(frame, config.robot), draw)["actions"]
            errors.append((np.abs(actions - frame.actions) / travel)[frame.action_valid])
    record, details = records(folder)[-1], json.loads((folder / "validation/4.json").read_text())["sets"][0]
    assert record["loss"] == pytest.approx(squared / elements, rel=1e-5)
    assert record["action_error"] == pytest.approx(np.concatenate(errors).mean(), rel=1e-5)
    assert details["errors"]["policy"]["share_of_travel"] == record["action_error"]
    assert np.shape(details["errors"]["policy"]["per_step_dimension"]) == (4, 4)
    assert details["frames"] == len(rows)
    by_hand = np.concatenate(errors).mean(axis=0) * travel
    np.testing.assert_allclose(details["errors"]["policy"]["per_dimension"], by_hand, rtol=1e-5)


def test_weights_are_those_that_are_served(run, tiny, tmp_path):
    """The raw weights have another loss, which is that of the raw weights."""
    config = tiny(validation=SMALL)
    held_out, _ = frames(config, tmp_path)
    state = TrainState.initial(config)
    state.load(run("pi05") / "checkpoints/4/train_state")
    result = held_out.measure(Policy.load(run("pi05") / "checkpoints/4"), state.model)
    record = records(run("pi05"))[-1]
    assert (result.loss, result.raw_loss) == (record["loss"], record["raw_loss"])
    assert result.loss != result.raw_loss
    assert result.train_loss == record["train_loss"]
    assert len(held_out._training["state"]) == 8


def test_the_block_size_changes_no_number_beyond_rounding(run, tiny, tmp_path):
    policy = Policy.load(run("pi05") / "checkpoints/4")
    one, other = (
        frames(tiny(validation=replace(SMALL, batch_size=size)), tmp_path)[0].measure(policy, None) for size in (1, 8)
    )
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert one.errors["policy"].share_of_travel == pytest.approx(other.errors["policy"].share_of_travel, rel=1e-4)


def test_pi0_fast_counts_its_tokens(run):
    record = records(run("pi0_fast"))[-1]
    assert 0 <= record["token_accuracy"] <= 1
    assert record["action_error"] > 0
    assert "other_noise" not in record


def test_pictures_and_numbers_of_every_validation(run):
    folder = run("pi05") / "validation"
    assert sorted(p.name for p in folder.iterdir()) == ["2.json", "2.png", "4.json", "4.png", "curves.png"]


def test_without_held_out_episodes_there_is_none(tiny, tmp_path, capsys):
    config = tiny(steps=2, validation=SMALL)
    config = replace(config, data=replace(config.data, holdout=0.0))
    train(config, tmp_path)
    assert "no validation on dataset: no episode is held out" in capsys.readouterr().out
    assert not (tmp_path / "validation.jsonl").exists()


def test_every_dataset_of_a_mixture_is_validated(tiny, toy_dataset, told, tmp_path):
    sets = (DatasetConfig(path=str(toy_dataset), weight=3), DatasetConfig(path=str(told), weight=1))
    config = tiny(steps=2, validation=SMALL)
    config = replace(config, data=replace(config.data, path="", mixture=sets))
    train(config, tmp_path, show=False)
    one, other = json.loads((tmp_path / "validation/2.json").read_text())["sets"]
    (record,) = records(tmp_path)
    assert record["loss"] == pytest.approx((3 * one["loss"] + other["loss"]) / 4)
    assert record["swapped_prompt"] == other["probe"]["swapped"]
    assert (one["probe"]["prompts"], other["probe"]["prompts"]) == (1, 2)


# ---- prompts


def test_prompts_move_the_actions_of_a_policy_that_reads_them(run, tiny, told, tmp_path):
    config = tiny("pi0", validation=SMALL)
    config = replace(config, data=replace(config.data, path=str(told)))
    held_out, _ = frames(config, tmp_path)
    policy = Policy.load(run("pi0") / "checkpoints/4")
    embedding = policy.model.gemma.token_embedding
    embedding.data *= 30
    heard = held_out.measure(policy, None)
    assert heard.probe.swapped is not None
    assert heard.probe.swapped > 0
    assert heard.probe.blank > 0
    assert "another one moves actions" in _about_prompts(heard)
    # Without embeddings the words are all the same to it, and both prompts have seven letters.
    embedding.data.zero_()
    deaf = held_out.measure(policy, None)
    assert deaf.probe.swapped is not None
    assert deaf.probe.noise is not None
    assert deaf.probe.swapped < 1e-6 < deaf.probe.noise
    assert "IGNORED" in _about_prompts(deaf)


def test_one_prompt_shows_nothing(run, tiny, tmp_path):
    held_out, _ = frames(tiny(validation=SMALL), tmp_path)
    result = held_out.measure(Policy.load(run("pi05") / "checkpoints/4"), None)
    assert result.probe.swapped is None
    assert "one only" in _about_prompts(result)


# ---- the best checkpoint


@pytest.fixture
def judged(tiny, trained, tmp_path):
    """A run with (the same) checkpoints 0 to 5, and validations as they are told."""

    def judged(numbers: dict[int, float], **settings) -> Run:
        run = Run(tmp_path, tiny(steps=5, keep_checkpoints=1, **settings))
        for step in range(6):
            shutil.copytree(
                trained("pi05"), run.checkpoint(step), ignore=shutil.ignore_patterns("train_state", "manifest.json")
            )
            seal(run.checkpoint(step))
        for step, number in numbers.items():
            append_log(run.validations, {"step": step, "action_error": number, "loss": -number})
        run.prune()
        return run

    return judged


def test_the_best_checkpoint_stays(judged):
    run = judged({1: float("nan"), 2: 0.3, 3: 0.1, 4: 0.1, 5: 0.2, 6: 0.01})
    assert run.steps() == [3, 5]
    described = json.loads((run.folder / "best.json").read_text())
    assert described == {"step": 3, "by": "action_error", "value": 0.1, "path": "checkpoints/3"}
    verify(run.folder / "best")
    assert (run.folder / "best").resolve() == run.checkpoint(3).resolve()
    append_log(run.validations, {"step": 5, "action_error": 0.05, "loss": 0})
    run.prune()
    assert run.steps() == [5]
    assert (run.folder / "best").resolve() == run.checkpoint(5).resolve()


def test_the_best_by_loss(judged):
    run = judged({2: 0.3, 3: 0.1}, validation=ValidationConfig(best_by="loss"), keep_every=4)
    assert run.steps() == [2, 4, 5]


def test_half_a_link_of_a_killed_run_is_tidied(judged):
    run = judged({})
    (run.folder / ".best.1.partial").symlink_to("checkpoints/5")
    run.tidy()
    assert not (run.folder / ".best.1.partial").is_symlink()
    assert run.steps() == [5]


def test_a_run_names_its_best_checkpoint_for_commands(run, capsys):
    folder = run("pi05")
    steps = {record["step"] for record in records(folder)}
    best = json.loads((folder / "best.json").read_text())
    assert best["step"] == 4  # of steps 2 and 4, the one with a checkpoint
    assert steps == {2, 4}
    main(["eval", str(folder / "best"), "--max-frames", "2", "--num-threads", "1"])
    assert "the run's own" in capsys.readouterr().out


# ---- in a simulator


DRIVEN = replace(SMALL, raw=False, suite="tabletop/reach", trials=2)


def by_weights(policy, folder, show):
    """Rollouts whose outcome the weights decide, which begin in a folder of their own."""
    folder.mkdir(parents=True)
    success = float(sum(p.detach().double().abs().sum() for p in policy.model.parameters()) % 1)
    return {"success": success, "success_low": 0.0, "success_high": 1.0, "trials": 2}


@pytest.mark.parametrize("holdout", [0.25, 0.0])
def test_a_resumed_run_has_the_same_rollouts_and_the_same_best(holdout, tiny, tmp_path):
    config = tiny(steps=6, save_every=2, validation=DRIVEN, async_save=True)
    config = replace(config, data=replace(config.data, holdout=holdout))
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(config, whole, rollouts=by_weights, show=False)
    train(config, again, stop_at=3, rollouts=by_weights, show=False)
    (again / "validation" / "4.trials").mkdir()  # as a run leaves it that is killed before the checkpoint
    train(config, again, rollouts=by_weights, show=False)
    assert records(again) == records(whole)
    assert [record["step"] for record in records(whole)] == [2, 4, 6]
    assert all(0 < record["success"] < 1 and ("loss" in record) == bool(holdout) for record in records(whole))
    assert (again / "best.json").read_bytes() == (whole / "best.json").read_bytes()
    assert json.loads((whole / "best.json").read_text())["by"] == "success"


@pytest.mark.usefixtures("drawn")
def test_success_is_drawn_with_and_without_held_out_frames(tiny, tmp_path, capsys):
    config = tiny(steps=2, save_every=2, validation=DRIVEN)
    widths = []
    for holdout in (0.25, 0.0):
        folder = tmp_path / str(holdout)
        train(replace(config, data=replace(config.data, holdout=holdout)), folder, rollouts=by_weights)
        with Image.open(folder / "validation" / "curves.png") as picture:
            widths.append(picture.width)
        said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("validation  step 2"))
        assert "(0.0% to 100.0% of 2 trials)" in said
        assert ("action error" in said) == bool(holdout)
    assert min(widths) > 1_500


def test_rollouts_change_nothing_that_is_trained(tiny, tmp_path):
    config = tiny(steps=3)
    plain = train(config, tmp_path / "plain", show=False)
    driven = train(replace(config, validation=DRIVEN), tmp_path / "driven", rollouts=by_weights, show=False)
    assert (plain / "model.safetensors").read_bytes() == (driven / "model.safetensors").read_bytes()


def test_the_best_by_success_and_of_equals_by_action_error(judged):
    run = judged({}, validation=DRIVEN)
    for step, success, error in ((1, None, 0.01), (2, 0.8, 0.3), (3, 0.9, 0.5), (4, 0.9, 0.2), (5, 0.5, 0.1)):
        known = {} if success is None else {"success": success}  # before there was a suite
        append_log(run.validations, {"step": step, "action_error": error, "loss": 0.0, **known})
    for step in (1, 2, 3, 4):
        run.checkpoint(step).mkdir(exist_ok=True)
    assert run.best()["step"] == 4
    append_log(run.validations, {"step": 3, "success": 0.9, "action_error": float("nan")})
    assert run.best()["step"] == 4


def test_a_suite_that_cannot_be(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"rollouts[\s\S]*manipi train"):
        train(tiny(validation=DRIVEN), tmp_path, show=False)
    with pytest.raises(ConfigError, match=r"validation\.every"):
        tiny(validation=replace(DRIVEN, every=0))
    with pytest.raises(UnknownNameError, match="tabletop/reach"):
        rollouts_of(tiny(validation=replace(DRIVEN, suite="tabletop/raech")))
    config = tiny(validation=DRIVEN, model=replace(tiny().model, action_horizon=8))
    with pytest.raises(ConfigError, match="within 4 together"):
        rollouts_of(tiny(validation=DRIVEN))
    with pytest.raises(SimulatorError, match="one for 'other'"):
        rollouts_of(replace(config, robot=replace(config.robot, name="other")))
    assert rollouts_of(tiny()) is None


@pytest.mark.slow
def test_rollouts_are_the_evaluation_of_the_checkpoint(tiny, tmp_path):
    """The same trials as `manipi eval` has of the saved weights."""
    config = tiny(steps=2, save_every=2, validation=DRIVEN, model=replace(tiny().model, action_horizon=8))
    checkpoint = train(config, tmp_path, rollouts=rollouts_of(config), show=False)
    driven = json.loads((tmp_path / "validation" / "2.trials" / "result.json").read_text())
    suite, settings = find_suite(DRIVEN.suite), Settings(trials=2, seed=VALIDATION_SEED)
    with (
        open_policy(str(checkpoint)) as opened,
        Evaluation(tmp_path / "saved", suite, settings, opened.url, policy="saved") as saved,
    ):
        saved.run(show=False)
        assert saved.finish()["trials"] == driven["trials"]
    (record,) = records(tmp_path)
    assert (record["success"], record["trials"]) == (driven["success"]["rate"], 2)


@pytest.mark.parametrize(("name", "value"), [("every", -1), ("samples", 0), ("batch_size", 0), ("trials", 0)])
def test_settings_out_of_range(tiny, name, value):
    with pytest.raises(ConfigError, match=f"validation.{name}"):
        tiny(validation=ValidationConfig(**{name: value}))


def test_units_of_dimensions():
    robot = Robot(
        name="r",
        cameras={"base": "image"},
        state=(State("state", 11),),
        actions=(
            EndEffector(rotation="euler_xyz"),
            EndEffector(rotation="quat_xyzw"),
            Joints(2, unit="deg"),
            Gripper(),
        ),
    )
    assert command_units(robot) == (*"mmm", *["rad"] * 3, *"mmm", *[""] * 4, "deg", "deg", "")
