import time

import numpy as np
import pytest

from manipi.errors import BadValueError, ObservationError
from manipi.robots import Gripper, Joints, Robot, State
from manipi.transforms.observation import ReadRobot, check_content

ROBOT = Robot(
    name="arm",
    cameras={"base": "image", "left_wrist": "wrist_image"},
    state=(State("joints", 3), State("gripper", 1)),
    actions=(Joints(3), Gripper()),
)
NEXT = "send what the robot's spec says (server metadata, `robot`), or correct the Robot(...)"


def observation(**changes) -> dict:
    """A good one; a change to None removes the key."""
    good = {
        "image": np.zeros((4, 6, 3), np.uint8),
        "wrist_image": np.ones((5, 5, 3), np.uint8),
        "joints": np.array([1, 2, 3], np.float64),
        "gripper": 0.5,
        "prompt": "reach it",
    }
    return {key: value for key, value in (good | changes).items() if value is not None}


def read(**changes) -> dict:
    return ReadRobot(ROBOT).encode(observation(**changes))


def test_a_good_observation():
    sample = read()
    assert sample.keys() == {"image/base", "image/left_wrist", "state", "prompt"}
    assert sample["state"].dtype == np.float32
    assert sample["state"].tolist() == [1, 2, 3, 0.5]


def test_the_full_text_for_a_missing_key():
    with pytest.raises(ObservationError) as error:
        read(joints=None, joint=np.zeros(3))
    assert str(error.value) == (
        "expected 3 finite numbers under 'joints'\n"
        "   found only gripper, image, joint, prompt, wrist_image (is it 'joint'?)\n"
        "   where observation key 'joints' of robot 'arm'\n"
        f"    next {NEXT}"
    )


def test_the_full_text_for_a_float_picture_that_is_not_from_0_to_1():
    with pytest.raises(ObservationError) as error:
        read(wrist_image=np.linspace(0, 255, 36, dtype=np.float32).reshape(3, 3, 4))
    assert str(error.value) == (
        "expected a picture [height, width, 3] or [3, height, width], uint8 or float in [0, 1]\n"
        "   found float32 from 0 to 255\n"
        "   where observation key 'wrist_image' of robot 'arm'\n"
        f"    next {NEXT}"
    )


def test_the_full_text_for_nan():
    with pytest.raises(ObservationError) as error:
        read(joints=np.array([1.0, np.nan, np.inf]))
    assert str(error.value) == (
        "expected 3 finite numbers\n"
        "   found nan at index 1\n"
        "   where observation key 'joints' of robot 'arm'\n"
        f"    next {NEXT}"
    )


def deep(depth):
    value = [1.0]
    for _ in range(depth):
        value = [value]
    return value


BAD = {
    "no picture": ({"image": None}, "image", r"under 'image'[\s\S]*is it 'wrist_image'"),
    "three by width by three": ({"image": np.zeros((3, 6, 3), np.uint8)}, "image", "may be either axis of size 3"),
    "channels between": ({"image": np.zeros((4, 3, 6), np.uint8)}, "image", r"uint8 \[4, 3, 6\]"),
    "integers": ({"image": np.zeros((4, 6, 3), np.int64)}, "image", r"int64 \[4, 6, 3\]"),
    "a float below 0": ({"image": np.full((4, 6, 3), -0.5)}, "image", "float64 from -0.5 to -0.5"),
    "a picture with NaN": ({"image": np.full((4, 6, 3), np.nan)}, "image", "float64 from nan to nan"),
    "twice": ({"observation": {"x": 1}, "observation/x": 1}, "observation/x", "both nested and flat"),
    "gray": ({"image": np.zeros((4, 6), np.uint8)}, "image", r"uint8 \[4, 6\]"),
    "with alpha": ({"image": np.zeros((4, 6, 4), np.uint8)}, "image", r"uint8 \[4, 6, 4\]"),
    "empty picture": ({"image": np.zeros((0, 6, 3), np.uint8)}, "image", r"uint8 \[0, 6, 3\]"),
    "a batch": ({"image": np.zeros((1, 4, 6, 3), np.uint8)}, "image", r"uint8 \[1, 4, 6, 3\]"),
    "one row without end": ({"image": np.zeros((1, 16_385, 3), np.uint8)}, "image", r"uint8 \[1, 16385, 3\]"),
    "nested lists": ({"image": [[[0, 0, 0]]]}, "image", "found list"),
    "too few joints": ({"joints": np.zeros(2)}, "joints", r"float64 \[2\]"),
    "joints as a row": ({"joints": np.zeros((1, 3))}, "joints", r"float64 \[1, 3\]"),
    "joints as text": ({"joints": np.array(["a", "b", "c"])}, "joints", r"<U1 \[3\]"),
    "joints as truth": ({"joints": np.zeros(3, bool)}, "joints", r"bool \[3\]"),
    "ragged joints": ({"joints": [[1.0], [1.0, 2.0]]}, "joints", "inhomogeneous"),
    "two grippers": ({"gripper": np.zeros(2)}, "gripper", r"float64 \[2\]"),
    "infinite": ({"gripper": -np.inf}, "gripper", "found -inf at index 0"),
    "more than float32 holds": ({"gripper": 1e300}, "gripper", r"found 1e\+300 at index 0"),
    "no prompt": ({"prompt": None}, "prompt", "found nothing"),
    "a number for a prompt": ({"prompt": 3}, "prompt", "found int"),
    "two prompts": ({"prompt": np.array(["a", "b"])}, "prompt", r"found <U1 \[2\]"),
    "a long prompt": ({"prompt": "a" * 2_049}, "prompt", "found 2,049 characters"),
    "long bytes for a prompt": ({"prompt": b"a" * 9_000}, "prompt", "found 9,000 bytes"),
    "a prompt of 2,049 characters in bytes": ({"prompt": b"a" * 2_049}, "prompt", "found 2,049 characters"),
    "an array of a long prompt": ({"prompt": np.array(["a" * 2_049])}, "prompt", r"<U2049 \[1\]"),
    "an array of long bytes": ({"prompt": np.array(b"a" * 9_000)}, "prompt", r"S9000 \[\]"),
    "a scalar of long bytes": ({"prompt": np.bytes_(b"a" * 9_000)}, "prompt", "found bytes_"),
    "characters that are none": ({"prompt": np.frombuffer(b"\xff\xff\x11\x00", "<U1")}, "prompt", "0x11ffff"),
    "half a surrogate pair": ({"prompt": np.array("\ud800")}, "prompt", "0xd800"),
    "one long text beside numbers": ({"joints": [b"a" * 10**6, 0, 0]}, "joints", "found a list with bytes in it"),
    "a text array beside numbers": ({"joints": [np.array("a"), 0, 0]}, "joints", r"a list with <U1 \[\] in it"),
    "many numbers": ({"joints": [0] * 10**6}, "joints", "found a list of more numbers"),
    "lists in lists": ({"joints": deep(2_000)}, "joints", "found"),
    "a map for joints": ({"joints": [{}]}, "joints", "found a list with dict in it"),
    "a prompt in Latin-1": ({"prompt": "öffne".encode("latin-1")}, "prompt", "can't decode byte 0xf6"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_observations(case):
    changes, key, message = BAD[case]
    with pytest.raises(ObservationError, match=message) as error:
        read(**changes)
    assert error.value.where == f"observation key {key!r} of robot 'arm'"
    assert error.value.next == NEXT


@pytest.mark.parametrize(
    "prompt", ["öffne", "öffne".encode(), np.array("öffne"), np.array(["öffne"]), np.str_("öffne")]
)
def test_prompts_in_every_shape_that_the_wire_and_files_give_them(prompt):
    assert read(prompt=prompt)["prompt"] == "öffne"


@pytest.mark.parametrize("gripper", [1, 1.0, np.float32(1), np.array(1.0), np.array([1]), [1.0]])
def test_one_number_in_every_shape(gripper):
    assert read(gripper=gripper)["state"][3] == 1


def test_the_default_prompt_is_used_where_none_comes():
    robot = Robot(name="arm", cameras={"base": "image"}, state=(), actions=(Joints(1),), default_prompt="tidy up")
    pictures = {"image": np.zeros((2, 2, 3), np.uint8)}
    assert ReadRobot(robot).encode(pictures)["prompt"] == "tidy up"
    assert ReadRobot(robot).encode(pictures | {"prompt": "stop"})["prompt"] == "stop"
    assert ReadRobot(robot).encode(pictures)["state"].shape == (0,)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_pictures_of_every_layout_are_one(dtype):
    picture = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    sent = picture if dtype == np.uint8 else ((picture + 0.5) / 255).astype(dtype)
    for layout in (sent, np.moveaxis(sent, -1, 0)):
        found = read(image=layout)["image/base"]
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, picture)


def test_floats_are_cut_rather_than_rounded_as_the_reference_does():
    assert read(image=np.full((4, 6, 3), 0.999, np.float32))["image/base"].max() == 254


def test_keys_may_be_nested():
    robot = Robot(
        name="arm",
        cameras={"base": "images/front"},
        state=(State("arm/left/joints", 2), State("gripper", 1)),
        actions=(Joints(1),),
    )
    picture = np.ones((4, 6, 3), np.uint8)
    nested = {"images": {"front": picture}, "arm": {"left": {"joints": [1.0, 2.0]}}, "gripper": 3.0, "prompt": "go"}
    flat = {"images/front": picture, "arm/left/joints": [1.0, 2.0], "gripper": 3.0, "prompt": "go"}
    for sent in (nested, flat, flat | {"arm": {"right": {"joints": [0.0]}}}):
        sample = ReadRobot(robot).encode(sent)
        assert sample["state"].tolist() == [1, 2, 3]
        assert sample["image/base"] is picture
    del nested["arm"]["left"]["joints"]
    with pytest.raises(ObservationError, match="only gripper, images/front, prompt"):
        ReadRobot(robot).encode(nested)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_robot_is_sent_what_is_no_number(value):
    actions = np.zeros((3, 4))
    actions[1, 2] = value
    with pytest.raises(BadValueError, match=f"found {value} at step 1, dimension 2"):
        ReadRobot(ROBOT).decode(actions, observation())


@pytest.mark.parametrize(
    "observation",
    [
        {"k" * 257: 1},
        {b"bytes" * 10**6: 1},
        {"a": {b"bytes" * 10**6: 1}},
        {"a": {"\x1b\n": {"b" * 250: 1}}},
        {f"joints{i}" * 20: 1 for i in range(3_000)},
        {"\x1b[2J\n": 1},
    ],
    ids=range(6),
)
def test_keys_of_strangers_are_measured_and_repeated_in_part(observation):
    began = time.process_time()
    with pytest.raises(ObservationError) as error:
        ReadRobot(ROBOT).encode(observation)
    assert time.process_time() - began < 1
    parts = (error.value.expected, error.value.found, error.value.where, error.value.next)
    assert sum(map(len, parts)) < 4_500
    assert all(part.isprintable() for part in parts)


def test_maps_in_maps_have_an_end():
    value = {}
    for _ in range(10**4):
        value = {"": value}
    with pytest.raises(ObservationError, match="at most 256 characters"):
        ReadRobot(ROBOT).encode({"image": value})


def test_texts_are_looked_at_wherever_they_are():
    bad = np.frombuffer(b"\x00\x00\x11\x00", "<U1")
    good = {"a": np.array(["öffne", "🤖"]), "b": [{"c": np.array("", ">U3")}], "d": np.zeros(3), "e": np.zeros(0, "U2")}
    check_content(good)
    for value in (bad, bad.byteswap().view(bad.dtype.newbyteorder()), [bad], {"c": [{"d": bad}]}, np.array("\udfff")):
        with pytest.raises(ObservationError, match="characters of Unicode") as error:
            check_content({**good, "f\n": value})
        assert error.value.where == r"observation key 'f\n'"


def test_how_deep_an_observation_may_be():
    check_content({"a": deep(62)})
    for value in (deep(63), [{"b": deep(70)}], {"b": deep(10**5)}):
        with pytest.raises(ObservationError, match="at most 64 deep"):
            check_content({"a": value})


def test_the_part_that_is_read():
    sample = observation(extra=np.zeros(9))
    nested = {"image": sample.pop("image"), **sample}
    assert ReadRobot(ROBOT).read_part(nested).keys() == observation().keys()
    robot = Robot(name="arm", cameras={"base": "images/front/0"}, state=(), actions=(Joints(1),))
    for sent in ({"images/front/0": 1}, {"images": {"front/0": 1}}, {"images/front": {"0": 1}}):
        assert ReadRobot(robot).read_part({**sent, "images/x": 2, "y": {"z": 3}}) == {"images/front/0": 1}
    assert ReadRobot(robot).read_part({"images": {"front/1": 1}, "images/front": {"1": 1}}) == {}
