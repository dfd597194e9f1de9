"""The border between a robot's observation and the pipeline: checked once, here, in training and in serving."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from manipi.errors import BadValueError, ObservationError
from manipi.robots.robot import Robot
from manipi.types import Observation, Sample


@dataclass(frozen=True)
class ReadRobot:
    """An observation in the robot's keys -> `image/<slot>`, `state`, `prompt` (and the actions, in training).

    Raises:
        ObservationError: a missing key, a wrong shape or dtype, NaN, or no prompt; it names the key.
    """

    robot: Robot

    def encode(self, sample: Observation) -> Sample:
        images = {f"image/{slot}": self._image(sample, key) for slot, key in self.robot.cameras.items()}
        vectors = [self._vector(sample, s.key, s.size) for s in self.robot.state]
        state = np.concatenate(vectors) if vectors else np.zeros(0, np.float32)
        kept = {key: sample[key] for key in ("actions", "action_valid") if key in sample}
        return {**images, "state": state, "prompt": self._prompt(sample), **kept}  # type: ignore[dict-item]

    def decode(self, actions_HA: np.ndarray, sample: Sample) -> np.ndarray:
        """Raises BadValueError rather than hand NaN or infinity to a robot."""
        bad = np.argwhere(~np.isfinite(actions_HA))
        if len(bad):
            step, dimension = bad[0].tolist()
            raise BadValueError(
                expected="finite actions",
                found=f"{actions_HA[step, dimension]} at step {step}, dimension {dimension}",
                where=f"the action chunk for robot {self.robot.name!r}",
                next="look at the observation (a quaternion of zeros?), and at the loss of the run behind this policy",
            )
        return np.asarray(actions_HA, dtype=np.float32)

    def _image(self, sample: Observation, key: str) -> np.ndarray:
        image = self._get(sample, key, "a uint8 picture [height, width, 3]")
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3:
            height, width, channels = image.shape
            if height and width and channels == 3:
                return image
        raise self._mismatch("a uint8 picture [height, width, 3]", _describe(image), key)

    def _vector(self, sample: Observation, key: str, size: int) -> np.ndarray:
        expected = f"{size} finite numbers"
        value = np.atleast_1d(self._array(sample, key, expected))
        if value.shape != (size,) or value.dtype.kind not in "fiu":
            raise self._mismatch(expected, _describe(value), key)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            numbers = value.astype(np.float32)
        finite = np.isfinite(numbers)
        if not finite.all():
            raise self._mismatch(expected, f"{value[~finite][0]} at index {np.argmin(finite)}", key)
        return numbers

    def _array(self, sample: Observation, key: str, expected: str) -> np.ndarray:
        value = self._get(sample, key, expected)
        try:
            return np.asarray(value)
        except ValueError as error:  # lists of unequal length
            raise self._mismatch(expected, str(error), key) from error

    def _prompt(self, sample: Observation) -> str:
        prompt = sample.get("prompt", self.robot.default_prompt)
        if isinstance(prompt, np.ndarray | np.generic) and prompt.size == 1:
            prompt = prompt.item()
        if isinstance(prompt, bytes):
            try:
                prompt = prompt.decode()
            except UnicodeDecodeError as error:
                raise self._mismatch("a text in UTF-8", str(error), "prompt") from error
        if not isinstance(prompt, str):
            raise self._mismatch("a text, or a robot with a default_prompt", _describe(prompt), "prompt")
        return prompt

    def _get(self, sample: Observation, key: str, expected: str) -> "np.ndarray | str":
        if key not in sample:
            raise self._mismatch(f"{expected} under {key!r}", _missing(key, sample), key)
        return sample[key]

    def _mismatch(self, expected: str, found: str, key: str) -> ObservationError:
        return ObservationError(
            expected=expected,
            found=found,
            where=f"observation key {key!r} of robot {self.robot.name!r}",
            next="send what the robot's spec says (server metadata, `robot`), or correct the Robot(...)",
        )


def _missing(key: str, sample: Iterable[str]) -> str:
    names = sorted(sample)
    close = get_close_matches(key, names, n=1)
    return f"only {', '.join(names)}" + (f" (is it {close[0]!r}?)" if close else "")


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return "nothing" if value is None else f"{type(value).__name__}"
