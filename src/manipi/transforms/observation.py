"""The border between a robot's observation and the pipeline: checked once, here, in training and in serving.

Keys may be flat or nested: `{"images": {"cam_high": …}}` is `{"images/cam_high": …}`.

A picture is uint8, or float in [0, 1], which becomes uint8 as openpi's adapters do it (255 times, cut). Three channels
last or first: whichever axis has size 3. Where both have, nobody can tell, and it is refused.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from manipi.errors import BadValueError, ObservationError
from manipi.robots.robot import Robot
from manipi.types import Observation, Sample

_OTHER_KEYS = ("prompt", "actions", "action_valid")


@dataclass(frozen=True)
class ReadRobot:
    """An observation in the robot's keys -> `image/<slot>`, `state`, `prompt` (and the actions, in training).

    Raises:
        ObservationError: a missing key, a wrong shape, dtype or range, NaN, or no prompt; it names the key. Also an
            unknown key beside that of an optional camera, which would be missing without a word for a slip in its name.
    """

    robot: Robot

    def encode(self, sample: Observation) -> Sample:
        sample = self._flat(sample)
        cameras = {slot: key for slot, key in self.robot.cameras.items() if not self._absent(sample, slot, key)}
        images = {f"image/{slot}": self._image(sample, key) for slot, key in cameras.items()}
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

    def _flat(self, sample: Observation, folder: str = "") -> dict[str, "np.ndarray | str"]:
        flat = {}
        for name, value in sample.items():
            key = f"{folder}{name}"
            inner = self._flat(value, key + "/") if isinstance(value, Mapping) else {key: value}
            if twice := flat.keys() & inner.keys():
                raise self._mismatch("every key once", "it both nested and flat", min(twice))
            flat |= inner
        return flat

    def _absent(self, sample: Mapping, slot: str, key: str) -> bool:
        if slot not in self.robot.optional:
            return False
        robot, folder = self.robot, key.rpartition("/")[0]
        known = {*robot.cameras.values(), *(s.key for s in robot.state), *robot.ignored, *_OTHER_KEYS}
        for other in sample:
            if other not in known and other.rpartition("/")[0] == folder:
                beside = sorted(name for name in known if name.rpartition("/")[0] == folder)
                raise self._mismatch(f"no key but {', '.join(beside)} there", repr(other) + _hint(other, beside), other)
        return key not in sample

    def _image(self, sample: Mapping, key: str) -> np.ndarray:
        expected = "a picture [height, width, 3] or [3, height, width], uint8 or float in [0, 1]"
        image = self._get(sample, key, expected)
        if not isinstance(image, np.ndarray) or image.ndim != 3 or not image.size:
            raise self._mismatch(expected, _describe(image), key)
        first, last = image.shape[0] == 3, image.shape[-1] == 3
        if first == last or not (image.dtype == np.uint8 or image.dtype.kind == "f"):
            both = ", whose channels may be either axis of size 3" if first and last else ""
            raise self._mismatch(expected, _describe(image) + both, key)
        if image.dtype != np.uint8:
            if not (image.min() >= 0 and image.max() <= 1):  # NaN fails this, too
                raise self._mismatch(expected, f"{image.dtype} from {image.min():g} to {image.max():g}", key)
            image = (255 * image).astype(np.uint8)
        return np.moveaxis(image, 0, -1) if first else image

    def _vector(self, sample: Mapping, key: str, size: int) -> np.ndarray:
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

    def _array(self, sample: Mapping, key: str, expected: str) -> np.ndarray:
        value = self._get(sample, key, expected)
        try:
            return np.asarray(value)
        except ValueError as error:  # lists of unequal length
            raise self._mismatch(expected, str(error), key) from error

    def _prompt(self, sample: Mapping) -> str:
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

    def _get(self, sample: Mapping, key: str, expected: str) -> "np.ndarray | str":
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
    return f"only {', '.join(names)}" + _hint(key, names)


def _hint(key: str, names: list[str]) -> str:
    close = get_close_matches(key, names, n=1)
    return f" (is it {close[0]!r}?)" if close else ""


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return "nothing" if value is None else f"{type(value).__name__}"
