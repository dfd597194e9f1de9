"""Many clients and one policy: batches, a bounded queue, deadlines, noise of one's own. Over real connections."""

import contextlib
import itertools
import threading
import time

import numpy as np
import pytest
from websockets.sync.client import connect

from manipi.errors import ConfigError, ObservationError
from manipi.serve import Limits, PolicyServer
from manipi_client import InputError, RemoteInferenceError, WebsocketPolicy, wire


class Slow:
    """Takes a while for a batch, however many are in it; its actions are state plus noise."""

    def __init__(self, seconds=0.1):
        self.metadata, self.seconds, self.batches = {"robot": "slow"}, seconds, []

    def infer(self, observation, noise=None):
        return self.infer_batch([observation], [noise])[0]

    def infer_batch(self, observations, noises):
        self.batches.append(len(observations))
        for observation in observations:
            if "state" not in observation:
                raise ObservationError(expected="a state", found="none", where="observation", next="send it")
        time.sleep(self.seconds)
        return [{"actions": o["state"][None] + n} for o, n in zip(observations, noises, strict=True)]

    def noise_stream(self):
        return (np.full((1, 1), 0.25 * step) for step in itertools.count())


def ask_together(port, observations):
    """What each of as many clients gets: an answer, or its error."""
    answers, ready = [None] * len(observations), threading.Barrier(len(observations))

    def ask(number):
        with WebsocketPolicy(port=port) as client:
            ready.wait()
            try:
                answers[number] = client.infer(observations[number])
            except RemoteInferenceError as error:
                answers[number] = error

    threads = [threading.Thread(target=ask, args=[number]) for number in range(len(observations))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def answer(port, observation):
    """The server's own: an answer, or the text of an error."""
    with connect(f"ws://127.0.0.1:{port}", proxy=None) as connection:
        connection.recv()
        connection.send(wire.pack(observation))
        frame = connection.recv()
    return frame if isinstance(frame, str) else wire.unpack(frame)


def state(number):
    return {"state": np.array([float(number)])}


def test_clients_who_ask_together_are_answered_together():
    policy = Slow()
    with PolicyServer(policy, port=0, limits=Limits(max_batch=4, batch_wait_ms=200)).serve_in_thread() as port:
        answers = ask_together(port, [state(number) for number in range(8)])
    assert [answer["actions"].item() for answer in answers] == list(range(8))
    assert sum(policy.batches) == 8
    assert max(policy.batches) == 4


def test_a_client_alone_waits_for_nobody():
    with PolicyServer(Slow(0.0), port=0, limits=Limits(batch_wait_ms=5_000)).serve_in_thread() as port:
        began = time.monotonic()
        with WebsocketPolicy(port=port) as client:
            client.infer(state(1))
        assert time.monotonic() - began < 4


def test_a_bad_observation_in_a_batch_is_its_own_clients_error():
    policy = Slow()
    with PolicyServer(policy, port=0, limits=Limits(batch_wait_ms=300)).serve_in_thread() as port:
        *good, bad = ask_together(port, [state(1), state(2), {"prompt": "no state"}])
    assert policy.batches[0] == 3
    assert [answer["actions"].item() for answer in good] == [1.0, 2.0]
    assert bad.code == "ObservationError"


@pytest.mark.parametrize("error", [StopIteration("enough"), MemoryError("too much"), RecursionError("deep")])
def test_whatever_a_policy_raises_ends_one_connection_and_not_the_server(error):
    class Odd(Slow):
        def infer_batch(self, observations, noises):
            if "bad" in observations[0]:
                raise error
            return super().infer_batch(observations, noises)

    with PolicyServer(Odd(0.0), port=0).serve_in_thread() as port:
        assert answer(port, {**state(1), "bad": 1}).startswith("PolicyFailure\n")
        assert answer(port, state(2))["actions"].item() == 2


def test_what_is_late_already_is_not_computed():
    policy = Slow(0.0)
    with PolicyServer(policy, port=0).serve_in_thread() as port:
        assert answer(port, {**state(1), "manipi/deadline_ms": 0}).startswith("deadline\n")
    assert not policy.batches


def test_a_full_queue_is_busy():
    with PolicyServer(Slow(0.4), port=0, limits=Limits(max_batch=1, max_waiting=2)).serve_in_thread() as port:
        answers = ask_together(port, [state(number) for number in range(6)])
    refused = [answer for answer in answers if isinstance(answer, RemoteInferenceError)]
    assert {error.code for error in refused} == {"busy"}
    assert refused[0].expected == "fewer than 2 observations that wait"
    assert 2 <= len(refused) <= 4  # one is computed, two wait; each of the rest may have come in time for a place


def test_more_clients_than_allowed_are_turned_away():
    with PolicyServer(Slow(), port=0, limits=Limits(max_clients=1)).serve_in_thread() as port:
        with WebsocketPolicy(port=port) as client:
            with pytest.raises(Exception, match="503"), connect(f"ws://127.0.0.1:{port}", proxy=None):
                pass
            assert client.infer(state(3))["actions"].item() == 3
        with WebsocketPolicy(port=port) as another:
            assert another.infer(state(4))["actions"].item() == 4


def test_an_answer_after_the_deadline_is_an_error_at_the_deadline():
    with PolicyServer(Slow(0.6), port=0).serve_in_thread() as port:
        began = time.monotonic()
        assert answer(port, {**state(1), "manipi/deadline_ms": 100}).startswith("deadline\n")
        assert 0.1 <= time.monotonic() - began < 0.5
        assert answer(port, {**state(2), "manipi/deadline_ms": 20_000})["actions"].item() == 2


def test_what_nobody_waits_for_is_not_computed():
    policy = Slow(0.5)
    limits = Limits(max_batch=1, deadline_ms=200)
    with PolicyServer(policy, port=0, limits=limits).serve_in_thread() as port:
        with (
            connect(f"ws://127.0.0.1:{port}", proxy=None) as first,
            connect(f"ws://127.0.0.1:{port}", proxy=None) as gone,
        ):
            for client in (first, gone):
                client.recv()
                client.send(wire.pack(state(1)))
                time.sleep(0.05)
        answers = ask_together(port, [{**state(5), "manipi/deadline_ms": 5_000}])
    assert answers[0]["actions"].item() == 5
    assert len(policy.batches) == 2  # of the first and the last


@pytest.mark.parametrize("value", [-1, float("nan"), "soon", True, np.zeros(2)])
def test_a_deadline_that_is_none(value):
    asked = {**state(1), "manipi/deadline_ms": value}
    with PolicyServer(Slow(0), port=0).serve_in_thread() as port:
        said = answer(port, asked)
        with WebsocketPolicy(port=port) as client, pytest.raises(InputError, match="manipi/deadline_ms"):
            client.infer(asked)
    assert said.startswith("ProtocolError\n")
    assert "manipi/deadline_ms" in said


@pytest.mark.parametrize(
    "limit", [{"max_batch": 0}, {"max_waiting": -1}, {"batch_wait_ms": -0.1}, {"deadline_ms": float("nan")}]
)
def test_limits_that_let_nothing_through(limit):
    with pytest.raises(ConfigError, match=rf"limits\.{next(iter(limit))}"):
        Limits(**limit)


def test_every_client_has_noise_of_its_own_and_resets_it():
    with PolicyServer(Slow(0), port=0).serve_in_thread() as port, contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(WebsocketPolicy(port=port)) for _ in range(2))

        def noise(client, **keys):
            return client.infer({**state(0), **keys})["actions"].item()

        assert [noise(first) for _ in range(3)] == [0.0, 0.25, 0.5]
        assert noise(second) == 0.0
        assert noise(first, **{"manipi/reset": False}) == 0.75
        assert noise(first, **{"manipi/reset": True}) == 0.0
        assert set(first.infer({"manipi/reset": True})) == {"server_timing"}
        assert noise(first) == 0.0
        assert noise(second) == 0.25


def test_an_observation_with_a_seed_gets_no_noise_of_the_servers():
    class Told(Slow):
        def infer_batch(self, observations, noises):
            return [{"actions": np.zeros((1, 1)), "noise": noise is not None} for noise in noises]

    with PolicyServer(Told(), port=0).serve_in_thread() as port, WebsocketPolicy(port=port) as client:
        assert [client.infer(state(0) | extra)["noise"] for extra in ({}, {"manipi/seed": 3}, {})] == [
            True,
            False,
            True,
        ]
