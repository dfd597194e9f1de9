"""The border between a robot's observation and the pipeline: checked once, here, in training and in serving.

Keys may be flat or nested: `{"images": {"cam_high": …}}` is `{"images/cam_high": …}`.

A picture is uint8, or float in [0, 1], which becomes uint8 as openpi's adapters do it (255 times, cut). Three channels
last or first: whichever axis has size 3. Where both have, it is refused, since either may be meant.

What an observation holds may come from strangers. Texts are measured before anything reads them, lists before they
become arrays (one long text in a list makes every item of the array as long), and errors repeat little of them.

What a client may add beside the robot's own keys (`read_request`):

    manipi/prev_actions   [n, A]   what is left of the chunk that the robot is executing, from this instant on: its
                                   commands, absolute and in its own units, as they were sent; n up to H
    manipi/delay          int      how many of them it will have executed when the answer comes
    manipi/seed           int      what the noise is drawn from, so that the same question has the same answer
    manipi/num_steps      int      of a flow policy: integration steps of this answer, instead of the policy's own
    manipi/temperature    number   of tokens: 0 takes the likeliest one, 1 draws as the model says, by the seed
    manipi/mode           text     of a policy that has both: `flow`, or `tokens` as π0-FAST writes them
    manipi/subtask        text     of a policy that writes text: what is to be done at present
    manipi/write_subtask  bool     whether it shall write that before it acts
    manipi/candidates     int      chunks to draw, of which one is answered (`manipi.candidates`)
    manipi/selector       text     what chooses among them
    manipi/gate           number   draw more than one only where that one is more uncertain
    manipi/execute_steps  int      steps of the answer that will be executed, by which candidates are compared
    manipi/past           list     of a policy that remembers: older observations, the oldest first, as many as the
                                   metadata's `past_steps` has, which says how many control steps ago; null: none then

The previous chunk takes the way of a training chunk: the pipeline makes it relative to the state of *this* observation
and normalises it, so that the model sees it as it would have predicted it now.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

import numpy as np

from manipi.errors import BadValueError, ObservationError, one_line, shown
from manipi.robots.robot import Robot
from manipi.types import Observation, Sample
from manipi_client.keys import (
    CANDIDATES,
    DELAY,
    EXECUTE_STEPS,
    GATE,
    MODE,
    NUM_STEPS,
    PAST,
    PREVIOUS,
    SEED,
    SELECTOR,
    SUBTASK,
    TEMPERATURE,
    WRITE_SUBTASK,
)

CHUNK_KEYS = ("actions", "action_valid", "delay")
_LEARNED_KEYS = ("subtask", "answer")
"""Texts beside a chunk in training. A robot's vector may have such a name, and stays its own."""
_OTHER_KEYS = ("prompt", *CHUNK_KEYS, *_LEARNED_KEYS)

Mode: TypeAlias = Literal["flow", "tokens"]
"""How a policy makes actions: by integration, or written as codes."""

MAX_NUM_STEPS = 1_000
"""Integration steps that a client may ask for; a policy is trained for ten or so."""

MAX_CANDIDATES = 16
"""Chunks that a client may ask for at once. Imperfect selectors get worse with many (arXiv 2411.17501)."""

MAX_PROMPT = 2_048
"""Characters of a prompt, several times what any model reads; as bytes four times as many, as UTF-8 has it."""

_MAX_SIDE = 16_384
"""Pixels of a picture in a row or a column. A row of millions takes seconds to resize."""

_MAX_KEY = 256
"""Characters of a key, those of the maps around it included."""

_MAX_KEYS_SHOWN, _MAX_DEPTH = 40, 64

_SPEC = "send what the robot's spec says (server metadata, `robot`)"
_METADATA = "send what the server's metadata allow (`action_horizon`, `real_time`); manipi_client.RealTimeBroker does"


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
        kept = {key: sample[key] for key in (*CHUNK_KEYS, WRITE_SUBTASK) if key in sample}
        kept |= {key: sample[key] for key in _LEARNED_KEYS if isinstance(sample.get(key), str)}
        return {**images, "state": self._state(sample), "prompt": self._prompt(sample), **kept}  # type: ignore[dict-item]

    def decode(self, actions_HA: np.ndarray, sample: Sample) -> np.ndarray:
        """Raises BadValueError rather than hand NaN or infinity to a robot."""
        bad = np.argwhere(~np.isfinite(actions_HA))
        if len(bad):
            *_, step, dimension = bad[0].tolist()
            raise BadValueError(
                expected="finite actions",
                found=f"{actions_HA[tuple(bad[0])]} at step {step}, dimension {dimension}",
                where=f"the action chunk for robot {self.robot.name!r}",
                next="look at the observation (a quaternion of zeros?), and at the loss of the run behind this policy",
            )
        return np.asarray(actions_HA, dtype=np.float32)

    def read_state(self, observation: Observation) -> np.ndarray:
        """The state [S] alone, float32, as `encode` reads it. Raises ObservationError as it does."""
        return self._state(self._flat(observation))

    def read_part(self, observation: Observation) -> Sample:
        """The part of an observation that `encode` reads, by its flat keys, whatever else is in it."""
        keys = (*self.robot.cameras.values(), *(s.key for s in self.robot.state), "prompt")
        found = ((key, _find(observation, key)) for key in keys)
        return {key: value for key, value in found if value is not None}  # type: ignore[return-value]

    def _flat(self, sample: Observation, folder: str = "") -> dict[str, "np.ndarray | str"]:
        flat = {}
        for name, value in sample.items():
            if not isinstance(name, str) or len(folder) + len(name) > _MAX_KEY:
                raise self._mismatch(f"keys that are texts of at most {_MAX_KEY} characters", shown(name), folder)
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
                found = shown(other) + _hint(other, beside)
                raise self._mismatch(f"no key but {', '.join(beside)} there", found, other)
        return key not in sample

    def _state(self, sample: Mapping) -> np.ndarray:
        vectors = [self._vector(sample, s.key, s.size) for s in self.robot.state]
        return np.concatenate(vectors) if vectors else np.zeros(0, np.float32)

    def _image(self, sample: Mapping, key: str) -> np.ndarray:
        expected = "a picture [height, width, 3] or [3, height, width], uint8 or float in [0, 1]"
        image = self._get(sample, key, expected)
        if not isinstance(image, np.ndarray) or image.ndim != 3 or not image.size or max(image.shape) > _MAX_SIDE:
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
        found = self._get(sample, key, expected)
        value = np.atleast_1d(_array(found, size, lambda why: self._mismatch(expected, why, key)))
        if value.shape != (size,) or value.dtype.kind not in "fiu":
            raise self._mismatch(expected, _describe(value), key)
        numbers = _float32(value)
        finite = np.isfinite(numbers)
        if not finite.all():
            raise self._mismatch(expected, f"{value[~finite][0]} at index {np.argmin(finite)}", key)
        return numbers

    def _prompt(self, sample: Mapping) -> str:
        value = sample.get("prompt", self.robot.default_prompt)
        try:
            prompt = as_text(value, MAX_PROMPT)
        except ValueError as error:
            raise self._mismatch(f"a text of at most {MAX_PROMPT:,} characters", str(error), "prompt") from None
        if prompt is None:
            raise self._mismatch("a text, or a robot with a default_prompt", _describe(value), "prompt")
        return prompt

    def _get(self, sample: Mapping, key: str, expected: str) -> "np.ndarray | str":
        if key not in sample:
            raise self._mismatch(f"{expected} under {key!r}", _missing(key, sample), key)
        return sample[key]

    def _mismatch(self, expected: str, found: str, key: str) -> ObservationError:
        return _refusal(expected, found, key, f" of robot {self.robot.name!r}", f"{_SPEC}, or correct the Robot(...)")


@dataclass(frozen=True)
class Request:
    """An observation and how it shall be answered."""

    asked: dict[str, Any]
    """The observation for the pipeline, with `actions`, `action_valid` and `delay` of a previous chunk."""
    seed: int | None
    num_steps: int | None
    temperature: float | None
    mode: Mode
    subtask: str
    """What is to be done at present; empty: nothing is said."""
    write_subtask: bool
    choice: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `manipi.candidates.Choice` that the client sets."""


def read_request(
    observation: Observation,
    *,
    action_size: int,
    horizon: int,
    real_time: bool,
    modes: Sequence[Mode] = ("flow",),
    writes_text: bool = False,
    past: int = 0,
) -> Request:
    """What a client sent, its own keys apart.

    Args:
        real_time: whether the policy goes on from a previous chunk; π0-FAST does not, since it writes chunks whole.
        modes: how it can answer, the first unless the client says. Tokens have a temperature, a flow integration steps.
        writes_text: whether it can be told or asked for a subtask.
        past: how many older observations it remembers.

    Raises:
        ObservationError: one of the keys has another type, shape or range.
    """
    # A recorded frame may bring its actions along; the policy must not see them.
    own = (*CHUNK_KEYS, PREVIOUS, DELAY, SEED, NUM_STEPS, TEMPERATURE, MODE, SUBTASK, WRITE_SUBTASK)
    own = (*own, CANDIDATES, SELECTOR, GATE, EXECUTE_STEPS, PAST)
    asked: dict[str, Any] = {key: value for key, value in observation.items() if key not in own}
    asked = {key: value for key, value in asked.items() if key not in _LEARNED_KEYS or not isinstance(value, str)}
    mode = _text(observation, MODE, 16) or modes[0]
    if mode not in modes:
        next = "leave it out, or serve a policy that was trained with action codes (JointConfig)"
        raise _refusal(" or ".join(modes), shown(mode), MODE, next=next)
    for key, fits, kind in ((NUM_STEPS, mode == "flow", "flow"), (TEMPERATURE, mode == "tokens", "token")):
        if key in observation and not fits:
            raise _refusal(f"no such key, which is for {kind} policies", "one", key, next="leave it out")
    if not writes_text and (strange := observation.keys() & {SUBTASK, WRITE_SUBTASK}):
        next = "leave it out, or serve a policy that was trained on text (JointConfig)"
        raise _refusal("no such key, which is for policies that write text", "one", min(strange), next=next)
    subtask = _text(observation, SUBTASK, MAX_PROMPT)
    asked |= _read_past(observation, past)
    if PREVIOUS in observation or DELAY in observation:
        if not real_time or mode == "tokens":
            expected = "no previous chunk, which this policy cannot go on from (`real_time`)"
            raise _refusal(expected, "one", PREVIOUS, next=_METADATA)
        expected = f"1 to {horizon} commands of {action_size} finite numbers"
        left = _request_array(observation, PREVIOUS, expected, horizon * action_size)
        fits = left.shape[1:] == (action_size,) and 1 <= len(left) <= horizon and left.dtype.kind in "fiu"
        if not fits or not np.isfinite(_float32(left)).all():
            found = _describe(left) + (", NaN or infinity" if fits else "")
            raise _refusal(expected, found, PREVIOUS, next=_METADATA)
        steps = np.arange(horizon)
        asked |= {
            "actions": _float32(left)[np.minimum(steps, len(left) - 1)],
            "action_valid": steps < len(left),
            "delay": np.int64(_count(observation, DELAY, horizon)),
        }
    return Request(
        asked,
        _count(observation, SEED, 2**63 - 1) if SEED in observation else None,
        _count(observation, NUM_STEPS, MAX_NUM_STEPS, least=1) if NUM_STEPS in observation else None,
        float(_number(observation, TEMPERATURE, "a number from 0 to 100", "iuf", 0, 100))
        if TEMPERATURE in observation
        else None,
        mode,  # type: ignore[arg-type] - it is one of them
        subtask,
        bool(_number(observation, WRITE_SUBTASK, "true or false", "b", 0, 1))
        if WRITE_SUBTASK in observation
        else False,
        _read_choice(observation, horizon),
    )


def _read_past(observation: Mapping[str, Any], past: int) -> dict[str, Any]:
    """The older observations, where there are any; each is read when the pipeline encodes it."""
    if PAST not in observation:
        return {}
    before, expected = observation[PAST], "no such key, which is for policies that remember"
    fits = isinstance(before, list | tuple) and len(before) == past
    if not (past and fits and all(one is None or isinstance(one, Mapping) for one in before)):
        found = _describe(before) + (f" of {len(before)}" if isinstance(before, list | tuple) else "")
        raise _refusal(f"{past} observations or nulls" if past else expected, found, PAST, next=_METADATA)
    return {PAST: before}


def _text(observation: Mapping[str, Any], key: str, most: int) -> str:
    """Empty where the key is absent."""
    try:
        text = as_text(observation.get(key, ""), most)
    except ValueError as error:
        raise _refusal(f"a text of at most {most} characters", one_line(str(error), 200), key) from error
    if text is None:
        raise _refusal(f"a text of at most {most} characters", _describe(observation[key]), key)
    return text


def _read_choice(observation: Mapping[str, Any], horizon: int) -> dict[str, Any]:
    choice: dict[str, Any] = {}
    for key, name, most in ((CANDIDATES, "n", MAX_CANDIDATES), (EXECUTE_STEPS, "execute_steps", horizon)):
        if key in observation:
            choice[name] = _count(observation, key, most, least=1)
    if GATE in observation:
        choice["gate"] = float(_number(observation, GATE, "a finite number from 0", "iuf", 0, sys.float_info.max))
    if SELECTOR in observation:
        choice["selector"] = name = observation[SELECTOR]
        if not isinstance(name, str) or len(name) > _MAX_KEY:
            raise _refusal("the name of a selector", _describe(name), SELECTOR, next=_METADATA)
    return choice


def _count(observation: Mapping[str, Any], key: str, most: int, *, least: int = 0) -> int:
    return int(_number(observation, key, f"a whole number from {least} to {most}", "iu", least, most))


def _number(observation: Mapping[str, Any], key: str, expected: str, kinds: str, least: float, most: float) -> float:
    value = _request_array(observation, key, expected, 1)
    if value.size != 1 or value.dtype.kind not in kinds or not least <= value.item() <= most:
        numbers = value.tolist() if value.size == 1 and value.dtype.kind in "biuf" else list(value.shape)
        raise _refusal(expected, f"{value.dtype} {shown(numbers)}", key, next=_METADATA)
    return value.item()


def _request_array(observation: Mapping[str, Any], key: str, expected: str, most: int) -> np.ndarray:
    if key not in observation:
        raise _refusal(expected, "nothing", key, next=_METADATA)
    return _array(observation[key], most, lambda why: _refusal(expected, why, key, next=_METADATA))


def _array(value: object, most: int, refusal: Callable[[str], ObservationError]) -> np.ndarray:
    try:
        return as_array(value, most)
    except ValueError as error:
        raise refusal(one_line(str(error), 200)) from error


def _float32(numbers: np.ndarray) -> np.ndarray:
    """What float32 cannot hold becomes infinite, and is refused as such."""
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32)


def _refusal(expected: str, found: str, key: object, of: str = "", next: str = _SPEC) -> ObservationError:
    return ObservationError(expected=expected, found=found, where=f"observation key {shown(key)}{of}", next=next)


def as_array(value: object, most: int) -> np.ndarray:
    """The array of what an observation holds: an array already, a number, or at most so many numbers in lists.

    Raises:
        ValueError: lists of unequal lengths, of more numbers, or of anything else.
    """
    left = [value] if isinstance(value, list | tuple) else []
    while left:
        item = left.pop()
        if isinstance(item, list | tuple):
            left += item
        elif isinstance(item, np.ndarray | np.generic) and item.dtype.kind in "biuf":
            most -= item.size
        elif isinstance(item, int | float):
            most -= 1
        else:
            raise ValueError(f"a list with {_describe(item)} in it")
        if most < 0:
            raise ValueError("a list of more numbers")
    if not isinstance(value, list | tuple | np.ndarray | np.generic | int | float):
        raise ValueError(_describe(value))
    return np.asarray(value)


def as_text(value: object, most: int) -> str | None:
    """The text that a str, bytes, a NumPy scalar or an array of one text holds; None where it is none of these.

    Raises:
        ValueError: more than `most` characters, bytes that are not UTF-8, or what no text has (`check_content`).
    """
    if isinstance(value, np.ndarray | np.generic) and value.size == 1:
        if value.dtype.itemsize > 4 * most:
            raise ValueError(_describe(value))
        if (point := _no_character(value)) is not None:
            raise ValueError(f"{point:#x}, which is no character")
        value = value.item()
    if isinstance(value, bytes):
        if len(value) > 4 * most:
            raise ValueError(f"{len(value):,} bytes")
        value = value.decode()
    if isinstance(value, str) and len(value) > most:
        raise ValueError(f"{len(value):,} characters")
    return value if isinstance(value, str) else None


def check_content(observation: Mapping) -> None:
    """Looks through what a stranger sent, for what code fails at that reads it later.

    NumPy takes any 32 bits of an array for a character, and fails when it has to hand it out. Maps in maps end whoever
    looks into them by recursion.

    Raises:
        ObservationError: nested too deep, a code point beyond Unicode's, or half of a surrogate pair.
    """
    left: list[tuple[object, int, object]] = [(key, 1, value) for key, value in observation.items()]
    while left:
        key, depth, value = left.pop()
        if depth > _MAX_DEPTH:
            found, expected = "more", f"maps and lists at most {_MAX_DEPTH} deep"
        elif isinstance(value, Mapping | list):
            left += [(key, depth + 1, v) for v in (value.values() if isinstance(value, Mapping) else value)]
            continue
        elif (point := _no_character(value)) is not None:
            found, expected = f"{point:#x} in {_describe(value)}", "characters of Unicode"
        else:
            continue
        raise _refusal(expected, found, key)


def _no_character(value: object) -> int | None:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "U" or not value.size:
        return None
    points = np.ascontiguousarray(value).reshape(-1).view(f"{value.dtype.str[0]}u4")
    if points.max() < 0xD800:
        return None
    bad = (points > 0x10FFFF) | (points >> 11 == 0xD800 >> 11)
    return int(points[bad][0]) if bad.any() else None


def _find(observation: Mapping, key: str) -> "np.ndarray | str | None":
    if key in observation:
        return observation[key]
    inner = ((key[len(name) + 1 :], value) for name, value in observation.items() if key.startswith(f"{name}/"))
    found = (_find(value, rest) for rest, value in inner if isinstance(value, Mapping))
    return next((value for value in found if value is not None), None)


def _missing(key: str, sample: Iterable[str]) -> str:
    """What there is instead, of which a stranger may have sent thousands: similar names are looked for in the first."""
    names = sorted(sample)
    few = names[:_MAX_KEYS_SHOWN]
    more = f" and {len(names) - len(few)} more" if len(names) > len(few) else ""
    return f"only {', '.join(one_line(name, 80) for name in few)}{more}{_hint(key, few)}"


def _hint(key: str, names: list[str]) -> str:
    close = get_close_matches(key, names, n=1)
    return f" (is it {shown(close[0])}?)" if close else ""


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return "nothing" if value is None else f"{type(value).__name__}"
