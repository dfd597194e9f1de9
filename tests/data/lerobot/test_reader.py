"""Real and synthetic LeRobot datasets against what lerobot itself returned, and against answers in the pixels."""

import io
import json
import pickle
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.data.addressed import CAMERA, LENGTHS, addresses, edit_column, edit_feature, edit_info, write_set

from manipi.data.dataset import frames
from manipi.data.open import open_dataset
from manipi.data.review.check import check_dataset
from manipi.errors import DatasetFormatError

GOLDEN = [
    ("open50_lerobot_v3", "actions", "state", "image"),
    ("g1_bottle_lerobot_v30", "action", "observation.state", "observation.images.cam_high"),
]
SYNTHETIC = ["lerobot_v21", "lerobot_v30", "lerobot_v30_multi", "lerobot_v30_image"]


@pytest.mark.parametrize(("name", "action", "state", "camera"), GOLDEN)
def test_equals_lerobot(shared_datasets, name, action, state, camera):
    dataset = open_dataset(shared_datasets / name)
    golden = np.load(shared_datasets / name / "golden_lerobot_0.4.4.npz")
    samples = sorted({key.split("/")[0] for key in golden.files}, key=int)
    rows = np.array([golden[f"{sample}/index"] for sample in samples])
    keys = {"cameras": [camera], "state_keys": [state], "action_key": action}
    for sample, frame in zip(samples, frames(dataset, rows, horizon=16, **keys), strict=True):
        np.testing.assert_array_equal(frame.actions, golden[f"{sample}/{action}"])
        np.testing.assert_array_equal(frame.action_valid, ~golden[f"{sample}/{action}_is_pad"])
        np.testing.assert_array_equal(frame.observation[state], golden[f"{sample}/{state}"])
        assert (frame.episode, frame.index) == (golden[f"{sample}/episode_index"], golden[f"{sample}/frame_index"])
        assert frame.prompt == str(golden[f"{sample}/task"])
        blocks = frame.observation[camera].reshape(60, 8, 80, 8, 3).mean((1, 3)) / 255
        np.testing.assert_allclose(blocks.transpose(2, 0, 1), golden[f"{sample}/img60x80"], atol=2e-6)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_pictures_are_those_of_the_row(shared_datasets, name):
    dataset = open_dataset(shared_datasets / f"synthetic_{name}")
    assert [episode.length for episode in dataset.episodes] == [40 + 7 * e for e in range(6)]
    rows = np.concatenate([np.random.default_rng(0).permutation(dataset.num_frames)[:60], [344, 0, 0, 39, 40, 41]])
    expected = rows - dataset.starts[dataset.episode_of(rows)]
    for camera in dataset.cameras:
        np.testing.assert_array_equal(written_numbers(dataset.images(camera, rows)), expected)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_columns_and_prompts(shared_datasets, name):
    dataset = open_dataset(shared_datasets / f"synthetic_{name}")
    row = dataset.episodes[3].start + 5
    np.testing.assert_allclose(
        dataset.column("observation.state")[row], np.sin(0.05 * 5 + np.arange(14) + 3), atol=1e-6
    )
    np.testing.assert_allclose(dataset.column("action")[row], np.sin(0.05 * 6 + np.arange(14) + 3), atol=1e-6)
    assert dataset.column("frame_index")[row] == 5
    assert dataset.column("frame_index").dtype == np.int64
    assert dataset.prompt(row) == dataset.episodes[3].task == "open the drawer"
    assert dataset.features["action"].names == tuple(f"j{i}" for i in range(14))


def test_versions_agree(shared_datasets):
    old, new = (open_dataset(shared_datasets / f"g1_bottle_lerobot_{version}") for version in ("v21", "v30"))
    assert old.features == new.features
    assert old.episodes == new.episodes
    for key in ("observation.state", "action"):
        np.testing.assert_array_equal(old.column(key), new.column(key))
    rows = np.array([1042, 70, 71, 500])
    camera = old.cameras[0]
    np.testing.assert_array_equal(old.images(camera, rows), new.images(camera, rows))


def test_version_2_0(shared_datasets, tmp_path):
    root = tmp_path / "v20"
    shutil.copytree(shared_datasets / "synthetic_lerobot_v21", root, copy_function=shutil.copyfile)
    (root / "meta").chmod(0o755)
    info = json.loads((root / "meta/info.json").read_text()) | {"codebase_version": "v2.0"}
    info["features"]["action"]["names"] = {"motors": [f"m{i}" for i in range(14)]}
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/episodes_stats.jsonl").unlink()
    dataset = open_dataset(root)
    assert dataset.num_frames == 345
    assert dataset.features["action"].names[13] == "m13"


@pytest.mark.parametrize("name", ["synthetic_lerobot_v21", "synthetic_lerobot_v30", "synthetic_lerobot_v30_image"])
def test_fingerprint_and_pickling(shared_datasets, tmp_path, name):
    dataset = open_dataset(shared_datasets / name)
    copy = tmp_path / "elsewhere"
    shutil.copytree(dataset.root, copy, copy_function=shutil.copyfile)
    again = pickle.loads(pickle.dumps(dataset))
    assert dataset.fingerprint == open_dataset(copy).fingerprint == again.fingerprint


def written_numbers(images: np.ndarray) -> np.ndarray:
    """The frame numbers in the top-left corners, as black or white blocks of 24 pixels."""
    bits = images[:, 12, 12 : 24 * 8 : 24].mean(-1) > 127
    return (bits << np.arange(8)).sum(-1)


# What others write --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["v2.1", "v3.0"])
def version(request):
    return request.param


EVERYTHING = [(frame, e) for e, length in enumerate(LENGTHS) for frame in range(length)]


def all_is_read(root):
    """Every state and picture is that of its row; `check` finds no error."""
    dataset = open_dataset(root)
    rows = np.random.default_rng(0).permutation(dataset.num_frames)
    expected = np.array(EVERYTHING)[rows]
    np.testing.assert_array_equal(dataset.column("observation.state")[rows], expected)
    assert dataset.column("action").dtype == np.float32
    np.testing.assert_array_equal(addresses(dataset.images(CAMERA, rows)), expected)
    again = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(addresses(again.images(CAMERA, rows)), expected)
    assert not check_dataset(root).count("error")
    return dataset


KEYS = {"cameras": [CAMERA], "state_keys": ["observation.state"], "action_key": "action", "horizon": 2}


def refused(root, pattern):
    """By the reader and by `check`, in the same words."""
    with pytest.raises(DatasetFormatError, match=f"(?s){pattern}"):
        frames(open_dataset(root), np.array([0]), **KEYS)
    found = [f"expected {f.what}\nwhere {f.where}" for f in check_dataset(root).findings if f.severity == "error"]
    assert any(re.search(pattern, text, re.DOTALL) for text in found), found


@pytest.mark.parametrize("pictures", ["video", "struct"])
def test_interleaved_tables(tmp_path, pictures):
    root = write_set(tmp_path / "set", tables=[1, 0, 1], pictures=pictures)
    all_is_read(root)
    dataset = open_dataset(root, [0, 2])
    expected = [place for place in EVERYTHING if place[1] != 1]
    np.testing.assert_array_equal(dataset.column("observation.state"), expected)
    np.testing.assert_array_equal(addresses(dataset.images(CAMERA, np.arange(len(expected)))), expected)


def test_episodes_of_a_table_in_any_order(tmp_path):
    """Each in one piece; its own rows may not be."""
    root = write_set(tmp_path / "set", pictures="struct")
    path = root / "data/chunk-000/file-000.parquet"
    table, bounds = pq.read_table(path), np.cumsum([0, *LENGTHS])
    parts = [table.slice(bounds[e], LENGTHS[e]) for e in range(3)]
    pq.write_table(pa.concat_tables([parts[2], parts[0], parts[1]]), path)
    all_is_read(root)
    pq.write_table(pa.concat_tables([parts[0].slice(0, 4), parts[1], parts[0].slice(4), parts[2]]), path)
    refused(root, "expected 12 rows, as the metadata say.*found 4.*episode 0")


def test_tables_of_other_types(tmp_path):
    """Two data tables and two tables of episodes, each with types of its own, which convert without loss."""
    root = write_set(tmp_path / "set", tables=[0, 1, 1])
    entries = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(entries)
    first, second = table.slice(0, 2), table.slice(2, 1)
    start, texts = f"videos/{CAMERA}/from_timestamp", pa.large_list(pa.large_string())
    for name, kind in {"length": pa.int32(), "data/file_index": pa.float64(), "tasks": texts}.items():
        second = second.set_column(second.column_names.index(name), name, second.column(name).cast(kind))
    second = second.set_column(second.column_names.index(start), start, pa.array([2.1], pa.float32()))
    pq.write_table(first, entries)
    pq.write_table(second, entries.with_name("file-001.parquet"))
    data = root / "data/chunk-000/file-001.parquet"
    for name, kind in {"task_index": pa.float32(), "observation.state": pa.list_(pa.int16())}.items():
        edit_column(data, name, pq.read_table(data).column(name).cast(kind))
    all_is_read(root)


def test_indices_as_floats(tmp_path, version):
    root = write_set(tmp_path / "set", version)
    for path in (root / "data").rglob("*.parquet"):
        for name in ("episode_index", "frame_index", "index", "task_index"):
            edit_column(path, name, pq.read_table(path).column(name).cast(pa.float64()))
    if version == "v2.1":
        text = (root / "meta/episodes.jsonl").read_text()
        (root / "meta/episodes.jsonl").write_text(text.replace('"length": 12', '"length": 12.0'))
    assert all_is_read(root).column("episode_index").dtype == np.int64
    path = sorted((root / "data").rglob("*.parquet"))[0]
    halves = pq.read_table(path).column("task_index").to_numpy() + 0.5
    edit_column(path, "task_index", pa.array(halves))
    refused(root, rf"whole numbers in 'task_index'.*0\.5.*{path.name}")


def test_no_columns_of_numbers_that_nothing_is_found_by(tmp_path, version):
    """As GR00T's datasets; whether info.json names them or not."""
    root = write_set(tmp_path / "set", version)
    for path in (root / "data").rglob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["index", "frame_index"]), path)
    all_is_read(root)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    edit_info(root, features={k: v for k, v in features.items() if k not in ("index", "frame_index")})
    all_is_read(root)


@pytest.mark.parametrize("how", ["null", "empty list", "absent"])
def test_no_instruction(tmp_path, version, how):
    root = write_set(tmp_path / "set", version)
    texts = {"null": [None], "empty list": [], "absent": None}[how]
    if version == "v2.1":
        lines = [{"episode_index": e, "tasks": texts, "length": length} for e, length in enumerate(LENGTHS)]
        (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": null}')
    else:
        edit_column(root / "meta/episodes/chunk-000/file-000.parquet", "tasks", pa.array([texts] * len(LENGTHS)))
        edit_column(root / "meta/tasks.parquet", "task", pa.array([None], pa.string()))
    dataset = all_is_read(root)
    assert {dataset.prompt(0), *(e.task for e in dataset.episodes)} == {""}
    (finding,) = check_dataset(root).findings
    assert "3 of 3 episodes have no instruction" in finding.what


@pytest.mark.parametrize("pictures", ["struct", "bytes"])
def test_pictures_in_tables(tmp_path, version, pictures):
    all_is_read(write_set(tmp_path / "set", version, pictures=pictures))


def encoded_picture(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def deep_picture(value, dtype, kind):
    return encoded_picture(Image.fromarray(np.full((16, 128), value, dtype)), kind)


NO_PICTURES = {
    "16 bits": (lambda: deep_picture(5000, np.uint16, "PNG"), "PNG of 16 bits"),
    "32 bits": (lambda: deep_picture(5000, np.int32, "TIFF"), "TIFF of 32 bits"),
    "floats": (lambda: deep_picture(0.5, np.float32, "TIFF"), "TIFF of a float"),
    "null": (lambda: None, "found None"),
    "no picture": (lambda: b"none", "cannot identify"),
    "floats in lists": (lambda: [[0.0, 0.5]], "found a list"),
    "huge": (lambda: encoded_picture(Image.new("1", (16_000, 12_000))), "192000000 pixels"),
}


@pytest.mark.parametrize("kind", NO_PICTURES)
def test_pictures_that_are_none(tmp_path, kind):
    """Refused at the row, the others are read; nothing becomes white or black."""
    make, pattern = NO_PICTURES[kind]
    value = make()
    root = write_set(tmp_path / "set", pictures="bytes")
    path = root / "data/chunk-000/file-000.parquet"
    pictures = pq.read_table(path).column(CAMERA).to_pylist()
    if kind == "floats in lists":
        edit_column(path, CAMERA, pa.array([value] * len(pictures)))
    else:
        edit_column(path, CAMERA, pa.array([value, *pictures[1:]], pa.binary()))
        dataset = open_dataset(root)
        np.testing.assert_array_equal(addresses(dataset.images(CAMERA, np.arange(1, 5))), EVERYTHING[1:5])
    refused(root, f"8 bits per channel.*{pattern}.*file-000.parquet, episode 0, frame 0")


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64())])
def test_rows_of_unequal_length(tmp_path, version, kind):
    """Their numbers are as many as promised, so that only the length of each row tells."""
    root = write_set(tmp_path / "set", version)
    path = sorted((root / "data").rglob("*.parquet"))[0]
    rows = pq.read_table(path).column("observation.state").to_pylist()
    rows[4], rows[5] = [*rows[4], 0.5], rows[5][1:]
    edit_column(path, "observation.state", pa.array(rows, kind))
    refused(root, rf"2 numbers per row in 'observation.state'.*2 in row 0 and 3 in row 4.*{path.name}")
    rows[4], rows[5] = [*rows[4], 1.0], None
    edit_column(path, "observation.state", pa.array(rows, kind))
    refused(root, "2 in row 0 and 4 in row 4")
    rows[4] = rows[4][:2]
    edit_column(path, "observation.state", pa.array(rows, kind))
    refused(root, "2 in row 0 and none in row 5")


def test_matrices(tmp_path, version):
    """Nested lists of one shape are read row by row; of several shapes they are refused."""
    root = write_set(tmp_path / "set", version)
    edit_feature(root, "pose", shape=[2, 3])
    for path in (root / "data").rglob("*.parquet"):
        poses = [np.full((2, 3), state).tolist() for state, _ in pq.read_table(path)["observation.state"].to_pylist()]
        edit_column(path, "pose", pa.array(poses))
    dataset = all_is_read(root)
    np.testing.assert_array_equal(dataset.column("pose"), np.array(EVERYTHING)[:, :1].repeat(6, axis=1))
    path = sorted((root / "data").rglob("*.parquet"))[0]
    poses = pq.read_table(path).column("pose").to_pylist()
    poses[1] = [[0.0] * 2, [0.0] * 4]
    edit_column(path, "pose", pa.array(poses))
    with pytest.raises(DatasetFormatError, match="3 in row 0 and 2 in row 1"):
        open_dataset(root).column("pose")


def test_features_of_no_dimension_are_ignored(tmp_path, version):
    root = write_set(tmp_path / "set", version)
    edit_feature(root, "target", shape=[0])
    for path in (root / "data").rglob("*.parquet"):
        edit_column(path, "target", pa.array([[]] * len(pq.read_table(path)), pa.list_(pa.float32())))
    assert "target" not in all_is_read(root).features


def test_features_that_are_no_numbers_are_left_alone(tmp_path, version):
    """LeRobot's language columns of 2026, and whatever else a dtype may say."""
    root = write_set(tmp_path / "set", version)
    said = [{"role": "user", "content": "reach", "style": "subtask", "timestamp": 0.0}]
    for key, dtype in {"language_persistent": "language", "note": "string", "sound": "audio"}.items():
        edit_feature(root, key, dtype=dtype)
        for path in (root / "data").rglob("*.parquet"):
            edit_column(path, key, pa.array([said] * len(pq.read_table(path))))
    features = all_is_read(root).features
    assert {features[key].kind for key in ("language_persistent", "note", "sound")} == {"text"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, ()),
        (["x", "y"], ("x", "y")),
        ([["x"], ["y"]], ("x", "y")),
        ({"motors": ["x", "y"]}, ("x", "y")),
        ({"y": 1, "x": 0}, ("x", "y")),
        ([0, 1], ("0", "1")),
        ({"axes": {"a": ["x"], "b": "y"}}, ("x", "y")),
        ([None, "y"], ("y",)),
        (7, ("7",)),
    ],
)
def test_names(tmp_path, names, expected):
    root = write_set(tmp_path / "set")
    edit_feature(root, "action", shape=[2], names=names)
    assert all_is_read(root).features["action"].names == expected


CASES = {
    "interleaved_tables": None,
    "float_indices": None,
    "language_columns": None,
    "zero_width": None,
    "task_null": None,
    "raw_bytes_picture": None,
    "episode_tables_differ": None,
    "16bit_png": "PNG of 16 bits.*file-000.parquet, episode 0, frame 0",
}


@pytest.mark.parametrize("name", CASES)
def test_cases(shared_cases, name):
    """Files of public problem threads, rebuilt small."""
    root, wrong = shared_cases / name, CASES[name]
    report = check_dataset(root)
    if wrong:
        with pytest.raises(DatasetFormatError, match=f"(?s){wrong}"):
            open_dataset(root).images(CAMERA, np.array([0]))
        assert [n for f in report.findings if f.severity == "error" for n in f.episodes] == [0, 1, 2]
        return
    assert not report.count("error"), report.findings
    dataset = open_dataset(root)
    images = dataset.images(CAMERA, np.arange(dataset.num_frames))
    bits = (images[:, 8, 8::16].mean(-1) > 127).reshape(-1, 2, 8)
    expected = np.stack([dataset.column("frame_index")[:, 0], dataset.column("episode_index")[:, 0]], axis=1)
    if name == "episode_tables_differ":  # its last episode begins at 4 s, in the pictures of the one before
        bits, expected = bits[:44], expected[:44]
        assert "run to 4.300 s, its part of that file only to 4.000 s" in report.findings[0].what
    np.testing.assert_array_equal((bits << np.arange(8)).sum(-1), expected)
