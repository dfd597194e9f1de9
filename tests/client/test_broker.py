import numpy as np
import pytest

from manipi_client import ActionChunkBroker, ActionChunkError, InputError


class CountingPolicy:
    """The golden inner policy: call k returns 6 steps that count up from 100 k."""

    def __init__(self, **extra):
        self.metadata = {"robot": "tiny"}
        self.calls, self.resets, self.extra = 0, 0, extra

    def infer(self, observation):
        self.calls += 1
        actions = np.arange(12).reshape(6, 2) + 100 * self.calls
        return {"actions": actions, "extra": {"x": np.arange(6.0), "t": 5}, "label": "a", **self.extra}

    def reset(self):
        self.resets += 1


def test_hands_out_the_golden_sequence(golden_wire):
    golden = golden_wire("chunk_broker.json")
    policy = CountingPolicy()
    broker = ActionChunkBroker(policy, golden["action_horizon"])
    for expected in golden["sequence"]:
        if isinstance(expected, str):
            broker.reset()
            continue
        step = broker.infer({})
        assert policy.calls == expected["inner_calls"]
        assert step["actions"].tolist() == expected["actions"]
        assert str(step["extra"]["x"]) == expected["extra_x"]
        assert (step["extra"]["t"], step["label"]) == (expected["extra_t"], expected["label"])
    assert policy.resets == 1
    assert broker.metadata == {"robot": "tiny"}


def test_what_is_not_read_need_not_be_rendered():
    class Careful(CountingPolicy):
        def infer(self, observation):
            assert observation == {"picture": 1}
            return super().infer(observation)

    rendered, all_seen = ActionChunkBroker(Careful(), 4), ActionChunkBroker(CountingPolicy(), 4)
    needed = []
    for step in range(11):
        if step == 9:
            rendered.reset()
            all_seen.reset()
        needed.append(rendered.needs_observation)
        action = rendered.infer({"picture": 1} if needed[-1] else {})
        assert action["actions"].tolist() == all_seen.infer({})["actions"].tolist()
    assert [step for step, need in enumerate(needed) if need] == [0, 4, 8, 9]


def test_slices_only_arrays_with_a_row_per_step():
    broker = ActionChunkBroker(
        CountingPolicy(embedding=np.arange(4), scalar=np.array(7), pair=[np.arange(6), (np.arange(6),)]), 2
    )
    broker.infer({})
    step = broker.infer({})
    assert step["embedding"].tolist() == [0, 1, 2, 3]
    assert step["scalar"] == 7
    assert step["pair"] == [1, (1,)]


def test_a_short_chunk_is_an_error_before_the_robot_moves():
    with pytest.raises(ActionChunkError) as short:
        ActionChunkBroker(CountingPolicy(), 7).infer({})
    assert str(short.value) == (
        "expected actions of at least 7 steps (execute_steps)\n"
        "   found actions of shape (6, 2)\n"
        "   where the policy's answer\n"
        "    next set execute_steps to the policy's action horizon or less"
    )


def test_an_answer_without_actions_is_an_error():
    class Silent(CountingPolicy):
        def infer(self, observation):
            return {"tokens": np.zeros(3)}

    with pytest.raises(ActionChunkError, match=r"no actions, only \['tokens'\]"):
        ActionChunkBroker(Silent(), 1).infer({})


def test_execute_steps_must_be_positive():
    with pytest.raises(InputError, match="at least one step"):
        ActionChunkBroker(CountingPolicy(), 0)


def test_a_failure_of_the_policy_leaves_no_stale_chunk():
    class Flaky(CountingPolicy):
        def infer(self, observation):
            if observation.get("fail"):
                raise RuntimeError("camera lost")
            return super().infer(observation)

    policy = Flaky()
    broker = ActionChunkBroker(policy, 1)
    broker.infer({})
    with pytest.raises(RuntimeError, match="camera lost"):
        broker.infer({"fail": True})
    assert broker.infer({})["actions"].tolist() == [200, 201]
