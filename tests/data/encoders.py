"""What worker processes are given in the tests of the loader; a module of its own, so that they can import it."""

import os
import signal
from functools import partial

import numpy as np

from manipi.data.dataset import frames
from manipi.errors import BadValueError

CAMERA = "observation.images.top"
_read = partial(frames, cameras=[CAMERA], state_keys=["observation.state"], action_key="action", horizon=4)


def samples(encode, dataset, rows, camera=CAMERA):
    return [encode(frame) for frame in _read(dataset, rows, cameras=[camera])]


def encode(frame):
    place = np.array([frame.episode, frame.index])
    image = next(values for values in frame.observation.values() if values.ndim == 3)
    return {"image": image, "actions": frame.actions, "valid": frame.action_valid, "place": place}


def every_sample(dataset, rows, **keys):
    found = frames(dataset, rows, action_key="actions", horizon=2, **keys)
    return [{**frame.observation, "actions": frame.actions, "valid": frame.action_valid} for frame in found]


def refuse_episode_2(frame):
    if frame.episode == 2:
        raise BadValueError(
            expected="good frames", found="a bad one", where=f"episode 2, frame {frame.index}", next="x"
        )
    return encode(frame)


def crash_at_episode_2(frame):
    if frame.episode == 2:
        raise ZeroDivisionError("a mistake in the code")
    return encode(frame)


def die_at_episode_2(frame):
    if frame.episode == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(frame)
