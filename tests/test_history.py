"""Memory in time from the dataset to the robot: what is remembered is what was there so many control steps ago."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.test_policy import observation

from manipi.checkpoints.initial import load_initial_weights
from manipi.data.dataset import frames
from manipi.errors import ConfigError, ObservationError
from manipi.exchange.exporting import export_checkpoint
from manipi.model import VLA, ModelInput
from manipi.model.config import HistoryConfig
from manipi.policy import Policy
from manipi.serve import PolicyServer
from manipi.train.config import AugmentConfig, ValidationConfig
from manipi.train.data import prepare
from manipi.train.loop import train
from manipi.train.plan import forecast
from manipi.train.step.step import augment
from manipi_client import ActionChunkBroker, WebsocketPolicy
from manipi_client.keys import PAST, SEED, STEP
from manipi_client.lockstep import LockStep

HISTORY = HistoryConfig(frames=3, stride=2)
AGO = (4, 2)


@pytest.fixture(scope="module")
def config(tiny):
    base = tiny("pi05", steps=4, validation=ValidationConfig(every=2, samples=4))
    return replace(base, model=replace(base.model, history=HISTORY))


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("history")
    train(config, folder, show=False)
    return folder


@pytest.fixture
def policy(run):
    return Policy.load(run / "checkpoints/4", seed=3)


@pytest.fixture
def source(config, tmp_path):
    return prepare(config, tmp_path).main.source


def shown(number: int) -> dict:
    """Observations that differ."""
    picture = np.full((30, 40, 3), (40 * number) % 256, np.uint8)
    return {**observation(), "observation/image": picture, "observation/state": np.full(4, 0.02 * number)}


# Data -----------------------------------------------------------------------------------------------------------------


def test_a_frame_brings_what_was_before_it_in_its_episode(source):
    dataset = source.dataset
    keys = {"cameras": ["observation/image"], "state_keys": ["observation/state"], "action_key": "actions"}
    rows = np.random.default_rng(0).permutation(dataset.num_frames)
    states = dataset.column("observation/state")
    for frame, row in zip(frames(dataset, rows, horizon=2, past=AGO, **keys), rows.tolist(), strict=True):
        start = row - frame.index
        for ago, before in zip(AGO, frame.past, strict=True):
            assert (before is None) == (row - ago < start)
            if before is not None:
                np.testing.assert_array_equal(before["observation/state"], states[row - ago])
                picture = dataset.images("observation/image", np.array([row - ago]))[0]
                np.testing.assert_array_equal(before["observation/image"], picture)


def test_a_sample_holds_it_as_the_model_reads_it(source):
    (frame,) = source.frames(np.array([int(source.dataset.starts[1]) + 3]))  # 2 steps ago there was something, 4 not
    sample, (now,) = source.pipeline.encode_frame(frame), source.samples(np.array([int(source.dataset.starts[1]) + 1]))
    assert sample["past_valid"].tolist() == [False, True]
    np.testing.assert_array_equal(sample["past_images"][1], now["images"])
    np.testing.assert_array_equal(sample["past_states"][1], now["state"])
    assert not sample["past_images"][0].any()
    assert not sample["past_states"][0].any()


def test_all_frames_of_a_camera_are_augmented_alike(source, config):
    batch = ModelInput.from_numpy({k: v[None] for k, v in source.samples(np.array([9]))[0].items()})
    batch = replace(batch, past_images=torch.stack([batch.images, batch.images], dim=1))
    changed = augment(batch, replace(config, augment=AugmentConfig()), step=3)
    assert not torch.equal(changed.images, batch.images.float() / 255 * 2 - 1)
    for frame in changed.past_images.unbind(1):
        assert torch.equal(frame, changed.images)


# Training -------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_undisturbed_one(run, config, tmp_path):
    train(config, tmp_path / "run", show=False, stop_at=2)
    train(config, tmp_path / "run", show=False)
    one, two = ((folder / "checkpoints/4/model.safetensors").read_bytes() for folder in (run, tmp_path / "run"))
    assert one == two


def test_a_plan_knows_of_the_older_pictures(config):
    model = replace(config.model, history=None)
    assert forecast(config).peak > forecast(replace(config, model=model)).peak


# Acting ---------------------------------------------------------------------------------------------------------------


def test_what_was_before_moves_the_actions(policy):
    noise, now = policy.draw_noise(), observation()
    alone = policy.infer(now, noise)["actions"]
    np.testing.assert_array_equal(policy.infer({**now, PAST: [None, None]}, noise)["actions"], alone)
    answers = [policy.infer({**now, PAST: past}, noise)["actions"] for past in ([None, shown(1)], [shown(1), shown(2)])]
    assert not np.array_equal(answers[0], alone)  # after four steps of training not by much
    assert not np.array_equal(answers[1], answers[0])
    mixed = policy.infer_batch([now, {**now, PAST: [shown(1), shown(2)]}], [noise, noise])
    for answer, expected in zip(mixed, (alone, answers[1]), strict=True):
        np.testing.assert_allclose(answer["actions"], expected, atol=1e-5)
    assert policy.metadata["past_steps"] == list(AGO)


@pytest.mark.parametrize(
    ("past", "found"),
    [
        ([None], "list of 1"),
        ("now", "str"),
        ([1, 2], "list of 2"),
        ({}, "dict"),
        ([{}, {}], "nothing"),
        (None, "nothing"),
    ],
)
def test_a_past_that_is_none_is_refused(policy, past, found):
    with pytest.raises(ObservationError) as refused:
        policy.infer({**observation(), PAST: past})
    assert found in str(refused.value) or "observation/" in str(refused.value)


def test_a_policy_without_memory_takes_no_past(trained):
    with pytest.raises(ObservationError, match="policies that remember"):
        Policy.load(trained("pi05")).infer({**observation(), PAST: [None, None]})


def test_an_engine_is_refused(policy):
    with pytest.raises(ConfigError, match="sees the present alone"):
        policy.fuse()


class Asked:
    """Notes the questions that reach the policy."""

    def __init__(self, policy):
        self.policy, self.metadata, self.questions = policy, policy.metadata, []

    def infer(self, question):
        self.questions.append(question)
        return self.policy.infer(question)

    def reset(self):
        pass


@pytest.mark.parametrize("execute", [1, 2, 3, 4])
def test_brokers_show_exactly_what_was_and_read_no_more(policy, execute):
    """Both of them: at each question, what stood `past_steps` before it, whatever the rhythm of the questions."""
    for make in (ActionChunkBroker, LockStep):
        asked = Asked(policy)
        broker, read = make(asked, execute), set()
        for step in range(13):
            if broker.needs_observation:
                read.add(step)
            broker.infer(shown(step) if step in read else {})
        questions = range(0, 13, execute)
        for step, question in zip(questions, asked.questions, strict=True):
            for ago, before in zip(AGO, question[PAST], strict=True):
                assert (before is None) == (step < ago)
                if before is not None:
                    np.testing.assert_array_equal(before["observation/state"], shown(step - ago)["observation/state"])
        assert read <= {step for step in range(13) if any((step + ago) % execute == 0 for ago in (0, *AGO))}
        if make is ActionChunkBroker:
            broker.reset()
            broker.infer(shown(0))
            assert asked.questions[-1][PAST] == [None, None]


def test_a_robot_may_fill_the_same_arrays_again(policy):
    asked, now = Asked(policy), shown(0)
    broker = ActionChunkBroker(asked, 2)
    for step in range(5):
        now["observation/state"][:] = 0.02 * step
        broker.infer(now)
    states = [before["observation/state"][0] for before in asked.questions[-1][PAST]]
    np.testing.assert_allclose(states, [0.0, 0.04])


def test_of_older_observations_only_what_the_robot_has_is_read(policy):
    noise, before = policy.draw_noise(), shown(1)
    expected = policy.infer({**observation(), PAST: [None, before]}, noise)["actions"]
    more = {**before, "actions": "x", "action_valid": 3, "delay": -1, "prompt": 5, "subtask": "y"}
    np.testing.assert_array_equal(policy.infer({**observation(), PAST: [None, more]}, noise)["actions"], expected)


def test_no_other_project_is_given_it_without_its_memory(run, tmp_path):
    for to in ("openpi-torch", "openpi-jax", "lerobot"):
        with pytest.raises(ConfigError, match="sees the present alone"):
            export_checkpoint(run / "checkpoints/4", to, tmp_path / to)


def test_it_goes_on_from_weights_that_remember_nothing(config, trained):
    model = VLA(config.model)
    assert load_initial_weights(model, str(trained("pi05"))) == ["past_state.weight", "past_state.bias"]


def test_late_answers_leave_the_past_exact(policy):
    asked = Asked(policy)
    broker = LockStep(asked, 2, "asynchronous", delay=3)
    for step in range(14):
        broker.infer(shown(step) if broker.needs_observation else None)
    for question in asked.questions[1:]:
        for ago, before in zip(AGO, question[PAST], strict=True):
            step = question[STEP] - ago
            assert (before is None) == (step < 0)
            if before is not None:
                np.testing.assert_array_equal(before["observation/state"], shown(step)["observation/state"])


def test_a_server_remembers_for_clients_that_do_not(policy, caplog):
    with (
        PolicyServer(policy, port=0, robot=policy.robot, guard="off").serve_in_thread() as port,
        WebsocketPolicy(port=port) as client,
    ):
        assert client.metadata["past_steps"] == list(AGO)

        def asked(step, **more):
            return client.infer({**shown(step), STEP: step, SEED: 5, **more})["actions"]

        def expected(step, past):
            return policy.infer({**shown(step), SEED: 5, PAST: past})["actions"]

        for step, past in ((0, [None, None]), (2, [None, 0]), (4, [0, 2]), (7, [None, None]), (8, [4, None])):
            said = [None if at is None else shown(at) for at in past]
            np.testing.assert_allclose(asked(step), expected(step, said), atol=1e-5)
        # What the client says itself goes before what the server saw.
        np.testing.assert_allclose(asked(10, **{PAST: [None, None]}), expected(10, [None, None]), atol=1e-5)
        client.reset()
        np.testing.assert_allclose(asked(12), expected(12, [None, None]), atol=1e-5)
        assert "remembers nothing" not in caplog.text
        for _ in range(2):
            client.infer({**shown(1), SEED: 5})
        assert caplog.text.count("remembers nothing") == 1
