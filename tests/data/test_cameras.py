"""Cameras of LeRobot that record depth, and those that info.json names and no file has."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from manipi.cli.dataset import render
from manipi.convert.convert import ConvertSettings, convert
from manipi.convert.formats import open_reader
from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.data.open import open_dataset
from manipi.data.review.check import check_dataset, sort_episodes
from manipi.data.review.report import write_check_page
from manipi.data.review.view import write_view
from manipi.errors import DatasetFormatError, MissingFeatureError
from manipi.robots import Joints, Robot, State
from manipi.train.loop import train

CASES = Path(os.environ.get("MANIPI_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "cases/data"
PICTURE, VECTOR = Feature(kind="image", shape=(16, 16, 3), dtype="video"), {"kind": "vector", "dtype": "float32"}
LENGTHS = (20, 15, 25)


@pytest.fixture
def root(tmp_path):
    """Two cameras, `front` and `wrist`; state and action."""
    features = {"front": PICTURE, "wrist": PICTURE} | {k: Feature(shape=(2,), **VECTOR) for k in ("state", "action")}
    with LeRobotWriter(tmp_path / "set", fps=10, features=features, robot_type="toy") as writer:
        for e, length in enumerate(LENGTHS):
            t = np.arange(length) / 10
            values = np.stack([np.sin(2 * t + e), np.cos(3 * t + e)], axis=1).astype(np.float32)
            images = np.full((length, 16, 16, 3), 60 * e + 40, np.uint8)
            writer.add_episode({"front": images, "wrist": images, "state": values, "action": values}, task="go")
    return tmp_path / "set"


def robot(*cameras):
    slots = dict(zip(("base", "left_wrist"), cameras, strict=False))
    state, action = (State("state", 2),), (Joints(2),)
    return Robot(name="toy", cameras=slots, state=state, actions=action, action_key="action", control_hz=10)


def edit_info(root, change):
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def edit_episodes(root, change):
    (path,) = (root / "meta/episodes").rglob("*.parquet")
    pq.write_table(change(pq.read_table(path)), path)


def add_camera(root, key, entry, pix_fmt="gray12le"):
    """A camera with a video in the given format; `front` tells where its episodes are in it."""
    edit_info(root, lambda info: info["features"].update({key: {"dtype": "video", "names": None} | entry}))
    for name in ("chunk_index", "file_index", "from_timestamp"):
        edit_episodes(root, lambda t, n=name: t.append_column(f"videos/{key}/{n}", t.column(f"videos/front/{n}")))
    path = root / f"videos/{key}/chunk-000/file-000.mp4"
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1" if pix_fmt.startswith("gray1") else "libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, pix_fmt
        for _ in range(sum(LENGTHS)):
            grey = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 100, np.uint8), format="rgb24")
            file.mux(stream.encode(grey.reformat(format=pix_fmt)))
        file.mux(stream.encode(None))


# ---- depth

MARKED = {"is_depth_map": True, "video.pix_fmt": "gray12le", "video.codec": "hevc"}
ENTRIES = {
    "marked, 12 bits": ("head", {"shape": [16, 16, 1], "info": MARKED}, "depth", 1),
    "16 bits": ("head", {"shape": [16, 16, 1], "info": {"video.pix_fmt": "gray16le"}}, "depth", 1),
    "12 bits stated as colours": ("head", {"shape": [16, 16, 3], "info": {"pix_fmt": "gray12le"}}, "depth", 1),
    "no channel axis": ("head", {"shape": [16, 16]}, "depth", 1),
    "one channel, called so": ("head_depth", {"shape": [16, 16, 1]}, "depth", 1),
    "8 bits, called so": ("depths.head", {"shape": [1, 16, 16], "info": {"video.pix_fmt": "yuv420p"}}, "depth", 3),
    "marked, coloured": ("head", {"shape": [16, 16, 3], "video_info": {"video.is_depth_map": True}}, "depth", 3),
    "infrared": ("ir", {"shape": [16, 16, 1], "info": {"video.pix_fmt": "yuv420p"}}, "image", 3),
    "colours, called depth": ("head_depth", {"shape": [16, 16, 3], "info": None}, "image", 3),
    "colours of 10 bits": ("head", {"shape": [16, 16, 3], "info": {"video.pix_fmt": "yuv420p10le"}}, "image", 3),
    "not marked": ("head", {"shape": [3, 16, 16], "info": {"video.is_depth_map": False}}, "image", 3),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_which_cameras_record_depth(root, entry):
    key, stated, kind, channels = ENTRIES[entry]
    edit_info(root, lambda info: info["features"].update({key: {"dtype": "video"} | stated}))
    dataset = open_dataset(root)
    assert (dataset.features[key].kind, dataset.features[key].shape) == (kind, (16, 16, channels))
    assert (key in dataset.cameras) == (kind == "image")


def test_depth_is_named_and_left_out(root, tmp_path):
    add_camera(root, "head", {"shape": [16, 16, 1], "info": MARKED})
    report = check_dataset(root, robot=robot("front", "wrist"))
    assert (report.findings, report.cameras, report.depth) == ((), ("front", "wrist"), ("head",))
    assert "left out: head, which record depth, not colours" in render(report, quick=False)
    write_check_page(tmp_path / "check.html", report)
    assert "Left out, because they record depth: head." in (tmp_path / "check.html").read_text()
    write_view(tmp_path / "page.html", open_dataset(root, episodes=(1,)), show=False)
    assert (tmp_path / "page.html").read_text().count("<video ") == 2
    done = convert(open_reader(root), tmp_path / "out", ConvertSettings(), num_workers=0, show=False)
    assert done.remarks == (("head", "records depth, not colours: left out"),)
    assert open_dataset(tmp_path / "out").features.keys() == open_dataset(root).features.keys() - {"head"}


def test_depth_that_is_asked_for(root):
    """Of 8 bits it is a picture in grey; deeper values do not fit into one."""
    add_camera(root, "head_depth", {"shape": [16, 16, 1], "info": {"video.pix_fmt": "yuv420p"}}, "yuv420p")
    add_camera(root, "deep", {"shape": [16, 16, 1], "info": MARKED})
    assert check_dataset(root, robot=robot("front", "head_depth")).findings == ()
    assert np.abs(open_dataset(root).images("head_depth", np.arange(3)).astype(int) - 100).max() <= 3
    (finding,) = check_dataset(root, robot=robot("front", "deep")).findings
    assert (finding.severity, finding.check) == ("error", "robot")
    assert "found depth 'deep'" in finding.what
    assert finding.next == "name a camera of colours in the robot: front, wrist"
    with pytest.raises(MissingFeatureError, match="found depth 'deep'"):
        open_dataset(root).images("deep", np.arange(3))


def test_depth_that_info_json_states_as_colours(root):
    add_camera(root, "head", {"shape": [16, 16, 3]})
    (finding,) = check_dataset(root, quick=True).findings
    assert (finding.severity, finding.check, finding.features) == ("error", "pictures", ("head",))
    assert finding.episodes == (0, 1, 2)
    assert "found a depth map (gray12le)" in finding.what
    assert '"is_depth_map": true' in finding.next
    edit_info(root, lambda info: info["features"]["head"].update(info={"is_depth_map": True}))
    assert check_dataset(root, quick=True).findings == ()


def test_the_depth_camera_of_others():
    if not CASES.is_dir():
        pytest.skip(f"the cases are not at {CASES}; set MANIPI_SHARED")
    report = check_dataset(CASES / "depth_camera")
    assert (report.findings, report.depth) == ((), ("observation.images.head_depth",))


# ---- cameras that no file has


def files_gone(root):
    shutil.rmtree(root / "videos/wrist")


def never_recorded(root):
    files_gone(root)
    edit_episodes(root, lambda t: t.drop([name for name in t.column_names if name.startswith("videos/wrist")]))


@pytest.mark.parametrize("lose", [files_gone, never_recorded])
def test_a_camera_that_no_file_has(root, tmp_path, lose):
    lose(root)
    (finding,) = check_dataset(root).findings
    assert (finding.severity, finding.check, finding.where) == ("error", "pictures", "meta/info.json")
    assert finding.what.startswith("no file has pictures of wrist: ")
    assert f"manipi convert {root} TARGET --exclude wrist" in finding.next
    assert check_dataset(root, robot=robot("front", "wrist")).count("error") == 1
    (unused,) = check_dataset(root, robot=robot("front")).findings
    assert (unused.severity, unused.what) == ("warning", f"{finding.what}; 'toy' does not use it")
    assert sort_episodes(root, robot=robot("front"))[1] == {}
    assert list(sort_episodes(root, robot=robot("front", "wrist"))[1]) == [0, 1, 2]

    dataset = open_dataset(root, episodes=(1,))
    assert dataset.images("front", np.arange(3)).shape == (3, 16, 16, 3)
    with pytest.raises(DatasetFormatError, match="manipi view --without CAMERA, manipi convert --exclude CAMERA"):
        write_view(tmp_path / "page.html", dataset, show=False)
    write_view(tmp_path / "page.html", dataset, without=("wrist",), show=False)
    assert (tmp_path / "page.html").read_text().count("<video ") == 1
    with pytest.raises(MissingFeatureError, match=r"(?s)among front, wrist, state.*found 'wirst'"):
        write_view(tmp_path / "page.html", dataset, without=("wirst",), show=False)
    convert(open_reader(root), tmp_path / "out", ConvertSettings(exclude=("wrist",)), num_workers=0, show=False)
    assert check_dataset(tmp_path / "out").findings == ()
    assert open_dataset(tmp_path / "out").cameras == ["front"]


def test_a_column_that_no_table_has(root, tmp_path):
    entry = {"dtype": "float32", "shape": [3], "names": None}
    edit_info(root, lambda info: info["features"].update(force=entry))
    (finding,) = check_dataset(root, quick=True).findings
    assert (finding.severity, finding.check, finding.features) == ("error", "tables", ("force",))
    assert "TARGET --exclude force" in finding.next
    assert check_dataset(root, quick=True, robot=robot("front")).count("error") == 0
    convert(open_reader(root), tmp_path / "out", ConvertSettings(exclude=("force",)), num_workers=0, show=False)
    assert check_dataset(tmp_path / "out", quick=True).findings == ()


def test_training_goes_on_without_what_the_robot_does_not_use(toy_dataset, tiny, tmp_path):
    root = Path(shutil.copytree(toy_dataset, tmp_path / "set"))
    video = {"dtype": "video", "names": None}
    cameras = {"wrist": video | {"shape": [16, 16, 3]}, "depth": video | {"shape": [16, 16, 1], "info": MARKED}}
    edit_info(root, lambda info: info["features"].update(cameras))
    config = tiny("pi05", steps=2)
    train(replace(config, data=replace(config.data, path=str(root))), tmp_path / "run", show=False)
    assert (tmp_path / "run/checkpoints/2").is_dir()


# ---- templates that lead nowhere


@pytest.mark.parametrize(
    ("name", "template", "check", "stray"),
    [
        ("data_path", "data/chunk-{chunk_index:03d}/episode-{file_index:03d}.parquet", "tables", "1 file "),
        ("video_path", "videos/{video_key}/chunk-{chunk_index:03d}/{file_index}.mp4", "pictures", "2 files "),
    ],
)
def test_a_path_template_that_leads_nowhere_is_one_finding(root, name, template, check, stray):
    edit_info(root, lambda info: info.update({name: template}))
    (finding,) = check_dataset(root).findings
    assert (finding.severity, finding.check, finding.where) == ("error", check, "meta/info.json")
    assert "found nothing at " in finding.what
    assert f"{stray}there belong" in finding.what
    assert finding.next == f"correct {name} in {root}/meta/info.json"


def test_a_folder_of_another_name(root):
    (root / "videos/wrist").rename(root / "videos/wirst")
    (finding,) = check_dataset(root).findings
    assert "such as videos/wirst/chunk-000/file-000.mp4" in finding.what
    assert finding.next.startswith("name the feature in ")
