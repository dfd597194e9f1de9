"""A simulated robot, moved through real sockets by a policy that is slow, jitters, dies and comes back."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from manipi_client import (
    ActionChunkError,
    ConnectError,
    ConnectionLost,
    Environment,
    InferenceTimeout,
    InputError,
    PolicyAgent,
    RealTimeBroker,
    RemoteInferenceError,
    Runtime,
    WebsocketPolicy,
)
from manipi_client.fake import FakePolicyServer

H = 16
REAL_TIME = {"real_time": True}


# ---- a policy of two minds: around the obstacle on the left, or on the right -----------------------------------------


class TwoWays:
    """A flow policy in closed form: the chunk runs to -1 or +1, whichever way, in steps of the robot's own pace.

    Given a previous chunk it uses the package's guidance, so that client and model are tested together.
    """

    def __init__(self):
        torch = pytest.importorskip("torch")
        self.generator = torch.Generator().manual_seed(0)

    def velocity(self, x, timestep, given):
        import torch

        assert given is None, "it was not trained with prefixes"
        t = max(timestep, 1e-3)
        a, variance = 1 - t, t**2 + (1 - t) ** 2 * 0.01
        side = torch.tanh((a * x / variance).sum(dim=(2, 3), keepdim=True))
        return (x - (side + a * 0.01 / variance * (x - a * side))) / t

    def __call__(self, observation):
        import torch

        from manipi.model.flow import sample_guided, soft_mask

        noise = torch.randn(1, 1, H, 1, generator=self.generator)
        previous, mask = torch.zeros(1, H, 1), torch.zeros(1, H)
        if "manipi/prev_actions" in observation:
            left = torch.from_numpy(observation["manipi/prev_actions"].copy()).float()
            previous[0, : len(left)] = left
            mask = soft_mask(torch.tensor([observation["manipi/delay"]]), torch.tensor([len(left)]), H)
        return {"actions": sample_guided(self.velocity, noise, previous, mask, 10)[0, 0].numpy()}


class Arm(Environment):
    """Follows its command with a lag of a few steps, as a position controller does. Its steps are the clock: an answer
    to the observation of step n is there at step n + delay(n), however fast this computer is."""

    def __init__(self, num_steps, delay):
        self.num_steps, self.delay = num_steps, delay
        self.position, self.steps, self.broker, self.moved = 0.0, 0, None, threading.Condition()

    def reset(self):
        self.position = 0.0

    def is_episode_complete(self):
        return self.steps >= self.num_steps

    def get_observation(self):
        age = self.broker.age
        if age is not None and age >= self.delay(self.steps - age):
            self.broker.wait()
        return {"state": np.array([self.position]), "step": self.steps}

    def apply_action(self, action):
        with self.moved:
            self.position += 0.3 * (action["actions"][0] - self.position)
            self.steps += 1
            self.moved.notify_all()

    def until(self, step):
        with self.moved:
            self.moved.wait_for(lambda: self.steps >= min(step, self.num_steps), timeout=30)


def drive(join, delay, num_steps=150, execute_steps=6):
    """Runs one episode. `delay` is in steps; a robot that waits for its chunk makes none meanwhile."""
    arm, policy = Arm(num_steps, delay), TwoWays()

    def answer(observation):
        if observation["step"] and join != "synchronous":  # nor does one that waits for its first chunk
            arm.until(observation["step"] + delay(observation["step"]))
        return policy(observation)

    with FakePolicyServer(answer, REAL_TIME, delay_s=lambda number: 0.2 if number == 1 else 0.0) as server:
        with WebsocketPolicy(port=server.port) as client:
            with RealTimeBroker(client, execute_steps, join, expected_delay=4) as arm.broker:
                Runtime(arm, PolicyAgent(arm.broker)).run()
                return arm.broker.motion, list(arm.broker.delays), server.observations


def fixed(step):
    return 3


def jittered(step):
    return (1, 4, 2, 5, 3)[step % 5]


@pytest.mark.parametrize("delay", [fixed, jittered])
def test_real_time_chunks_go_on_where_others_jump(delay):
    motions = {join: drive(join, delay)[0] for join in ("synchronous", "asynchronous", "real_time")}
    # The two ways are 2 apart. Whoever does not know of the previous chunk jumps from one to the other.
    assert motions["synchronous"].seam_jump > 1.5
    assert motions["asynchronous"].seam_jump > 1.5
    assert motions["real_time"].seam_jump < 0.5
    assert motions["real_time"].seam_change < 0.3 * motions["synchronous"].seam_change
    assert motions["real_time"].jerk < 0.5 * motions["synchronous"].jerk
    assert motions["real_time"].starved_steps == motions["asynchronous"].starved_steps == 0
    assert motions["real_time"].seams >= 15


def test_an_ensemble_is_smoother_than_the_newest_chunk():
    ensemble, newest = (drive(join, fixed)[0] for join in ("ensemble", "asynchronous"))
    assert ensemble.seam_change < 0.8 * newest.seam_change


def test_delays_count_executed_steps_and_not_the_warm_up():
    """The first answer takes 0.2 s, during which no step is executed."""
    _, delays, asked = drive("real_time", fixed, num_steps=60)
    assert set(delays) == {3}
    assert "manipi/delay" not in asked[0]
    assert asked[1]["manipi/delay"] == 4  # expected_delay, before anything was timed
    assert {observation["manipi/delay"] for observation in asked[2:]} == {3}
    assert {observation["manipi/prev_actions"].shape for observation in asked[1:]} == {(10, 1)}  # 6 of 16 are executed
    _, _, asked = drive("real_time", jittered, num_steps=150)
    assert asked[-1]["manipi/delay"] == 5, "the longest of the last ten"


def test_a_sequence_by_hand():
    """Answers are let through one by one: H = 4, asked after 2 steps, and each answer two steps late."""
    let_through, asked = threading.Semaphore(1), []

    class Slow:
        metadata = REAL_TIME

        def infer(self, observation):
            asked.append(observation)
            let_through.acquire()
            return {"actions": 10.0 * observation["n"] + np.arange(4.0)[:, None]}

        def reset(self):
            pass

    with RealTimeBroker(Slow(), 2, "real_time", expected_delay=1) as broker:
        actions = []
        for n in range(8):
            if n in (4, 7):
                let_through.release()
                while not broker._asked[1].done():
                    time.sleep(0.001)
            answer = broker.infer({"n": n})
            actions.append((answer["actions"].item(), answer["starved"]))
        let_through.release()
    # Step 4 gets the answer to step 2, at its third row, and asks again at once: that observation was 2 steps ago.
    # Step 7 gets the answer to step 4; two actions were executed since, and one step held.
    assert actions == [
        (0, False), (1, False), (2, False), (3, False), (22, False), (23, False), (23, True), (42, False),
    ]  # fmt: skip
    assert [o["n"] for o in asked] == [0, 2, 4, 7]
    assert [(o["manipi/prev_actions"].ravel().tolist(), o["manipi/delay"]) for o in asked[1:3]] == [
        ([2, 3], 1),
        ([22, 23], 2),
    ]
    assert list(broker.delays) == [2, 2], "a held step is no executed one"


def test_what_is_not_read_need_not_be_rendered():
    """Answers are let through one by one: H = 4, asked after 2 steps, and every one of them late."""
    let_through, asked, starved = threading.Semaphore(1), [], []

    class Slow:
        metadata = REAL_TIME

        def infer(self, observation):
            asked.append(observation["n"])
            let_through.acquire()
            return {"actions": 10.0 * observation["n"] + np.arange(4.0)[:, None]}

        def reset(self):
            pass

    def hold(observation, last):
        starved.append(observation["n"])
        return last

    with RealTimeBroker(Slow(), 2, "asynchronous", on_starvation=hold) as broker:
        needed = []
        for n in range(9):
            needed.append(broker.needs_observation)
            if n in (3, 7):  # between the question and the step
                let_through.release()
                broker.wait()
            assert needed[-1] == broker.needs_observation
            broker.infer({"n": n} if needed[-1] else {})
        let_through.release()
        let_through.release()
        broker.reset()
        assert broker.needs_observation
    # The answer to step 2 comes at step 3, and the next is due at 4. That one comes at 7, where the robot has starved
    # since 6: what was rendered for it is sent at once.
    assert asked == [0, 2, 4, 7]
    assert starved == [6]
    assert needed == [n in (0, 2, 4, 6, 7) for n in range(9)]


# ---- an arm that is held goes on from where it stands ----------------------------------------------------------------

PACE = 0.01


class Straight:
    """Plans to go on at PACE from where the arm is; what is left of an old plan comes back as it was. Answers leave
    while `gate` is set."""

    metadata = REAL_TIME

    def __init__(self, horizon):
        self.horizon, self.gate, self.asked = horizon, threading.Event(), []

    def infer(self, observation):
        self.asked.append(observation)
        plan = observation["state"] + PACE * np.arange(1.0, self.horizon + 1)[:, None]
        left = observation.get("manipi/prev_actions", plan[:0])
        if len(left):
            plan = np.concatenate([left, left[-1] + PACE * np.arange(1.0, self.horizon - len(left) + 1)[:, None]])
        self.gate.wait()
        return {"actions": plan}

    def reset(self):
        pass


def hold_and_go_on(horizon, execute_steps, delays, join, lag, num_steps=120):
    """Per control step: command, starved, where the arm is, and where it was for the question that is answered there.
    The answer to question n is there `delays[n]` control steps later. A step of the arm leaves `lag` of its way."""
    policy, position, asked_at, questions, rows = Straight(horizon), np.zeros(1), 0.0, 0, []
    with RealTimeBroker(policy, execute_steps, join) as broker:
        for _ in range(num_steps):
            answered_at = None
            if broker.age is not None and broker.age >= delays[questions % len(delays)]:
                policy.gate.set()
                broker.wait()
                answered_at = asked_at
            (policy.gate.set if not rows or join == "synchronous" else policy.gate.clear)()
            answer = broker.infer({"state": position})
            if broker.age == 1:
                asked_at, questions = position.item(), questions + 1
            rows.append((answer["actions"].item(), answer["starved"], position.item(), answered_at))
            position = position + (1 - lag) * (answer["actions"] - position)
        policy.gate.set()
        return rows, list(broker.delays), policy.asked, broker.motion


def random_case(seed):
    rng = np.random.default_rng(seed)
    horizon = int(rng.integers(1, 30))
    delays = rng.choice([1, 2, 3, horizon // 2 + 1, horizon, horizon + 1, 2 * horizon + 7], size=rng.integers(1, 9))
    return horizon, int(rng.integers(1, horizon + 1)), delays.tolist()


STARVING = [(2, 40), (60,), (1, 3, 33, 2, 28), (17, 18, 19, 5)]
"""Control steps until an answer, question by question: longer than any plan, now and then or always."""


@pytest.mark.parametrize("join", ["synchronous", "asynchronous", "ensemble", "real_time"])
@pytest.mark.parametrize("seed", range(30))
def test_whatever_the_delays_are_the_arm_makes_its_plans_steps(seed, join):
    horizon, execute_steps, delays = random_case(seed)
    rows, timed, *_ = hold_and_go_on(horizon, execute_steps, delays, join, lag=0.0)
    executed = [command for command, starved, *_ in rows if not starved]
    np.testing.assert_allclose(executed, PACE * np.arange(1, len(executed) + 1), rtol=1e-9)
    assert all(command == before[0] for (command, starved, *_), before in zip(rows[1:], rows) if starved)
    assert max(timed, default=0) <= horizon


@pytest.mark.parametrize("join", ["synchronous", "asynchronous", "ensemble", "real_time"])
@pytest.mark.parametrize("failing", [(1,), (2, 3, 4), (1, 3, 5, 6)], ids=str)
def test_a_policy_that_fails_and_answers_again_goes_on_where_the_arm_stopped(failing, join, monkeypatch):
    monkeypatch.setattr("manipi_client.realtime.backoff", lambda failures: 0.0)
    policy, position, commands = Straight(8), np.zeros(1), []
    policy.gate.set()
    answer = policy.infer

    def fail_at_times(observation):
        question = len(policy.asked)
        result = answer(observation)
        if question in failing:
            raise ConnectionLost(expected="actions", found="none", where="here", next="wait")
        return result

    policy.infer = fail_at_times
    with RealTimeBroker(policy, 6, join) as broker:
        for step in range(80):
            if step % 5 == 0:
                broker.wait()
            elif step % 5 == 1:  # a question that comes now is answered in four steps
                policy.gate.clear()
            if step % 5 == 4 or join == "synchronous":
                policy.gate.set()
            position = broker.infer({"state": position})["actions"]
            commands.append(position.item())
        policy.gate.set()
    steps = np.diff([0.0, *commands])
    assert set(np.round(steps / PACE, 6)) <= {0.0, 1.0}
    assert sum(steps > 0) > 20


@pytest.mark.parametrize("join", ["synchronous", "asynchronous", "ensemble", "real_time"])
@pytest.mark.parametrize("delays", STARVING, ids=str)
@pytest.mark.parametrize(("horizon", "execute_steps"), [(16, 8), (16, 1), (10, 10), (8, 3)])
def test_after_a_hold_the_plan_goes_on_where_the_arm_stopped(horizon, execute_steps, delays, join):
    rows, timed, asked, motion = hold_and_go_on(horizon, execute_steps, delays, join, lag=0.0)
    executed = [command for command, starved, *_ in rows if not starved]
    np.testing.assert_allclose(executed, PACE * np.arange(1, len(executed) + 1), rtol=1e-9)
    held = [(command, before[0]) for (command, starved, *_), before in zip(rows[1:], rows) if starved]
    assert (len(held) > 2) == (join != "synchronous"), "this test is of arms that are held"
    assert all(command == before for command, before in held)
    np.testing.assert_allclose(motion.seam_jump, PACE, rtol=1e-9)
    assert motion.starved_steps == len(held)
    assert max(timed, default=0) <= horizon, "no more can be executed until an answer comes than is planned"
    for observation in asked:
        if "manipi/prev_actions" in observation:
            left = observation["manipi/prev_actions"]
            np.testing.assert_allclose(left[0], observation["state"] + PACE, rtol=1e-9)
            assert observation["manipi/delay"] <= min(len(left), max([1, *timed]))


@pytest.mark.parametrize("join", ["asynchronous", "ensemble", "real_time"])
@pytest.mark.parametrize("delays", STARVING, ids=str)
def test_an_arm_that_lags_behind_leaps_no_further_than_it_moved(delays, join):
    rows, *_ = hold_and_go_on(16, 8, delays, join, lag=0.7)
    after_holds = 0
    for (before, was_starved, *_), (command, starved, position, answered_at) in zip(rows, rows[1:]):
        if was_starved and not starved:
            after_holds += 1
            assert abs(command - before) <= 1.0001 * PACE + abs(position - answered_at)
    assert after_holds >= 1


# ---- servers that fail -----------------------------------------------------------------------------------------------

SERVER = """
import sys, time
import numpy as np
from manipi_client.fake import FakePolicyServer
chunk = {"actions": np.arange(1.0, 9.0)[:, None]}
with FakePolicyServer(lambda o: chunk, {"real_time": True}, port=int(sys.argv[1]), delay_s=0.03) as server:
    print(server.port, flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def server_process(port=0):
    command = [sys.executable, "-c", SERVER, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def steps(broker, seconds):
    """Steps the broker at 100 Hz for some time; what it handed out."""
    answers, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        answers.append(broker.infer({"state": np.zeros(1)}))
        time.sleep(0.01)
    return answers


def test_a_server_killed_in_the_middle_of_a_chunk_leaves_the_robot_holding_and_comes_back():
    with server_process() as (process, port):
        policy = WebsocketPolicy(port=port, connect_timeout=0.2)
        broker = RealTimeBroker(policy, 4, "real_time")
        assert not steps(broker, 0.3)[0]["starved"]
        assert broker.error is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        last = steps(broker, 0.4)[-10:]
    assert broker.state == "starved"
    assert isinstance(broker.error, (ConnectionLost, ConnectError))
    assert all(answer["starved"] for answer in last)
    assert {answer["actions"].item() for answer in last} == {8.0}, "the last action of the chunk is held"
    with server_process(port):
        until = time.monotonic() + 10
        while broker.state != "running" and time.monotonic() < until:
            steps(broker, 0.05)
        assert (broker.state, broker.error) == ("running", None)
        broker.close()
    policy.close()


def test_a_frozen_server_leaves_the_robot_with_the_users_own_reaction():
    with server_process() as (process, port):
        policy = WebsocketPolicy(port=port, connect_timeout=0.2, deadline=0.1)
        broker = RealTimeBroker(policy, 4, "asynchronous", on_starvation=lambda observation, last: last * 0)
        steps(broker, 0.2)
        process.send_signal(signal.SIGSTOP)
        answers = steps(broker, 0.5)
        assert broker.state == "starved"
        assert isinstance(broker.error, (InferenceTimeout, ConnectError))
        assert answers[-1]["actions"].item() == 0
        process.send_signal(signal.SIGCONT)
        broker.close()
        policy.close()


def test_on_starvation_may_end_the_run():
    def give_up(observation, last):
        raise RuntimeError("park the arm")

    with server_process() as (process, port), WebsocketPolicy(port=port, connect_timeout=0.1) as policy:
        broker = RealTimeBroker(policy, 4, "asynchronous", on_starvation=give_up)
        steps(broker, 0.1)
        process.kill()
        with pytest.raises(RuntimeError, match="park the arm"):
            steps(broker, 3)
        broker.close()


@pytest.mark.parametrize("join", ["synchronous", "ensemble"])
def test_a_network_that_fails_between_chunks(join):
    with FakePolicyServer(lambda o: {"actions": np.ones((8, 1))}, delay_s=0.01) as server:
        with WebsocketPolicy(port=server.port) as policy, RealTimeBroker(policy, 4, join) as broker:
            steps(broker, 0.2)
            server.disconnect_all()
            answers = steps(broker, 1.0)
            assert (broker.state, broker.error) == ("running", None)
            assert all(answer["actions"] == 1 for answer in answers)


def test_the_first_chunk_of_an_episode_raises_what_went_wrong():
    def broken(observation):
        raise ValueError("no camera")

    with FakePolicyServer(broken, REAL_TIME) as server, WebsocketPolicy(port=server.port) as policy:
        with RealTimeBroker(policy, 4) as broker, pytest.raises(RemoteInferenceError, match="no camera"):
            broker.infer({})


def test_a_server_without_real_time_is_not_asked_for_it():
    """openpi's server would drop the keys without a word."""
    with FakePolicyServer(lambda o: {"actions": np.ones((8, 1))}) as server:
        with WebsocketPolicy(port=server.port) as policy:
            with RealTimeBroker(policy, 4) as broker, pytest.raises(InputError, match="manipi serve"):
                broker.infer({})
            with RealTimeBroker(policy, 4, "asynchronous") as broker:
                assert broker.infer({})["actions"] == 1


def test_an_answer_to_the_last_episode_is_never_executed():
    def chunk(observation):
        return {"actions": np.full((8, 1), observation["episode"])}

    with FakePolicyServer(chunk, REAL_TIME, delay_s=0.05) as server, WebsocketPolicy(port=server.port) as policy:
        with RealTimeBroker(policy, 2) as broker:
            for step in range(3):
                assert broker.infer({"episode": 1})["actions"] == 1, step
            broker.reset()  # while the answer to step 2 is under way
            assert broker.state == "waiting"
            assert all(broker.infer({"episode": 2})["actions"] == 2 for _ in range(6))


def test_chunks_and_settings_that_do_not_fit():
    with FakePolicyServer(lambda o: {"actions": np.ones((3, 1))}) as server:
        with WebsocketPolicy(port=server.port) as policy:
            with RealTimeBroker(policy, 4, "asynchronous") as broker, pytest.raises(ActionChunkError):
                broker.infer({})
            for settings in ((0, "real_time"), (4, "magic")):
                with pytest.raises(InputError):
                    RealTimeBroker(policy, *settings)


def test_closing_does_not_wait_for_a_frozen_server():
    with socket.create_server(("127.0.0.1", 0)), server_process() as (process, port):
        policy = WebsocketPolicy(port=port, request_timeout=30)
        broker = RealTimeBroker(policy, 1, "asynchronous")
        broker.infer({})
        process.send_signal(signal.SIGSTOP)
        steps(broker, 0.1)
        started = time.monotonic()
        broker.close()
        policy.close()
        assert time.monotonic() - started < 5


def test_a_broker_that_is_closed_while_the_first_action_is_awaited_says_so():
    with FakePolicyServer(lambda o: {"actions": np.zeros((4, 1))}, delay_s=2) as server:
        broker = RealTimeBroker(WebsocketPolicy(port=server.port), 2, "asynchronous")
        calls = ThreadPoolExecutor(1)
        call = calls.submit(broker.infer, {})
        while not server.observations:
            time.sleep(0.01)
        broker.close()
        with pytest.raises(ConnectionLost):
            call.result(10)
        calls.shutdown()
