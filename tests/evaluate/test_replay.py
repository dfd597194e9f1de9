"""A run is recorded through a real server and replayed against checkpoints and servers."""

import json
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from manipi.cli.dataset import run_replay as main
from manipi.data.open import open_dataset
from manipi.data.recorder import Recorder
from manipi.errors import ConfigError, MissingFeatureError, ObservationError, StorageError
from manipi.evaluate.replay import replay
from manipi.model.config import JointConfig
from manipi.policy import Policy
from manipi.robots.tabletop import TABLETOP
from manipi.serve import Access, PolicyServer
from manipi.serve.access import tls_context
from manipi.train.loop import train
from manipi_client import (
    AccessDenied,
    ActionChunkBroker,
    Environment,
    PolicyAgent,
    RealTimeBroker,
    Runtime,
    Subscriber,
    WebsocketPolicy,
)


class Arm(Environment):
    """Moves towards its commands; its picture changes with it."""

    def __init__(self, num_steps=12):
        self.num_steps, self.episode = num_steps, -1

    def reset(self):
        self.episode, self.steps, self.position = self.episode + 1, 0, np.array([0.0, 0.1, 0.2, 1.0])

    def is_episode_complete(self):
        return self.steps >= self.num_steps

    def get_observation(self):
        rng = np.random.default_rng(100 * self.episode + self.steps)
        return {
            "observation/image": rng.integers(0, 256, (16, 16, 3), dtype=np.uint8),
            "observation/state": self.position.astype(np.float32),
            "prompt": "reach it",
        }

    def apply_action(self, action):
        self.position = self.position + 0.3 * (action["actions"] - self.position)
        self.steps += 1


class Witness(Subscriber):
    """What the recorder was told."""

    def __init__(self):
        self.steps = []

    def on_episode_start(self):
        pass

    def on_step(self, observation, action):
        self.steps.append((observation, action))

    def on_episode_end(self):
        pass


JOINS = ("real_time", "synchronous", "broker")


@pytest.fixture(scope="module")
def record(trained, tmp_path_factory):
    """`record(join)` is two episodes of a π0.5 policy behind a server: the dataset, and what the robot's side saw."""
    made = {}

    def run(join):
        root, witness = tmp_path_factory.mktemp(join) / "run", Witness()
        with (
            PolicyServer(Policy.load(trained("pi05"), seed=5), port=0).serve_in_thread() as port,
            WebsocketPolicy(port=port) as policy,
            Recorder(root, TABLETOP, seed=40) as recorder,
        ):
            watched = recorder.watch(policy)
            broker = ActionChunkBroker(watched, 2) if join == "broker" else RealTimeBroker(watched, 2, join)
            Runtime(Arm(), PolicyAgent(broker), [recorder, witness], max_hz=8, num_episodes=2).run()
            if isinstance(broker, RealTimeBroker):
                broker.close()
        return root, witness

    def run_once(join):
        if join not in made:
            made[join] = run(join)
        return made[join]

    return run_once


@pytest.fixture
def recording(record):
    """The folder of one that has previous chunks in it."""
    return record("real_time")[0]


@pytest.mark.parametrize("join", JOINS)
def test_what_was_seen_and_done_is_in_the_dataset(record, join):
    root, witness = record(join)
    dataset = open_dataset(root)
    assert [episode.length for episode in dataset.episodes] == [12, 12]
    assert dataset.prompt(0) == "reach it"
    seen, done = zip(*witness.steps, strict=True)
    np.testing.assert_array_equal(dataset.column("actions"), [a["actions"] for a in done])
    np.testing.assert_array_equal(dataset.column("observation/state"), [o["observation/state"] for o in seen])
    pictures = dataset.images("observation/image", np.arange(24)).astype(int)
    assert np.abs(pictures - [o["observation/image"] for o in seen]).max() <= 3
    times = dataset.column("manipi.time_s")[:12, 0]
    assert (np.diff(times) > 0).all()
    assert 0.7 < times[-1] - times[0] < 10
    asked = dataset.column("manipi.asked")[:, 0].astype(bool)
    assert asked[0]
    assert asked[12]
    assert 3 <= asked.sum() <= 14
    # Every question has the next seed; an answer that came after its episode is not there.
    seeds = dataset.column("manipi.seed")[asked, 0]
    assert (np.diff(seeds) >= 1).all()
    assert seeds[0] == 40
    assert (dataset.column("manipi.answer_ms")[asked] > 0).all()
    assert bool((dataset.column("manipi.num_left") > 0).any()) == (join == "real_time")
    if join != "real_time":
        chunks = dataset.column("manipi.chunk").reshape(24, 4, 4)
        np.testing.assert_array_equal(chunks[asked][:, 0], dataset.column("actions")[asked])
    described = json.loads((root / "meta/recording.json").read_text())
    assert described["robot"]["name"] == described["policy"]["robot"]["name"] == "tabletop"
    assert described["versions"].keys() == {"manipi", "manipi_client", "python", "numpy"}


@pytest.mark.parametrize("join", JOINS)
def test_the_same_checkpoint_gives_the_same_answers(record, join, trained):
    result = replay(open_dataset(record(join)[0]), Policy.load(trained("pi05"), seed=99), show=False)
    assert result.worst < 0.01
    assert result.said == ()
    assert result.steps == 4


def test_the_command_compares_checkpoints(recording, trained, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([str(recording), str(trained("pi05")), "--json", str(tmp_path / "same.json")])
    assert "within" in capsys.readouterr().out
    other = train(tiny("pi05", steps=2, seed=1), tmp_path / "other", show=False)
    with pytest.raises(SystemExit, match="1"):
        main([str(recording), str(other), "--json", str(tmp_path / "other.json"), "--max-questions", "5"])
    said = capsys.readouterr().out
    assert "ABOVE" in said
    assert "5 questions" in said
    same, differing = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("same", "other"))
    assert max(same["share"]) < 0.01 < max(differing["share"])
    assert len(differing["mean"]) == 4
    with pytest.raises(SystemExit, match="0"):
        main([str(recording), str(other), "--tolerance", "1e9"])


def test_the_command_asks_a_server(recording, trained, tmp_path):
    """With a token, and a certificate that no authority signed."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-subj", "/CN=robot", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run([*command, "-keyout", "key.pem", "-out", "cert.pem"], cwd=tmp_path, check=True, stderr=-3)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    (tmp_path / "token").write_text("k3y-of-the-lab")
    access = Access(token="k3y-of-the-lab", tls=tls_context(tmp_path / "cert.pem", tmp_path / "key.pem"))
    flags = ["--token-file", str(tmp_path / "token"), "--ca", str(tmp_path / "cert.pem")]
    with PolicyServer(Policy.load(trained("pi05")), port=0, access=access).serve_in_thread() as port:
        for address in (f"wss://127.0.0.1:{port}", f"127.0.0.1:{port}"):
            with pytest.raises(SystemExit, match="0"):
                main([str(recording), address, *flags])
        with pytest.raises(AccessDenied, match="check token"):
            main([str(recording), f"127.0.0.1:{port}", *flags[2:]])


def test_a_policy_that_cannot_go_on_is_asked_without_the_previous_chunk(recording, trained):
    result = replay(open_dataset(recording), Policy.load(trained("pi0_fast")), show=False, max_questions=4)
    assert result.said == ("it does not go on from a previous chunk, which was left out",)


def test_a_subtask_is_asked_again(tiny, trained, tmp_path):
    config = tiny("pi05", steps=1)
    joint = JointConfig(codes_weight=0)
    writer = Policy.load(train(replace(config, model=replace(config.model, joint=joint, max_token_len=64)), tmp_path))
    with Recorder(tmp_path / "run", TABLETOP) as recorder:
        watched, arm = recorder.watch(writer), Arm()
        arm.reset()
        for text in ("go up", "go up", "come down"):
            seen = {**arm.get_observation(), "manipi/subtask": text}
            recorder.on_step(seen, {"actions": watched.infer(seen)["actions"][0]})
            arm.steps += 1
        recorder.on_episode_end()
    dataset = open_dataset(tmp_path / "run")
    assert dataset.subtask(2) == "come down"
    same = replay(dataset, writer, show=False)
    assert (same.questions, same.said) == (3, ())
    assert same.worst < 0.02
    assert replay(dataset, Policy.load(trained("pi05")), show=False).said == (
        "it follows no subtask, which was left out",
    )


def test_demonstrations_are_no_recording(toy_dataset, trained):
    with pytest.raises(MissingFeatureError, match="manipi eval"):
        main([str(toy_dataset), str(trained("pi05"))])


def test_a_policy_for_another_robot_is_not_compared(recording, checkpoint):
    with pytest.raises(ConfigError, match="'planted'"):
        main([str(recording), str(checkpoint)])


def test_an_existing_folder_is_refused_before_the_robot_moves(tmp_path):
    with pytest.raises(StorageError):
        Recorder(tmp_path, TABLETOP)


def test_an_observation_of_another_robot_is_refused(tmp_path):
    recorder = Recorder(tmp_path / "run", TABLETOP)
    recorder.on_episode_start()
    with pytest.raises(ObservationError, match="observation/image"):
        recorder.on_step({"prompt": "go"}, {"actions": np.zeros(4)})


def test_an_error_keeps_the_episodes_before_it(tmp_path):
    arm, action = Arm(), {"actions": np.zeros(4)}

    def run():
        with Recorder(tmp_path / "run", TABLETOP) as recorder:
            for length in (3, 2):
                arm.reset()
                recorder.on_episode_start()
                for _ in range(length):
                    recorder.on_step(arm.get_observation(), action)
                    arm.apply_action(action)
                if length == 2:
                    raise RuntimeError("the gripper fell off")
                recorder.on_episode_end()

    with pytest.raises(RuntimeError, match="fell off"):
        run()
    dataset = open_dataset(tmp_path / "run")
    assert [episode.length for episode in dataset.episodes] == [3]
    assert "manipi.asked" not in dataset.features
