"""What a client adds to an observation beside the robot's own keys.

    manipi/prev_actions   [n, A]   what is left of the chunk that the robot is executing, from this instant on: its
                                   commands, absolute and in its own units, as they were sent; n up to H
    manipi/delay          int      how many of them it will have executed when the answer comes
    manipi/seed           int      what the noise is drawn from, so that the same question has the same answer

The previous chunk takes the way of a training chunk: the pipeline makes it relative to the state of *this* observation
and normalises it, so that the model sees it as it would have predicted it now.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from manipi.errors import ObservationError, one_line, shown
from manipi.transforms.observation import as_array
from manipi.types import Observation
from manipi_client.keys import DELAY, PREVIOUS, SEED

_RECORDED = ("actions", "action_valid", "delay")
"""A recorded frame may bring its actions along; the policy must not see them."""


def read_request(
    observation: Observation, *, action_size: int, horizon: int, real_time: bool
) -> tuple[dict[str, Any], int | None]:
    """The observation for the pipeline, with `actions`, `action_valid` and `delay` of a previous chunk, and the seed.

    Args:
        real_time: whether the policy goes on from a previous chunk; π0-FAST does not, since it writes chunks whole.

    Raises:
        ObservationError: one of the keys has another type, shape or range.
    """
    asked = {key: value for key, value in observation.items() if key not in (*_RECORDED, PREVIOUS, DELAY, SEED)}
    if PREVIOUS in observation or DELAY in observation:
        if not real_time:
            raise _mismatch(PREVIOUS, "no previous chunk, which this policy cannot go on from (`real_time`)", "one")
        asked |= _previous_chunk(observation, action_size, horizon)
    return asked, _count(observation, SEED, 2**63 - 1) if SEED in observation else None


def _previous_chunk(observation: Mapping[str, Any], action_size: int, horizon: int) -> dict[str, Any]:
    expected = f"1 to {horizon} commands of {action_size} finite numbers"
    left = _array(observation, PREVIOUS, expected, horizon * action_size)
    fits = left.ndim == 2 and left.shape[1] == action_size and 1 <= len(left) <= horizon and left.dtype.kind in "fiu"
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        numbers = left.astype(np.float32) if fits else None
    if numbers is None or not np.isfinite(numbers).all():
        raise _mismatch(PREVIOUS, expected, f"{left.dtype} {list(left.shape)}" + (", NaN or infinity" if fits else ""))
    steps = np.minimum(np.arange(horizon), len(left) - 1)
    return {
        "actions": numbers[steps],
        "action_valid": np.arange(horizon) < len(left),
        "delay": np.int64(_count(observation, DELAY, horizon)),
    }


def _count(observation: Mapping[str, Any], key: str, most: int) -> int:
    expected = f"a whole number from 0 to {most}"
    value = _array(observation, key, expected, 1)
    if value.size != 1 or value.dtype.kind not in "iu" or not 0 <= value.item() <= most:
        numbers = value.tolist() if value.size == 1 and value.dtype.kind in "biuf" else list(value.shape)
        raise _mismatch(key, expected, f"{value.dtype} {shown(numbers)}")
    return int(value.item())


def _array(observation: Mapping[str, Any], key: str, expected: str, most: int) -> np.ndarray:
    if key not in observation:
        raise _mismatch(key, expected, "nothing")
    try:
        return as_array(observation[key], most)
    except ValueError as error:
        raise _mismatch(key, expected, one_line(str(error), 200)) from error


def _mismatch(key: str, expected: str, found: str) -> ObservationError:
    return ObservationError(
        expected=expected,
        found=found,
        where=f"observation key {key!r}",
        next="send what the server's metadata allow (`action_horizon`, `real_time`); manipi_client.RealTimeBroker does",
    )
