"""RLDS read against the answers drawn into a set of it, against TensorFlow, and against every kind of damage."""

import hashlib
import io
import json
import pickle
import shutil
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from encoders import every_sample
from PIL import Image
from records import checksum, delimited, example, leaf, write_rlds

from manipi.data.dataset import EpisodeSubset, Feature
from manipi.data.feed.loader import Loader
from manipi.data.feed.mixture import frames_of
from manipi.data.feed.sampler import Sampler, Stream
from manipi.data.open import open_dataset
from manipi.data.review.describe import describe_dataset
from manipi.data.review.filters import read_mask
from manipi.data.rlds.fields import RldsFields, droid_fields
from manipi.data.rlds.reader import RldsDataset, open_rlds
from manipi.data.rlds.tfrecord import Example
from manipi.errors import (
    BadValueError,
    ConfigError,
    DatasetFormatError,
    DatasetNotFoundError,
    MissingFeatureError,
    StorageError,
    UnknownNameError,
)
from manipi.records import from_json, to_json
from manipi.robots.franka import droid
from manipi.train.data import check_features

PLAIN = RldsFields(fps=10)
DROID = droid_fields("joint_position")
EXTERIOR = ("observation/exterior_image_1_left", "observation/exterior_image_2_left")
FIRST_EPISODE = 6
"""Episode e of the synthetic set is the one numbered 6 - e where it was made: 50 + 10 (6 - e) steps."""


@pytest.fixture(scope="module", autouse=True)
def indexes(tmp_path_factory):
    """The folder that indexes go to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANIPI_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def droidlike(shared_datasets):
    return shared_datasets / "synthetic_droid_rlds/droidlike/1.0.0"


@pytest.fixture(scope="module")
def bridge(shared_datasets):
    return shared_datasets / "octo_bridge_rlds/bridge_dataset"


@pytest.fixture
def copy(droidlike, tmp_path):
    """A copy of the synthetic set to damage."""
    folder = shutil.copytree(droidlike, tmp_path / "copy", copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return folder


def shown_index(images: np.ndarray) -> np.ndarray:
    """The number in the eight blocks at the top left, [n]."""
    return (images[:, 8, 8:136:16].mean(-1) > 128) @ (1 << np.arange(8))


UPRIGHT = {
    EXTERIOR[0]: lambda images: images,
    EXTERIOR[1]: lambda images: images[:, ::-1],
    "observation/wrist_image_left": lambda images: images[:, :, ::-1],
}
"""The second outside camera of the synthetic set is upside down, and the wrist's mirrored, to tell them apart."""

# ---- what is in them


@pytest.mark.parametrize("camera", UPRIGHT)
def test_every_frame_shows_its_index(droidlike, camera):
    dataset = open_rlds(droidlike, fields=PLAIN)
    rows = np.arange(dataset.num_frames)
    index = rows - dataset.starts[dataset.episode_of(rows)]
    np.testing.assert_array_equal(shown_index(UPRIGHT[camera](dataset.images(camera, rows))), index)


def test_without_a_map_every_feature_has_its_own_name(droidlike):
    dataset = open_rlds(droidlike, fields=PLAIN)
    e = FIRST_EPISODE - dataset.episode_of(np.arange(dataset.num_frames))
    i = np.arange(dataset.num_frames) - dataset.starts[FIRST_EPISODE - e]
    expected = np.repeat((1000 * e + i)[:, None], 7, axis=1)
    np.testing.assert_array_equal(dataset.column("observation/joint_position"), expected)
    np.testing.assert_array_equal(dataset.column("action_dict/joint_position"), expected + 1)
    assert dataset.column("observation/joint_position").dtype == np.float32
    assert dataset.column("is_last")[:, 0].tolist() == [int(row + 1 in dataset.ends) for row in range(300)]
    assert dataset.column("is_last").dtype == np.int64
    assert [(e.index, e.length, e.task) for e in dataset.episodes] == [
        (k, 50 + 10 * (6 - k), f"task {6 - k} 日本") for k in range(3)
    ]


def test_droid_is_what_its_robot_names(droidlike):
    robot = droid(action_space="joint_position")
    dataset = open_rlds(droidlike, fields=DROID)
    check_features(dataset, robot)
    assert dataset.fps == robot.control_hz
    (frame,) = frames_of(robot, 4, dataset, np.array([108]))
    np.testing.assert_array_equal(frame.actions[:, :7], np.repeat([[6109.0], [6110], [6110], [6110]], 7, axis=1))
    assert frame.action_valid.tolist() == [True, True, False, False]
    plain = open_rlds(droidlike, fields=PLAIN)
    for space in ("joint_position", "joint_velocity"):
        actions = open_rlds(droidlike, fields=droid_fields(space)).column("actions")
        parts = [plain.column(f"action_dict/{name}") for name in (space, "gripper_position")]
        np.testing.assert_array_equal(actions, np.concatenate(parts, axis=1))
    with pytest.raises(UnknownNameError, match="joint_position"):
        droid_fields("joint_positions")  # pyright: ignore[reportArgumentType]


def test_a_row_shows_one_outside_camera_and_one_instruction(droidlike):
    dataset, both = (
        open_rlds(droidlike, fields=DROID),
        open_rlds(droidlike, fields=droid_fields("joint_position", exterior="both")),
    )
    rows = np.arange(dataset.num_frames)
    images = dataset.images("exterior_image_1_left", rows)
    candidates = [both.images(name, rows) for name in ("exterior_image_1_left", "exterior_image_2_left")]
    second = np.array([np.array_equal(a, b) for a, b in zip(images, candidates[1], strict=True)])
    for row, image in enumerate(images):
        np.testing.assert_array_equal(image, candidates[int(second[row])][row])
    # Written out, so that another machine, Python or NumPy that drew otherwise would be found.
    assert second[:12].astype(int).tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 1, 0, 1]
    assert 120 < second.sum() < 180
    prompts = [dataset.prompt(row) for row in range(110)]
    assert set(prompts) == {"task 6 日本", "c"}
    assert 35 < prompts.count("c") < 75
    other = open_rlds(droidlike, fields=DROID, seed=1)
    assert [other.prompt(row) for row in range(110)] != prompts
    assert dataset.fingerprint not in (other.fingerprint, both.fingerprint)


@pytest.mark.parametrize(
    ("folder", "split"),
    [("synthetic_droid_rlds/droidlike", "train")] + [("octo_bridge_rlds/bridge_dataset", s) for s in ("train", "val")],
)
def test_every_value_is_tensorflows(shared_datasets, folder, split):
    golden = json.loads((Path(__file__).parent / "golden_tfds.json").read_text())[f"{Path(folder).name}-{split}"]
    dataset = open_rlds(shared_datasets / folder, fields=PLAIN, split=split)
    rows = np.arange(dataset.num_frames)
    values = {key: dataset.column(key).tobytes() for key, f in dataset.features.items() if f.kind == "vector"}
    values |= {camera: dataset.images(camera, rows).tobytes() for camera in dataset.cameras}
    for name in (name for name in golden if name.startswith("language_instruction")):
        one = open_rlds(dataset.root, fields=RldsFields(fps=1, prompts=(name,)), split=split)
        values[name] = "\n".join(one.prompt(row) for row in rows.tolist()).encode()
    assert {name: hashlib.sha256(value).hexdigest()[:16] for name, value in values.items()} == golden


def test_a_part_of_it_shows_what_the_whole_shows(droidlike):
    dataset = open_rlds(droidlike, fields=DROID)
    subset = EpisodeSubset(dataset, [2, 0])
    row = dataset.episodes[2].start + 5
    np.testing.assert_array_equal(
        subset.images("exterior_image_1_left", np.array([5])), dataset.images("exterior_image_1_left", np.array([row]))
    )
    assert subset.prompt(5) == dataset.prompt(row)
    assert subset.episodes[0].key == dataset.episodes[2].key == "x--/nfs/r2d2/success/4.h5"


# ---- sets made here

TEXTS = {"language_instruction": leaf("text"), "language_instruction_2": leaf("text")}


def jpeg(value: int, size: tuple[int, int] = (16, 24)) -> bytes:
    return encoded(np.full((*size, 3), value, np.uint8), "JPEG")


def encoded(image: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


STEPS = {
    "observation/state": leaf("tensor", (3,)),
    "observation/image": leaf("image", (16, 24, 3), "uint8"),
    "action": leaf("tensor", (2,), "float64"),
    "count": leaf("tensor", (), "int64"),
    "language_instruction": leaf("text"),
}
COUNTS = (0, -1, 127, 128, -(1 << 62), (1 << 63) - 1)


def make_episode(length: int, **changes) -> dict:
    content = {
        "steps/observation/state": [float(i) for i in range(3 * length)],
        "steps/observation/image": [jpeg(10 * i) for i in range(length)],
        "steps/action": [0.5] * (2 * length),
        "steps/count": list(COUNTS[:length]),
        "steps/language_instruction": ["öffne"] * length,
        "episode_metadata/file_path": ["a/success/b"],
    }
    return content | {f"steps/{key.replace('__', '/')}": value for key, value in changes.items()}


@pytest.fixture
def make(tmp_path):
    """`make(episode, episode, …)` writes them as a dataset, and opens it without a map."""

    def make(*episodes, fields: RldsFields = PLAIN, steps=STEPS, **options) -> RldsDataset:
        root = tmp_path / f"{len(list(tmp_path.iterdir()))}/1.0.0"
        write_rlds(root, steps, episodes, metadata={"file_path": leaf("text")}, **options)
        return open_rlds(root, fields=fields, show=False)

    return make


def test_integers_of_all_sizes(make):
    dataset = make(make_episode(6), make_episode(2))
    assert dataset.column("count")[:, 0].tolist() == [*COUNTS, *COUNTS[:2]]


def test_lists_that_are_not_packed_or_come_in_pieces_are_the_same():
    floats = [delimited(1, struct.pack("<f", 1.5)), b"\x0d" + struct.pack("<f", -2), delimited(1, struct.pack("<f", 3))]
    integers = [b"\x08\x05", delimited(1, b"\x01\x80\x01"), b"\x08\xac\x02"]
    lists = {"f": delimited(2, b"".join(floats)), "i": delimited(3, b"".join(integers)), "none": b""}
    entries = [delimited(1, delimited(1, k.encode()) + delimited(2, v)) for k, v in lists.items()]
    found = Example(delimited(1, b"".join(entries)))
    assert found.numbers("f").tolist() == [1.5, -2, 3]
    assert found.numbers("i").tolist() == [5, 1, 128, 300]
    assert found.numbers("none").size == 0
    assert found.texts("none") == []


def test_several_files_are_one_dataset(make):
    dataset = make(*(make_episode(n) for n in (2, 3, 1, 4)), shards=[1, 0, 2, 1])
    assert [(e.index, e.start, e.length) for e in dataset.episodes] == [(0, 0, 2), (1, 2, 3), (2, 5, 1), (3, 6, 4)]
    rows = np.array([9, 0, 3, 5])
    brightness = dataset.images("observation/image", rows).mean((1, 2, 3))
    np.testing.assert_allclose(brightness, [30, 0, 10, 0], atol=1)


def test_png_is_read_exactly(make):
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    dataset = make(make_episode(1, observation__image=[encoded(image, "PNG")]))
    np.testing.assert_array_equal(dataset.images("observation/image", np.array([0]))[0], image)


def test_a_size_left_open_is_that_of_the_first_picture(make):
    steps = STEPS | {"observation/image": leaf("image", (-1, -1, 3), "uint8")}
    assert make(make_episode(2), steps=steps).features["observation/image"].shape == (16, 24, 3)


def test_what_no_key_can_show_is_left_out(make):
    strange = {
        "depth": leaf("image", (16, 24, 1), "uint16"),
        "raw": leaf("tensor", (4, 4, 3), "uint8"),
        "points": leaf("tensor", (-1, 3)),
        "packed": {"tensor": {"shape": {"dimensions": ["3"]}, "dtype": "float32", "encoding": "zlib"}},
        "inner": {"sequence": {"feature": leaf("tensor", (3,)), "length": "-1"}},
    }
    dataset = make(make_episode(1), steps=STEPS | strange)
    assert dataset.features.keys() == STEPS.keys()
    with pytest.raises(MissingFeatureError, match="depth"):
        make(make_episode(1), steps=STEPS | strange, fields=RldsFields(fps=1, images={"top": ("depth",)}))


def test_depth_in_a_tensor_is_no_vector(make):
    """Of 384 numbers; a map that names it still gets them."""
    steps, depth = STEPS | {"observation/depth": leaf("tensor", (16, 24))}, [1.5] * (2 * 16 * 24)
    dataset = make(make_episode(2, observation__depth=depth), steps=steps)
    assert dataset.features["observation/depth"] == Feature(kind="depth", shape=(16, 24, 1), dtype="float32")
    assert dataset.cameras == ["observation/image"]
    with pytest.raises(MissingFeatureError, match="found depth 'observation/depth'"):
        dataset.column("observation/depth")
    fields = RldsFields(fps=1, vectors={"far": ("observation/depth",)})
    assert make(make_episode(2, observation__depth=depth), steps=steps, fields=fields).column("far").shape == (2, 384)


def test_only_the_episodes_that_a_map_leaves_in(make):
    fields = RldsFields(fps=10, only={"episode_metadata/file_path": "success"})
    failed = make_episode(2) | {"episode_metadata/file_path": ["a/failure/b"]}
    dataset = make(failed, make_episode(3), failed, make_episode(1), fields=fields)
    assert [(e.index, e.start, e.length) for e in dataset.episodes] == [(1, 0, 3), (3, 3, 1)]
    np.testing.assert_allclose(dataset.images("observation/image", np.arange(3)).mean((1, 2, 3)), [0, 10, 20], atol=1)
    with pytest.raises(DatasetNotFoundError, match=r"'success' in episode_metadata/file_path[\s\S]*none in 1 records"):
        make(failed, fields=fields)


def test_prompts_may_change_within_an_episode_and_be_empty(make):
    fields = RldsFields(fps=10, prompts=tuple(TEXTS))
    texts = {"language_instruction": ["a", "", "", "d"], "language_instruction_2": ["", "b", "", "d"]}
    dataset = make(make_episode(4, **texts), steps=STEPS | TEXTS, fields=fields)
    assert [dataset.prompt(row) for row in range(4)] == ["a", "b", "", "d"]
    assert dataset.episodes[0].task == "a"


def test_cameras_that_take_turns_have_one_size(make):
    steps = STEPS | {"other": leaf("image", (8, 8, 3), "uint8")}
    fields = RldsFields(fps=10, images={"top": ("observation/image", "other")})
    dataset = make(*[make_episode(4, other=[jpeg(1, (8, 8))] * 4)] * 5, steps=steps, fields=fields)
    with pytest.raises(DatasetFormatError, match=r"\(16, 24, 3\)[\s\S]*\(8, 8, 3\)[\s\S]*episode \d, frame \d"):
        dataset.images("top", np.arange(20))


# ---- maps and ranges


def test_a_map_travels_as_json():
    assert from_json(json.loads(json.dumps(to_json(DROID))), (RldsFields,), "here") == DROID


def test_a_map_beside_the_files_is_found(make):
    made = make(make_episode(2))
    with pytest.raises(ConfigError, match=r"rlds_fields\.json"):
        open_dataset(made.root)
    (made.root / "rlds_fields.json").write_text('{"fps": 7, "vectors": {"both": ["action", "count"]}}')
    dataset = open_dataset(made.root.parent)
    assert dataset.fps == 7
    assert dataset.column("both").tolist() == [[0.5, 0.5, 0], [0.5, 0.5, -1]]
    (made.root / "rlds_fields.json").write_text("[15]")
    with pytest.raises(DatasetFormatError, match="expected a JSON object"):
        open_dataset(made.root)
    (made.root / "rlds_fields.json").write_text('{"fps": 7, "vector": {}}')
    with pytest.raises(ConfigError, match="unexpected"):
        open_dataset(made.root)
    with pytest.raises(ConfigError, match="positive rate"):
        RldsFields(fps=0)


@pytest.mark.parametrize(
    "fields",
    [
        RldsFields(fps=1, vectors={"actions": ("acton",)}),
        RldsFields(fps=1, vectors={"actions": ("observation/image",)}),
        RldsFields(fps=1, images={"top": ("observation/imge",)}),
        RldsFields(fps=1, prompts=("instruction",)),
        RldsFields(fps=1, episode_key=("episode_metadata/path",)),
        RldsFields(fps=1, only={"file_path": "success"}),
    ],
)
def test_a_map_that_names_nothing(make, fields):
    with pytest.raises(MissingFeatureError, match=r"features\.json"):
        make(make_episode(1), fields=fields)


def test_ranges_keep_what_they_name(droidlike, tmp_path):
    dataset = open_rlds(droidlike, fields=DROID)
    keys = [episode.key for episode in dataset.episodes]
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps({keys[0]: [[0, 3], [5, 7]], keys[2]: [[88, 1000], [-4, 1], [4, 4]], "other": [[0, 9]]}))
    mask = read_mask(path, dataset)
    assert mask.shape == (300,)
    # openpi's rule, one look-up per frame.
    table = {f"{k}--{t}" for k, ranges in json.loads(path.read_text()).items() for a, b in ranges for t in range(a, b)}
    expected = [f"{e.key}--{t}" in table for e in dataset.episodes for t in range(e.length)]
    np.testing.assert_array_equal(mask, expected)
    assert mask.sum() == 8
    path.write_text('{"other": [[0, 9]]}')
    with pytest.raises(ConfigError, match="success/6"):
        read_mask(path, dataset)
    with pytest.raises(DatasetFormatError, match="absent"):
        read_mask(tmp_path / "absent.json", dataset)


# ---- the index


def test_workers_open_the_index_that_is_there(droidlike):
    dataset = open_rlds(droidlike, fields=DROID)
    sampler = Sampler(Stream(np.arange(300), seed=0, fingerprint=dataset.fingerprint), 4)
    keys = {"cameras": dataset.cameras, "state_keys": ["joint_position"]}
    batches = []
    for workers in (0, 2):
        with Loader(partial(every_sample, dataset, **keys), sampler, num_workers=workers) as loader:
            batches.append([batch for _, (_, batch, _) in zip(range(3), loader, strict=False)])
    for ours, theirs in zip(*batches, strict=True):
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])
    assert len(pickle.dumps(dataset)) < 2_000


def test_the_index_is_made_once_and_again_when_the_files_change(copy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MANIPI_HOME", str(tmp_path / "home"))
    first = open_rlds(copy, fields=DROID)
    assert "index droidlike: 100%" in capsys.readouterr().err
    again = open_rlds(copy, fields=droid_fields("joint_position", exterior="both"), seed=3)
    assert capsys.readouterr().err == "", "the same features in another arrangement"
    file = next(copy.glob("*.tfrecord*"))
    data = bytearray(file.read_bytes())
    at = data.index(np.full(7, 6000, "<f4").tobytes())
    data[at : at + 4] = struct.pack("<f", 6000.5)
    (length,) = struct.unpack("<Q", data[:8])
    data[12 + length : 16 + length] = checksum(bytes(data[12 : 12 + length]))
    file.write_bytes(data)
    changed = open_rlds(copy, fields=DROID)
    assert "index droidlike" in capsys.readouterr().err
    assert changed.column("joint_position")[0, 0] == 6000.5
    assert first.column("joint_position")[0, 0] == 6000
    assert len({dataset.fingerprint for dataset in (first, again, changed)}) == 3


def test_its_fingerprint_does_not_depend_on_the_folder(copy, droidlike):
    assert open_rlds(copy, fields=DROID).fingerprint == open_rlds(droidlike, fields=DROID).fingerprint


def test_nothing_of_the_pictures_stays_in_memory(droidlike):
    dataset = open_rlds(droidlike, fields=PLAIN)
    dataset.images(EXTERIOR[0], np.arange(300))
    for values in (*dataset._spans.values(), dataset.column("action"), dataset._index.prompts):
        assert isinstance(values.base, np.memmap)
    assert not dataset.column("action").flags.writeable


def test_a_full_disk(copy, tiny_disk, monkeypatch):
    (tiny_disk / "filler").write_bytes(bytes(1 << 20)[: (1 << 20) - (64 << 10)])
    monkeypatch.setenv("MANIPI_HOME", str(tiny_disk))
    with pytest.raises(StorageError, match="MANIPI_HOME"):
        open_rlds(copy, fields=PLAIN)
    assert list(tiny_disk.rglob("*.partial")) == []


# ---- which folder


def test_a_folder_with_one_version_or_several(copy, tmp_path):
    parent = tmp_path / "droid"
    parent.mkdir()
    copy.rename(parent / "1.0.0")
    assert open_rlds(parent, fields=PLAIN).root == parent / "1.0.0"
    shutil.copytree(parent / "1.0.0", parent / "1.0.1")
    for opened in (open_dataset, open_rlds):
        with pytest.raises(ConfigError, match=r"2: 1\.0\.0, 1\.0\.1"):
            opened(parent)
    with pytest.raises(DatasetNotFoundError, match=r"features\.json"):
        open_rlds(tmp_path / "nothing", fields=PLAIN)
    with pytest.raises(DatasetNotFoundError, match="another folder"):
        open_rlds(tmp_path, fields=PLAIN)


def test_splits(bridge):
    train, val = (open_rlds(bridge, split=split) for split in ("train", "val"))
    assert (train.num_frames, val.num_frames) == (250, 250)
    assert train.fingerprint != val.fingerprint
    with pytest.raises(UnknownNameError, match=r"one of: train, val[\s\S]*'valid'[\s\S]*did you mean val"):
        open_rlds(bridge, split="valid")


def test_a_known_dataset_is_described_without_a_map(bridge):
    summary = describe_dataset(open_dataset(bridge))
    assert (summary.version, summary.fps, summary.num_episodes) == ("RLDS bridge_dataset 1.0.0", 5, 25)
    assert summary.tasks["put carrot on plate"] == 8
    assert 'State("state", 7)' in summary.robot


# ---- damage


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_metadata_that_are_missing_or_broken(copy, name):
    (copy / name).write_text("{")
    with pytest.raises(DatasetFormatError, match=name):
        open_rlds(copy, fields=PLAIN)
    (copy / name).write_text('{"splits": [{}]}')
    with pytest.raises(DatasetFormatError, match=name):
        open_rlds(copy, fields=PLAIN)
    (copy / name).unlink()
    (copy / "rlds_fields.json").write_text('{"fps": 15}')
    with pytest.raises(DatasetFormatError, match=f"nothing[\\s\\S]*{name}"):
        open_dataset(copy)


def second_record(data: bytes) -> int:
    """Where it begins."""
    return struct.unpack("<Q", data[:8])[0] + 16


DAMAGE = {
    "in the data": (lambda d, at: d[: at + 500] + bytes([d[at + 500] ^ 4]) + d[at + 501 :], "checksum"),
    "in its length": (lambda d, at: d[: at + 1] + bytes([d[at + 1] ^ 1]) + d[at + 2 :], "its length"),
    "cut in the data": (lambda d, at: d[: at + 500], "end of the file after 488"),
    "cut in the header": (lambda d, at: d[: at + 5], "end of the file after 5"),
    "cut before the last checksum": (lambda d, at: d[:-2], "end of the file after"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record(copy, damage):
    file = next(copy.glob("*.tfrecord*"))
    data = file.read_bytes()
    change, message = DAMAGE[damage]
    file.write_bytes(change(data, second_record(data)))
    record = (
        f"record 1 at byte {second_record(data)}" if damage != "cut before the last checksum" else "record 2 at byte"
    )
    with pytest.raises(
        DatasetFormatError, match=f"{message}[\\s\\S]*{file.name}, {record}|{file.name}, {record}.*{message}"
    ):
        open_rlds(copy, fields=PLAIN)


def test_a_file_that_is_missing_or_has_too_few_records(copy):
    file = next(copy.glob("*.tfrecord*"))
    data = file.read_bytes()
    file.write_bytes(data[: second_record(data)])
    with pytest.raises(DatasetFormatError, match=r"3 records[\s\S]*found 1"):
        open_rlds(copy, fields=PLAIN)
    file.unlink()
    with pytest.raises(DatasetFormatError, match=f"nothing of this name[\\s\\S]*{file.name}"):
        open_rlds(copy, fields=PLAIN)


def test_a_record_file_of_another_format(copy):
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "array_record"}))
    with pytest.raises(DatasetFormatError, match="array_record"):
        open_rlds(copy, fields=PLAIN)


def test_a_picture_that_is_none(make):
    pictures = [jpeg(1), b"no picture", jpeg(3)[:200], b"\x89PNG nothing", jpeg(1, (8, 8)), b""]
    dataset = make(make_episode(6, observation__image=pictures))
    assert dataset.images("observation/image", np.array([0])).shape == (1, 16, 24, 3)
    for row in range(1, 6):
        with pytest.raises(DatasetFormatError, match=rf"made-train[\s\S]*episode 0, frame {row}"):
            dataset.images("observation/image", np.array([row]))


def test_a_file_that_is_cut_after_it_was_opened(make):
    dataset = make(make_episode(3))
    (file,) = dataset.root.glob("*.tfrecord*")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DatasetFormatError, match=r"made-train[\s\S]*episode 0, frame 2"):
        dataset.images("observation/image", np.array([2]))


def test_a_number_that_is_none(make):
    dataset = make(make_episode(2), make_episode(2, action=[0.5, 0.5, float("nan"), 0.5]))
    with pytest.raises(BadValueError, match="episode 1, frame 1"):
        dataset.column("action")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": [0.5] * 5}, "5 numbers in 'action', which is of size 2"),
        ({"action": [0.5] * 4}, "same number of steps"),
        ({"language_instruction": ["a"]}, "same number of steps"),
        ({"action": ["text"] * 3}, "not numbers"),
        ({"observation__image": [1, 2, 3]}, "not bytes"),
        ({"count": [1.5, 2.5, 3.5]}, "count"),
        ({"language_instruction": [b"\xff"] * 3}, "utf-8"),
        (
            {k: [] for k in ("observation__state", "observation__image", "action", "count", "language_instruction")},
            "at least one",
        ),
    ],
)
def test_a_record_that_is_not_what_features_json_says(make, changes, message):
    with pytest.raises(DatasetFormatError, match=rf"{message}[\s\S]*record 1 at byte \d+, episode 1"):
        make(make_episode(2), make_episode(3, **changes))


def test_a_record_that_lacks_a_feature(make):
    episode = make_episode(2)
    del episode["steps/action"]
    with pytest.raises(DatasetFormatError, match=r"no 'steps/action', only[\s\S]*episode 0"):
        make(episode)


def test_any_cut_message_is_an_error_or_shorter():
    data = example(make_episode(2))
    for end in range(0, len(data), 7):
        try:
            found = Example(data[:end])
            for key in ("steps/action", "steps/count"):
                found.numbers(key)
        except ValueError:
            continue
        assert end == 0 or found is None
