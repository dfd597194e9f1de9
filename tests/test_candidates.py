"""Several candidates for one observation: what they are, what chooses among them, and what clients see of it."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from tests.test_policy import observation, observations

from manipi.candidates import SELECTORS, Candidates, Choice, candidate_noises, choose, executed_rows
from manipi.errors import ActionError, ConfigError, ObservationError, UnknownNameError
from manipi.policy import Policy
from manipi.recipes.registry import load_selector
from manipi.robots.robot import Gripper, Joints, Robot, State
from manipi.serve import Limits, PolicyServer
from manipi_client import RemoteInferenceError, WebsocketPolicy
from manipi_client.keys import CANDIDATES, DELAY, EXECUTE_STEPS, GATE, NUM_STEPS, PREVIOUS, SEED, SELECTOR

ROUNDING = 1e-5
"""Of float32: eight chunks are rows of the products in which one chunk is alone."""


@pytest.fixture(params=["pi05", "pi0"])
def policy(request, trained) -> Policy:
    return Policy.load(trained(request.param), seed=3)


@pytest.fixture
def pi05(trained) -> Policy:
    return Policy.load(trained("pi05"), seed=3)


def always(k):
    """A selector that chooses candidate k."""
    return lambda candidates: np.arange(len(candidates.actions)) == k


# What candidates are --------------------------------------------------------------------------------------------------


def test_one_candidate_is_the_policy_as_it_was(policy):
    noise = policy.draw_noise()
    plain = policy.infer(observation(), noise)
    for extra in ({CANDIDATES: 1}, {CANDIDATES: 1, SELECTOR: "limits", GATE: 0.5, EXECUTE_STEPS: 2}):
        asked = policy.infer(observation() | extra, noise)
        np.testing.assert_array_equal(asked["actions"], plain["actions"])
        assert asked.keys() == plain.keys()


@pytest.mark.parametrize("fused", [False, True])
def test_candidates_come_from_the_noise_of_one(policy, fused):
    if fused:
        policy.fuse()
    noise = policy.draw_noise()
    expected = [policy.infer(observation(), one)["actions"] for one in candidate_noises(noise, 8)]
    for k, chunk in enumerate(expected):
        policy.set_candidates(Choice(n=8, selector="mine"), always(k))
        answer = policy.infer(observation(), noise)
        assert answer["candidates"]["chosen"] == k
        np.testing.assert_allclose(answer["actions"], chunk, atol=ROUNDING)
    assert np.abs(expected[0] - expected[1]).max() > 100 * ROUNDING


def test_noise_is_a_function_of_the_first_and_the_index():
    first, other = np.random.default_rng(0).standard_normal((2, 4, 6)).astype(np.float32)
    eight = candidate_noises(first, 8)
    np.testing.assert_array_equal(eight[0], first)
    np.testing.assert_array_equal(eight[:3], candidate_noises(first, 3))
    assert len({one.tobytes() for one in (*eight, *candidate_noises(other, 8))}) == 16
    many = np.concatenate([candidate_noises(first + k, 16)[1:] for k in range(40)])
    assert abs(many.mean()) < 0.03
    assert abs(many.std() - 1) < 0.03


def test_the_number_changes_nothing_else_of_an_episode(pi05):
    def episode(extra):
        pi05.reset()
        return [pi05.infer(observation() | extra)["actions"] for _ in range(3)]

    pi05.set_candidates(Choice(selector="mine"), always(0))
    for one, eight in zip(episode({}), episode({CANDIDATES: 8}), strict=True):
        np.testing.assert_allclose(eight, one, atol=ROUNDING)


def test_a_seed_decides_all_of_them(pi05):
    asked = observation() | {CANDIDATES: 5, SEED: 7}
    first, second = (pi05.infer(asked) for _ in range(2))
    assert first["candidates"] == second["candidates"]
    np.testing.assert_array_equal(first["actions"], second["actions"])
    assert pi05.infer(asked | {SEED: 8})["candidates"]["scores"] != first["candidates"]["scores"]


def test_batches_are_of_those_who_choose_alike(pi05):
    asked = [o | {SEED: i, CANDIDATES: n} for i, (o, n) in enumerate(zip(observations(), (4, 1, 4), strict=True))]
    alone = [pi05.infer(one) for one in asked]
    calls, run = [], pi05.run_model

    def counted(inputs, noise, *rest):
        calls.append(noise.shape[:-2])
        return run(inputs, noise, *rest)

    pi05.run_model = counted
    for one, answer in zip(alone, pi05.infer_batch(asked), strict=True):
        np.testing.assert_allclose(answer["actions"], one["actions"], atol=ROUNDING)
        assert answer.get("candidates", {}).get("chosen") == one.get("candidates", {}).get("chosen")
    assert calls == [(2, 4), (1,)]


def test_many_noises_of_the_caller_are_all_answered(pi05):
    pi05.set_candidates(Choice(n=3))
    noises = np.stack([pi05.draw_noise() for _ in range(5)])
    assert pi05.infer(observation(), noises)["actions"].shape == (5, 4, 4)


# The gate -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_the_gate_draws_the_others_where_the_first_is_uncertain(policy, fused):
    if fused:
        policy.fuse()
    noise = policy.draw_noise()
    one, open_ = policy.infer(observation(), noise), observation() | {CANDIDATES: 4, SELECTOR: "limits"}
    ungated = policy.infer(open_, noise)
    bend = policy.infer(open_ | {GATE: 1e9}, noise)
    assert (bend["candidates"]["n"], bend["candidates"]["chosen"]) == (1, 0)
    np.testing.assert_array_equal(bend["actions"], one["actions"])  # the same computation, not another
    threshold = bend["candidates"]["bend"]
    assert threshold > 0
    above, below = (policy.infer(open_ | {GATE: threshold * factor}, noise) for factor in (1.01, 0.99))
    assert (above["candidates"]["n"], below["candidates"]["n"]) == (1, 4)
    assert below["candidates"]["chosen"] == ungated["candidates"]["chosen"]
    np.testing.assert_allclose(below["actions"], ungated["actions"], atol=ROUNDING)


def test_each_of_a_batch_has_its_own_gate(pi05):
    asked = [o | {SEED: i, CANDIDATES: 4} for i, o in enumerate(observations())]
    bends = [pi05.infer(one | {GATE: 1e9})["candidates"]["bend"] for one in asked]
    middle = sorted(bends)[1] * 0.9999
    told = [answer["candidates"] for answer in pi05.infer_batch([one | {GATE: middle} for one in asked])]
    assert [one["n"] for one in told] == [4 if bend > middle else 1 for bend in bends]
    np.testing.assert_allclose([one["bend"] for one in told], bends, rtol=1e-4)


def test_a_straight_path_does_not_bend():
    import torch

    from manipi.model.flow import bend

    straight = torch.ones(1, 3, 2).expand(5, 2, 3, 2)
    real = torch.ones(1, 3, 2, dtype=torch.bool)
    assert bend(list(straight), real).tolist() == [0, 0]
    turned = torch.tensor([1.0, 0.0, 1.0, 9.0])[:, None, None, None] * torch.tensor([1.0, 99.0])
    counted = torch.tensor([True, False]).expand(1, 1, 2)  # neither the other dimension nor the last step
    assert bend(list(turned), counted).tolist() == [3 * (1 + 1) / (1 + 0 + 1)]


# Selectors ------------------------------------------------------------------------------------------------------------

ROBOT = Robot(
    name="line",
    cameras={"base": "image"},
    state=(State("joint", 1), State("hand", 1)),
    actions=(Joints(1, relative=True, low=(-1.0,), high=(1.0,)), Gripper()),
    max_rates=(4.0, float("inf")),
)
"""The joint moves by at most 0.4 per step, from 0."""


def planted(*joints, hand=0.0, **more) -> Candidates:
    """Candidates by what their joint does; `normalised` is the same."""
    joint_NH = np.array(joints, np.float32)
    actions = np.stack([joint_NH, np.broadcast_to(hand, joint_NH.shape)], axis=-1).astype(np.float32)
    rows = {"executed": slice(0, joint_NH.shape[1])} | more
    return Candidates(
        observation={}, robot=ROBOT, state=np.zeros(2, np.float32), actions=actions, normalised=actions, **rows
    )


def row(*joint):
    return np.array([[x, 0.0] for x in joint], np.float32)


RISING = [0.1, 0.2, 0.3, 0.4, 0.5]
SHAKING = [0.1, 0.0, 0.3, 0.1, 0.5]
BEYOND = [0.2, 0.5, 0.8, 1.0, 1.2]
TOO_FAST = [0.5, 0.6, 0.7, 0.8, 0.9]
HALF = np.arange(5) > 1


@pytest.mark.parametrize(
    ("selector", "candidates", "best"),
    [
        ("limits", planted(BEYOND, SHAKING, RISING), 2),
        ("limits", planted(TOO_FAST, SHAKING), 1),
        ("limits", planted(BEYOND, SHAKING, executed=slice(0, 4)), 0),  # it is beyond in the last step alone
        ("limits", planted(RISING, SHAKING, hand=np.stack([HALF, 0 * HALF])), 0),  # a hand that closes is no jerk
        ("limits", planted([0.1, 0.2], [0.1, 0.3]), 0),  # too short for a jerk
        ("medoid", planted([0, 0], [9, 9], [1, 1], [2, 2]), 2),
        ("medoid", planted([0, 0], [9, 9]), 0),
        ("medoid", planted([0, 9], [1, 0], [2, 0.5], executed=slice(0, 1)), 1),
        ("coherence", planted([5, 5, 5], [1, 1, 9], previous=row(1, 1)), 1),
        ("coherence", planted([1, 9, 9], [9, 2, 9], previous=row(1, 2), executed=slice(1, 3)), 1),
        ("coherence", planted([5, 5], [1, 1]), 0),
        ("coherence", planted([5, 5], [1, 1], previous=row(1), executed=slice(1, 2)), 0),  # nothing is left
        ("token", planted([5, 5], [1, 1], proposal=row(1, 2)), 1),
        ("token", planted([5, 1], [1, 1], proposal=row(5, 9), executed=slice(0, 1)), 0),
        *((name, planted(RISING, RISING, RISING, proposal=row(*RISING)), 0) for name in SELECTORS),
    ],
)
def test_what_each_selector_prefers(selector, candidates, best):
    chosen, said = choose(selector, SELECTORS[selector], candidates)
    assert chosen == best
    assert len(said["scores"]) == len(candidates.actions)


def test_the_spread_is_the_mean_distance_in_executed_rows():
    candidates = planted([0, 0, 9], [2, 2, 0], [4, 4, 5], executed=slice(0, 2))
    assert candidates.spread == pytest.approx((2 + 2 + 4) / 3 / np.sqrt(2))  # one of two dimensions


@pytest.mark.parametrize("scores", [[1, np.nan], [1], [[1, 2]], "best", None, {"a": 1}, [1, "x"]])
def test_scores_that_are_none_name_who_gave_them(scores):
    with pytest.raises(ActionError, match=r"selector 'critic\.py:best'"):
        choose("critic.py:best", lambda _: scores, planted([0], [1]))


@pytest.mark.parametrize(("scores", "best"), [([-np.inf, 1], 1), ([2, 2], 0), ([1, 5, 5], 1), ([-np.inf] * 2, 0)])
def test_equal_scores_are_decided_for_the_first(scores, best):
    assert choose("mine", lambda _: scores, planted(*[[0]] * len(scores)))[0] == best


@pytest.mark.parametrize(
    ("given", "execute_steps", "rows"),
    [(0, None, slice(0, 4)), (1, 2, slice(1, 3)), (3, 4, slice(3, 4)), (4, None, slice(3, 4))],
)
def test_which_rows_are_executed(given, execute_steps, rows):
    assert executed_rows(4, given, execute_steps) == rows


def test_a_selector_sees_the_observation_and_the_previous_chunk(pi05):
    seen: list[Candidates] = []

    def critic(candidates):
        seen.append(candidates)
        return np.zeros(3)

    pi05.set_candidates(Choice(n=3, selector="mine"), critic)
    left = np.full((3, 4), 0.3, np.float32)
    asked = observation() | {PREVIOUS: left, DELAY: 1, EXECUTE_STEPS: 2}
    assert pi05.infer(asked)["candidates"]["chosen"] == 0
    (one,) = seen
    np.testing.assert_array_equal(one.state, observation()["observation/state"].astype(np.float32))
    assert one.observation.keys() == observation().keys()
    assert (one.actions.shape, one.normalised.shape, one.executed) == ((3, 4, 4), (3, 4, 4), slice(1, 3))
    assert one.previous.shape == (3, 4)
    decoded = pi05.pipeline.decode(np.pad(one.previous, ((0, 1), (0, 0)))[:, :4], pi05.encode(asked).seen)
    np.testing.assert_allclose(decoded[:3], left, atol=1e-5)
    # A candidate of these commands is the most coherent one.
    exact = np.stack([one.normalised[0], np.pad(one.previous, ((0, 1), (0, 0)))])
    assert np.argmax(SELECTORS["coherence"](replace(one, normalised=exact))) == 1


# The token head -------------------------------------------------------------------------------------------------------


def test_a_proposal_is_what_the_token_head_would_do(trained):
    fast = Policy.load(trained("pi0_fast"))
    encoded = fast.encode(observation())
    (proposal,) = fast.propose_tokens([encoded])
    normalise = 3  # ReadRobot, ActionSpace, Normalize: what is left of `decode`
    commands = proposal
    for step, sample in zip(reversed(fast.pipeline.steps[:normalise]), reversed(encoded.seen[:normalise]), strict=True):
        commands = step.decode(commands, sample)
    np.testing.assert_array_equal(commands, fast.infer(observation())["actions"])


def test_the_candidate_nearest_to_the_proposal(pi05, monkeypatch):
    """A head that is not there yet is played: it wants what noise 2 gives."""
    noise = pi05.draw_noise()
    third = pi05.run_model(pi05.model_input([pi05.encode(observation())]), candidate_noises(noise, 3)[2:])[0]
    asked = observation() | {CANDIDATES: 4, SELECTOR: "token"}
    with pytest.raises(ObservationError, match="needs no token head"):
        pi05.infer(asked, noise)
    monkeypatch.setattr(Policy, "_heads", {"flow": True, "tokens": True})
    monkeypatch.setattr(Policy, "propose_tokens", lambda self, encoded: [third[:, :4]] * len(encoded))
    assert pi05.infer(asked, noise)["candidates"]["chosen"] == 2


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        ({CANDIDATES: 0}, "from 1 to 16"),
        ({CANDIDATES: 17}, "from 1 to 16"),
        ({CANDIDATES: 2.5}, "from 1 to 16"),
        ({CANDIDATES: "many"}, "from 1 to 16"),
        ({CANDIDATES: 2}, "from 3 to 16 for medoid"),
        ({CANDIDATES: 4, GATE: -1.0}, "from 0"),
        ({CANDIDATES: 4, GATE: float("nan")}, "from 0"),
        ({CANDIDATES: 4, GATE: float("inf")}, "from 0"),
        ({CANDIDATES: 4, GATE: 0.1, NUM_STEPS: 1}, "2 integration steps"),
        ({CANDIDATES: 4, EXECUTE_STEPS: 5}, "from 1 to 4"),
        ({CANDIDATES: 4, SELECTOR: 3}, "name of a selector"),
        ({CANDIDATES: 4, SELECTOR: "x" * 300}, "name of a selector"),
    ],
)
def test_bad_values_are_refused(pi05, extra, found):
    with pytest.raises(ObservationError, match=found):
        pi05.infer(observation() | extra)


def test_a_client_names_no_file(pi05, tmp_path):
    (tmp_path / "critic.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(UnknownNameError, match="coherence, limits, medoid, token"):
        pi05.infer(observation() | {CANDIDATES: 4, SELECTOR: f"{tmp_path}/critic.py:best"})


def test_what_a_policy_cannot_do_is_said_before_it_serves(trained, pi05):
    for choice in (
        Choice(n=17),
        Choice(n=4, selector="token"),
        Choice(n=4, selector="limits+token"),
        Choice(n=4, gate=-1.0),
        Choice(n=2),
    ):
        with pytest.raises(ConfigError, match="choice among candidates"):
            pi05.set_candidates(choice)
    fast = Policy.load(trained("pi0_fast"))
    assert fast.metadata["candidates"] is None
    with pytest.raises(ConfigError, match="no flow head"):
        fast.set_candidates(Choice(n=4))
    with pytest.raises(ObservationError, match="no flow head"):
        fast.infer(observation() | {CANDIDATES: 4})


CRITIC = """
import numpy as np

def lowest(candidates):
    return -candidates.actions[:, candidates.executed, 2].mean(1)

class Highest:
    def __init__(self):
        self.sign = 1.0

    def __call__(self, candidates):
        return self.sign * candidates.actions[:, candidates.executed, 2].mean(1)

class Broken:
    def __init__(self):
        open("no/such/weights")
"""


def test_a_critic_of_a_users_file(pi05, tmp_path):
    file = tmp_path / "critic.py"
    file.write_text(CRITIC)
    noise, heights, sources = pi05.draw_noise(), {}, set()
    for name in ("lowest", "Highest"):
        target = f"{file}:{name}"
        own, source = load_selector(target)
        sources.add(source)
        pi05.set_candidates(Choice(n=6, selector=target), own)
        heights[name] = pi05.infer(observation(), noise)["actions"][:, 2].mean()
    all_six = pi05.infer(observation(), candidate_noises(noise, 6))["actions"][:, :, 2].mean(1)
    np.testing.assert_allclose([heights["lowest"], heights["Highest"]], [all_six.min(), all_six.max()], atol=ROUNDING)
    assert len(sources) == 1
    with pytest.raises(UnknownNameError, match="lowest"):
        load_selector(f"{file}:lowst")
    with pytest.raises(ConfigError, match=r"critic\.py, line 16"):
        load_selector(f"{file}:Broken")
    with pytest.raises(ConfigError, match="no such file"):
        load_selector("nowhere.py:best")


# Over a websocket -----------------------------------------------------------------------------------------------------


def test_clients_who_choose_over_a_websocket(pi05):
    asked = [o | {SEED: i, CANDIDATES: 4, SELECTOR: "limits"} for i, o in enumerate(observations())]
    expected = [pi05.infer(one) for one in asked]
    answers, ready = [None] * 3, threading.Barrier(3)

    def ask(number, port):
        with WebsocketPolicy(port=port) as client:
            ready.wait()
            answers[number] = client.infer(asked[number])

    limits = Limits(batch_wait_ms=500)
    with PolicyServer(pi05, port=0, robot=pi05.robot, guard="off", limits=limits).serve_in_thread() as port:
        threads = [threading.Thread(target=ask, args=(number, port)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with WebsocketPolicy(port=port) as client:
            assert client.metadata["candidates"]["n"] == 1
            assert "candidates" not in client.infer(observation())
            with pytest.raises(RemoteInferenceError, match="from 1 to 16"):
                client.infer(observation() | {CANDIDATES: 99})
    for answer, one in zip(answers, expected, strict=True):
        assert answer["batch"] == 3
        assert "unknown_keys" not in answer
        assert answer["candidates"]["chosen"] == one["candidates"]["chosen"]
        assert answer["candidates"].keys() == {"n", "chosen", "selector", "spread", "scores"}
        np.testing.assert_allclose(answer["actions"], one["actions"], atol=ROUNDING)
