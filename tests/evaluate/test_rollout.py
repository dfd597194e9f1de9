"""Closed-loop trials through a real websocket, and their films."""

import numpy as np
import pytest

from manipi.errors import UnknownNameError
from manipi.evaluate.rollout import film, load_trials, run_trials, save_trials
from manipi.tabletop.environment import Tabletop
from manipi_client.fake import FakePolicyServer

SEEDS = range(4)


@pytest.fixture
def server():
    """A policy that goes straight to the middle of the table, and down."""
    chunk = np.tile(np.array([0.33, 0.0, 0.03, 0.2], np.float32), (8, 1))
    with FakePolicyServer(lambda observation: {"actions": chunk}) as server:
        yield server


def run(server, **options):
    return run_trials(server.port, SEEDS, environment="tabletop", image_size=16, execute_steps=8, workers=1, **options)


def test_trials_and_films_survive_the_disk(server, tmp_path):
    trials = run(server, films=2)
    assert [trial.seed for trial in trials] == list(SEEDS)
    assert sum(trial.frames is not None for trial in trials) == 2
    save_trials(tmp_path / "trials.npz", trials)
    for before, after in zip(trials, load_trials(tmp_path / "trials.npz"), strict=True):
        np.testing.assert_equal(vars(after), vars(before))


def test_a_film_shows_the_motion_of_the_trial(server):
    (trial, *_) = run(server)
    frames = film(trial, environment="tabletop", variant="plain")
    assert len(frames) == trial.steps + 1
    env = Tabletop(max_steps=30, image_size=16)
    env.reset(seed=trial.seed)
    for action in trial.actions:
        _, _, _, _, info = env.step(np.array(action, np.float32))
    assert (info["success"], info["touched"]) == (trial.success, trial.touched)
    np.testing.assert_array_equal(frames[-1], env.render(size=160))


def test_blind_trials_send_black_pictures_and_nothing_else_changes(server):
    run(server)
    seen = list(server.observations)
    run(server, variant="blind")
    blind = server.observations[len(seen) :]
    assert all(o["observation/image"].any() for o in seen)
    assert not any(o["observation/image"].any() for o in blind)
    assert [o["prompt"] for o in blind] == [o["prompt"] for o in seen]


def test_the_wrong_prompt_names_another_object_on_the_same_scene(server):
    plain, wrong = run(server), run(server, variant="wrong_prompt")
    for a, b in zip(plain, wrong, strict=True):
        assert a.target == b.target
        assert a.target in a.prompt
        assert b.target not in b.prompt
        assert a.touched == b.touched


def test_an_environment_that_no_package_has():
    with pytest.raises(UnknownNameError, match="tabletop"):
        run_trials(1, SEEDS, environment="tabletopp", image_size=16, execute_steps=8)
