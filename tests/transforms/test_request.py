"""What a client adds to an observation, when it is not what it should be: an error names the key and repeats little."""

import numpy as np
import pytest

from manipi.errors import ObservationError
from manipi.transforms.observation import read_request
from manipi_client.keys import DELAY, PREVIOUS, SEED

ROWS = np.zeros((2, 3))


def read(observation):
    return read_request(observation, action_size=3, horizon=4, real_time=True)


@pytest.mark.parametrize("rows", [ROWS, ROWS.tolist(), list(ROWS), ROWS.astype("<i2")])
@pytest.mark.parametrize("delay", [1, np.int8(1), np.array([1]), [1]])
def test_every_shape_that_the_wire_gives_it(rows, delay):
    request = read({PREVIOUS: rows, DELAY: delay, SEED: [7]})
    asked, seed = request.asked, request.seed
    assert asked["actions"].shape == (4, 3)
    assert asked["actions"].dtype == np.float32
    assert asked["action_valid"].tolist() == [True, True, False, False]
    assert (int(asked["delay"]), seed) == (1, 7)


LARGE = [
    b"\x1b\n" * 10**6,
    np.array(b"\x1b\n" * 10**6),
    np.zeros(10**6, np.int64),
    list(range(10**6)),
    [b"\n" * 10**6, *[0] * 1_000],
    {"a" * 10**6: 1},
    np.full(10**6, np.nan),
]
ODD = [None, [[1], [1, 2]], "7", np.array("7"), {}, True, 0.5, -1, 2**64 - 1, [], np.frombuffer(b"\xff" * 4, "<U1")]


@pytest.mark.parametrize("key", [SEED, DELAY, PREVIOUS])
@pytest.mark.parametrize("value", LARGE + ODD, ids=range(len(LARGE + ODD)))
def test_what_it_cannot_be(key, value):
    with pytest.raises(ObservationError) as error:
        read({PREVIOUS: ROWS, DELAY: 1, key: value})
    parts = (error.value.expected, error.value.found, error.value.where)
    assert sum(map(len, parts)) < 600
    assert all(part.isprintable() for part in parts)
    assert repr(key) in error.value.where


def test_commands_that_float32_cannot_hold():
    with pytest.raises(ObservationError, match="NaN or infinity"):
        read({PREVIOUS: np.full((1, 3), 1e300), DELAY: 0})
