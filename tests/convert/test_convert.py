"""Other projects' recordings become LeRobot datasets with equal values, in pieces, and never half."""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.commands import Command

from manipi.convert.convert import ConvertSettings, convert
from manipi.convert.formats import open_reader
from manipi.data.open import open_dataset
from manipi.data.review.check import check_dataset
from manipi.errors import (
    BadValueError,
    ConfigError,
    DataError,
    DatasetFormatError,
    DatasetNotFoundError,
    MissingFeatureError,
    StorageError,
    UnknownNameError,
)
from manipi.storage import Lock


@pytest.fixture(scope="module")
def recordings():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "data")
        yield importlib.import_module("recordings")


def run(root, target, *, format=None, drop_skipped=False, num_workers=0, skip_bad=False, ray=False, **settings):
    source = open_reader(root, format, drop_skipped=drop_skipped)
    how = {"num_workers": num_workers, "skip_bad": skip_bad, "ray": ray}
    return convert(source, target, ConvertSettings(**settings), **how, show=False)


def sound(target, lengths, fps):
    """The dataset, which `manipi check` has nothing against, of these lengths."""
    findings = check_dataset(target, num_workers=1).findings
    assert [f for f in findings if f.severity == "error" or f.check == "pictures"] == []
    dataset = open_dataset(target)
    assert [episode.length for episode in dataset.episodes] == list(lengths)
    assert dataset.fps == fps
    times = pq.read_table(target / "data/chunk-000/file-000.parquet", columns=["timestamp"]).column(0).to_numpy()
    np.testing.assert_allclose(times, np.concatenate([np.arange(n) for n in lengths]) / fps, atol=1e-5)
    return dataset


def same_pictures(dataset, camera, expected):
    """Every picture is the one recorded there: a frame later has 7 levels more of red, the next camera 10 of blue."""
    shown = dataset.images(camera, np.arange(dataset.num_frames)).astype(int)
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).max() <= 24
    assert np.abs(shown - expected).mean(axis=(1, 2, 3)).max() < 3.5
    assert np.abs((shown - expected).mean(axis=(1, 2))).max() < 3.5


def digest(folder):
    """Every file's name and bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# ---- every format


@pytest.mark.parametrize("compressed", [False, True])
def test_aloha(recordings, tmp_path, compressed):
    make, lengths = recordings, (20, 7, 33)
    root = make.write_aloha(tmp_path / "source", lengths, compressed=compressed)
    report = run(root, tmp_path / "set", task="fold the towel")
    assert (report.num_episodes, report.num_frames, report.reused, report.skipped) == (3, 60, 0, ())
    dataset = sound(tmp_path / "set", lengths, 50)
    for key, seed in (("action", 0), ("observation.state", 100), ("observation.velocity", 200)):
        np.testing.assert_array_equal(
            dataset.column(key), np.concatenate([make.numbers(n, 14, seed + e) for e, n in enumerate(lengths)])
        )
    assert dataset.column("observation.effort").shape == (60, 14)
    assert dataset.features["action"].names[6:8] == ("left_gripper", "right_waist")
    for c, camera in enumerate(("cam_high", "cam_left_wrist")):
        expected = np.concatenate([make.pictures(n, c + e) for e, n in enumerate(lengths)])
        same_pictures(dataset, f"observation.images.{camera}", expected)
    assert dataset.prompt(30) == "fold the towel"
    assert [path.name for path in tmp_path.iterdir() if "set" in path.name] == ["set"]


def copy_rows(target, name, one, frames):
    """Of a file's dataset, as it is stored but for its chunks."""
    if isinstance(one, h5py.Dataset):
        target.create_dataset(name, data=one[:, :frames] if name == "compress_len" else one[:frames])


@pytest.mark.slow
@pytest.mark.parametrize("frames", [60, pytest.param(400, marks=pytest.mark.long)])
def test_real_aloha(shared_datasets, tmp_path, frames):
    """One episode raw, one compressed; recorded in simulation."""
    root = tmp_path / "source"
    root.mkdir()
    for path in (shared_datasets / "aloha_sim_transfer_cube_hdf5").glob("*.hdf5"):
        with h5py.File(path) as whole, h5py.File(root / path.name, "w") as part:
            part.attrs.update(whole.attrs)
            whole.visititems(lambda name, one, part=part: copy_rows(part, name, one, frames))
    run(root, tmp_path / "set", task="transfer the cube", num_workers=2)
    dataset = sound(tmp_path / "set", (frames, frames), 50)
    for e in range(2):
        with h5py.File(root / f"episode_{e}.hdf5") as file:
            rows = slice(frames * e, frames * e + frames)
            for key, name in (("observation.state", "observations/qpos"), ("action", "action")):
                np.testing.assert_array_equal(dataset.column(key)[rows], file[name][()].astype(np.float32))
            if not e:
                shown = dataset.images("observation.images.top", np.arange(0, frames, 20))
                raw = file["observations/images/top"][::20]
                assert np.abs(shown.astype(int) - raw).mean(axis=(1, 2, 3)).max() < 3


def test_libero(recordings, tmp_path):
    make = recordings
    root = make.write_libero(tmp_path / "source")
    run(root, tmp_path / "set", rotate=180)
    dataset = sound(tmp_path / "set", (9, 12, 9, 12), 20)
    assert [episode.task for episode in dataset.episodes] == ["close the drawer"] * 2 + ["open the drawer"] * 2
    seeds = [(9, 19), (12, 20), (9, 9), (12, 10)]
    np.testing.assert_array_equal(dataset.column("action"), np.concatenate([make.numbers(n, 7, s) for n, s in seeds]))
    state = [np.concatenate([make.numbers(n, 6, s + 1), make.numbers(n, 2, s + 2)], axis=1) for n, s in seeds]
    np.testing.assert_array_equal(dataset.column("observation.state"), np.concatenate(state))
    assert dataset.column("next.done")[[8, 9], 0].tolist() == [1, 0]
    turned = np.concatenate([make.pictures(n, t, 64, 64) for n, t in ((9, 1), (12, 1), (9, 0), (12, 0))])[:, ::-1, ::-1]
    same_pictures(dataset, "observation.images.agentview_rgb", turned)


def test_robomimic_without_an_instruction(recordings, tmp_path):
    path = tmp_path / "image.hdf5"
    with h5py.File(path, "w") as file:
        file["data/demo_0/actions"] = recordings.numbers(5, 7, 0)
        for name, size in (("robot0_eef_pos", 3), ("robot0_eef_quat", 4), ("robot0_gripper_qpos", 2)):
            file[f"data/demo_0/obs/{name}"] = recordings.numbers(5, size, size)
    with pytest.raises(ConfigError, match=r"(?s)an instruction.*demo_0.*--task"):
        run(path, tmp_path / "set")
    run(path, tmp_path / "set", task="lift")
    state = open_dataset(tmp_path / "set").column("observation.state")
    np.testing.assert_array_equal(state, np.concatenate([recordings.numbers(5, n, n) for n in (3, 4, 2)], axis=1))


@pytest.mark.parametrize("metadata", [True, False])
def test_droid(recordings, tmp_path, metadata):
    make, lengths = recordings, (20, 11)
    run(make.write_droid(tmp_path / "source", metadata=metadata), tmp_path / "set", task="" if metadata else "other")
    dataset = sound(tmp_path / "set", lengths, 15)
    tasks = ["pick up the pen", "move an object"] if metadata else ["other", "other"]
    assert [episode.task for episode in dataset.episodes] == tasks
    both = [np.concatenate([make.numbers(n, 7, 200 + e), make.numbers(n, 1, 80 + e)], 1) for e, n in enumerate(lengths)]
    np.testing.assert_array_equal(dataset.column("actions"), np.concatenate(both))
    joints = np.concatenate([make.numbers(n, 7, e) for e, n in enumerate(lengths)])
    np.testing.assert_array_equal(dataset.column("joint_position"), joints)
    # Without metadata the outside cameras are in the order of their serial numbers: 20, 30.
    first, second = (0, 1) if metadata else (1, 0)
    for camera, seed in (("exterior_image_1_left", first), ("exterior_image_2_left", second), ("wrist_image_left", 2)):
        same_pictures(dataset, camera, np.concatenate([make.pictures(n, seed) for n in lengths]))


def test_droid_without_skipped_frames(recordings, tmp_path):
    """A longer recording is cut; frames 0, 3, 6 … are marked."""
    make = recordings
    root = make.write_droid(tmp_path / "source", lengths=(20,), recorded=3)
    joins = (("position", ("action.joint_position", "action.gripper_position")),)
    run(root, tmp_path / "set", drop_skipped=True, joins=joins, resize=(24, 64))
    dataset = sound(tmp_path / "set", (13,), 15)
    kept = np.arange(20) % 3 > 0
    np.testing.assert_array_equal(dataset.column("position")[:, :7], make.numbers(20, 7, 100)[kept])
    shown = dataset.images("wrist_image_left", np.arange(13)).astype(int)
    assert shown.shape == (13, 24, 64, 3)
    assert shown[:, :, :14].max() < 20  # black beside the picture
    assert np.abs(shown[:, 4:20, 20:44, 0].mean(axis=(1, 2)) - (7 * np.flatnonzero(kept) + 40)).max() < 4


@pytest.mark.parametrize("name", ["push.zarr", "push.zarr.zip"])
def test_zarr(recordings, tmp_path, name):
    values = recordings.push_t()
    path = recordings.write_zarr(tmp_path / name, values, [10, 25])
    with pytest.raises(ConfigError, match=r"(?s)frames per second.*--fps"):
        run(path, tmp_path / "set", task="push")
    run(path, tmp_path / "set", fps=10, task="push", pix_fmt="yuv444p")
    dataset = sound(tmp_path / "set", (10, 15), 10)
    np.testing.assert_array_equal(dataset.column("action"), values["action"])
    np.testing.assert_array_equal(dataset.column("observation.state"), values["state"])
    np.testing.assert_array_equal(dataset.column("observation.keypoint"), values["keypoint"].reshape(25, 18))
    same_pictures(dataset, "observation.images.img", values["img"])


def test_umi(recordings, tmp_path):
    values = recordings.umi()
    path = recordings.write_zarr(tmp_path / "dataset.zarr.zip", values, [25])
    run(path, tmp_path / "set", fps=60, task="pour")
    dataset = sound(tmp_path / "set", (25,), 60)
    pose = np.concatenate([values[f"robot0_{k}"] for k in ("eef_pos", "eef_rot_axis_angle", "gripper_width")], axis=1)
    for key in ("observation.state", "action"):
        np.testing.assert_array_equal(dataset.column(key), pose)
    assert json.loads((tmp_path / "set/meta/info.json").read_text())["robot_type"] == "umi"


def test_umi_compressed_with_jpeg_xl(recordings, tmp_path):
    path = recordings.write_zarr(tmp_path / "dataset.zarr", recordings.umi(), [25])
    about = path / "data/camera0_rgb/.zarray"
    entries = json.loads(about.read_text()) | {"compressor": {"id": "imagecodecs_jpegxl", "level": 99}}
    about.write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=r"(?s)imagecodecs, which decodes JPEG-XL.*pip install"):
        run(path, tmp_path / "set", fps=60, task="pour")


def test_lerobot_v21(shared_datasets, tmp_path):
    """With a task per episode, two cameras and AV1."""
    source = open_dataset(shared_datasets / "synthetic_lerobot_v21")
    run(source.root, tmp_path / "set", robot_type="aloha")
    dataset = sound(tmp_path / "set", [episode.length for episode in source.episodes], source.fps)
    assert dataset.features.keys() == source.features.keys()
    for key in ("observation.state", "action"):
        np.testing.assert_array_equal(dataset.column(key), source.column(key))
        assert dataset.features[key].names == source.features[key].names
    assert [e.task for e in dataset.episodes] == [e.task for e in source.episodes]
    rows = np.arange(0, source.num_frames, 7)
    for camera in source.cameras:
        shown, expected = (d.images(camera, rows)[:, :24, :192, 1] > 127 for d in (dataset, source))
        np.testing.assert_array_equal(shown[:, 12, 12::24], expected[:, 12, 12::24])


def test_rlds(shared_datasets, tmp_path, monkeypatch):
    pytest.importorskip("manipi.data.rlds.reader", reason="this version reads no RLDS")
    monkeypatch.setenv("MANIPI_HOME", str(tmp_path / "home"))
    root = shared_datasets / "octo_bridge_rlds/bridge_dataset/1.0.0"
    run(root, tmp_path / "set")
    source, dataset = open_dataset(root), open_dataset(tmp_path / "set")
    assert [e.length for e in dataset.episodes] == [e.length for e in source.episodes]
    for key in ("state", "actions"):
        np.testing.assert_array_equal(dataset.column(key), source.column(key))
    assert [dataset.prompt(row) for row in range(250)] == [source.prompt(row) for row in range(250)]
    for camera in source.cameras:
        shown, expected = (d.images(camera, np.arange(250)).astype(int) for d in (dataset, source))
        assert np.abs(shown - expected).mean(axis=(1, 2, 3)).max() < 6


def test_several_tasks_in_an_episode(write, tmp_path, episodes):
    from manipi.data.lerobot.writer import LeRobotWriter

    first = open_dataset(write(tmp_path / "one"))
    with LeRobotWriter(tmp_path / "two", fps=10, features=FEATURES(first), robot_type="x") as writer:
        writer.add_episode(episodes[0], task=["reach"] * 8 + ["grasp"] * 12)
        with pytest.raises(ConfigError, match=r"(?s)one per frame: 7.*3 tasks"):
            writer.add_episode(episodes[1], task=["reach"] * 3)
        writer.add_episode(episodes[1], task="grasp")
    run(tmp_path / "two", tmp_path / "three")
    for name in ("two", "three"):
        dataset = open_dataset(tmp_path / name)
        assert [dataset.prompt(row) for row in (0, 7, 8, 19, 20)] == ["reach", "reach", "grasp", "grasp", "grasp"]
        assert pq.read_table(tmp_path / name / "meta/episodes").column("tasks").to_pylist() == [
            ["reach", "grasp"],
            ["grasp"],
        ]


def FEATURES(dataset):
    numbering = {"timestamp", "frame_index", "episode_index", "index", "task_index"}
    return {key: feature for key, feature in dataset.features.items() if key not in numbering}


# ---- in parallel, killed, and begun again


def test_any_number_of_processes_gives_the_same_bytes(recordings, tmp_path):
    root = recordings.write_aloha(tmp_path / "source")
    run(root, tmp_path / "one", task="t")
    run(root, tmp_path / "two", task="t", num_workers=2)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs manipi[ray]")
def test_a_ray_cluster_gives_the_same_bytes_and_finds_the_same_faults(recordings, tmp_path):
    root = recordings.write_aloha(tmp_path / "source")
    run(root, tmp_path / "one", task="t")
    run(root, tmp_path / "two", task="t", ray=True)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert check_dataset(tmp_path / "two", ray=True) == check_dataset(tmp_path / "two")
    video = next((tmp_path / "two").rglob("*.mp4"))
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    damaged = check_dataset(tmp_path / "two", ray=True)
    assert damaged.count("error")
    assert damaged == check_dataset(tmp_path / "two")
    recording = max(root.glob("*.hdf5"))
    recording.write_bytes(recording.read_bytes()[:2_000])
    with pytest.raises(DataError, match=recording.name):
        run(root, tmp_path / "three", task="t", ray=True)


def start(root, target, *more):
    return Command("convert", root, target, "--task", "t", "--num-workers", 1, *more)


def until(condition, process=None, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def workers_of(process):
    """The others of its group."""
    groups = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            groups[path.name] = (path / "stat").read_text().rpartition(")")[2].split()[2]
    return [pid for pid, group in groups.items() if group == str(process.pid) != pid]


@pytest.fixture(scope="module")
def forty(recordings, tmp_path_factory):
    """Recordings that take long enough to be killed, and the digest of what is made of them undisturbed."""
    folder = tmp_path_factory.mktemp("forty")
    root = recordings.write_aloha(folder / "source", (25,) * 40, cameras=("cam_high",))
    run(root, folder / "set", task="t")
    return root, digest(folder / "set")


@pytest.mark.usefixtures("interruptible")
@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_conversion_goes_on(forty, tmp_path, sent):
    root, undisturbed = forty
    parts = tmp_path / ".set.parts"
    process = start(root, tmp_path / "set")
    until(lambda: len(list(parts.glob("episode-*"))) >= 2, process)
    workers = workers_of(process)
    # What has a name there would stay when all processes are killed at once.
    held = [line for pid in (process.pid, *workers) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    assert [line for line in held if "/dev/shm/" in line and not line.endswith("(deleted)")] == []
    os.kill(process.pid, sent)
    done = process.communicate()
    said = done.stderr
    assert done.returncode == (-9 if sent == signal.SIGKILL else 130), said
    assert "Traceback" not in said
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    finished = {path.name: path.stat().st_ino for path in parts.glob("episode-*")}
    assert 2 <= len(finished) < 40
    assert not (tmp_path / "set").exists()

    (tmp_path / ".set.abc.partial").mkdir()  # as a kill while the dataset is put together leaves it
    again = start(root, tmp_path / "set").communicate()
    assert again.returncode == 0, again.stderr
    assert f"40 ({len(finished)} from before)" in again.stdout
    assert digest(tmp_path / "set") == undisturbed
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_another_conversion_does_not_go_on_with_it(recordings, tmp_path):
    root = recordings.write_aloha(tmp_path / "source", (5, 6))
    (root / "episode_2.hdf5").write_bytes(b"no HDF5")
    with pytest.raises(DatasetFormatError):
        run(root, tmp_path / "set", task="t")
    with pytest.raises(ConfigError, match=r"(?s)another: settings changed.*rm -r .*\.set\.parts"):
        run(root, tmp_path / "set", task="t", crf=10)
    os.utime(root / "episode_1.hdf5", (1, 1))
    with pytest.raises(ConfigError, match="another: episodes and files changed"):
        run(root, tmp_path / "set", task="t")


def test_two_conversions_to_one_folder(recordings, tmp_path):
    root = recordings.write_aloha(tmp_path / "source", (5,))
    (tmp_path / ".set.parts").mkdir()
    with Lock(tmp_path / ".set.parts/lock"), pytest.raises(ConfigError, match="another one that is going on"):
        run(root, tmp_path / "set", task="t")
    run(root, tmp_path / "set", task="t")


def test_a_worker_that_is_killed(forty, tmp_path):
    process = start(forty[0], tmp_path / "set")
    until(lambda: list((tmp_path / ".set.parts").glob("episode-*")), process)
    for pid in workers_of(process):
        os.kill(int(pid), signal.SIGKILL)
    done = process.communicate()
    assert done.returncode == 1
    assert "often for want of memory" in done.stderr
    assert "Traceback" not in done.stderr


MEMORY = """
import re, sys
from pathlib import Path
from manipi.convert.convert import ConvertSettings, convert
from manipi.convert.formats import open_reader
convert(open_reader(Path(sys.argv[1])), Path(sys.argv[2]), ConvertSettings(task="t"), num_workers=0, show=False)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])  # ru_maxrss has the parent's in it
"""


def test_memory_does_not_grow_with_an_episode(recordings, tmp_path):
    peaks = []
    for length in (32, 2000):
        root = recordings.write_aloha(tmp_path / f"{length}", (length,), cameras=())
        with h5py.File(root / "episode_0.hdf5", "a") as file:
            shape = (length, 144, 192, 3)
            file.create_dataset("observations/images/top", shape, np.uint8, chunks=(1, *shape[1:]), compression="gzip")
        command = [sys.executable, "-c", MEMORY, str(root), str(tmp_path / f"set{length}")]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    all_pictures = 2000 * 144 * 192 * 3 / 1024
    assert peaks[1] - peaks[0] < all_pictures / 8, peaks


# ---- bad input


@pytest.fixture
def aloha(recordings, tmp_path):
    return recordings.write_aloha(tmp_path / "source", (6, 5, 7), cameras=("top",))


def change(path, edit):
    with h5py.File(path, "a") as file:
        edit(file)


def nan(file):
    file["observations/qpos"][3, 2] = np.nan


def shorter(file):
    del file["action"]
    file["action"] = np.zeros((4, 14))


def fewer_pictures(file):
    values = file["observations/images/top"][:3]
    del file["observations/images/top"]
    file["observations/images/top"] = values


def other_size(file):
    del file["observations/images/top"]
    file["observations/images/top"] = np.zeros((5, 24, 32, 3), np.uint8)


def without_action(file):
    del file["action"]


def no_frames(file):
    for key in ("action", "observations/qpos", "observations/qvel", "observations/effort", "observations/images/top"):
        shape = file[key].shape[1:]
        del file[key]
        file[key] = np.zeros((0, *shape), np.uint8)


def words(file):
    del file["action"]
    file["action"] = ["left"] * 5


def no_jpeg(file):
    del file["observations/images/top"]
    file["observations/images/top"] = np.full((5, 9), 7, np.uint8)


def cut(path):
    path.write_bytes(path.read_bytes()[:20_000])


AGAIN, OTHER = "copy the file again or repair it", "name the --format, if another one was recognised"
BAD = {
    cut: (DatasetFormatError, r"(?s)a readable HDF5 file.*truncated file.*episode_1.hdf5" + f".*next {AGAIN}"),
    without_action: (DatasetFormatError, r"(?s)'action' in /.*observations.*episode_1.hdf5" + f".*next {OTHER}"),
    shorter: (ConfigError, r"(?s)'action' as float32 of shape \(5, 14\).*\(4, 14\).*episode_1.hdf5"),
    fewer_pictures: (ConfigError, r"(?s)'observation.images.top'.*\(5, 48, 64, 3\).*3 pictures.*episode_1.hdf5"),
    other_size: (ConfigError, r"(?s)'observation.images.top'.*\(5, 24, 32, 3\).*episode_1.hdf5"),
    nan: (BadValueError, r"(?s)'observation.state'.*episode_1.hdf5, frame 3"),
    no_frames: (ConfigError, r"(?s)'observation.state' as float32 of shape \('T', 14\).*episode_1.hdf5"),
    words: (DatasetFormatError, r"(?s)numbers of every frame in 'action'.*episode_1.hdf5" + f".*next {OTHER}"),
    no_jpeg: (DatasetFormatError, r"(?s)a JPEG or PNG picture.*episode_1.hdf5, top, frame 0" + f".*next {AGAIN}"),
}


@pytest.mark.parametrize("damage", BAD, ids=lambda damage: damage.__name__)
def test_a_bad_episode(aloha, tmp_path, damage):
    kind, message = BAD[damage]
    path = aloha / "episode_1.hdf5"
    damage(path) if damage is cut else change(path, damage)
    with pytest.raises(kind, match=message):
        run(aloha, tmp_path / "set", task="t")
    assert not (tmp_path / "set").exists()
    report = run(aloha, tmp_path / "set", task="t", skip_bad=True)
    assert (report.num_episodes, report.reused) == (2, 1)
    ((name, why),) = report.skipped
    assert name == "episode_1.hdf5"
    assert "expected" in why
    assert [e.length for e in open_dataset(tmp_path / "set").episodes] == [6, 7]


def test_the_first_episode_is_bad(aloha, tmp_path):
    cut(aloha / "episode_0.hdf5")
    report = run(aloha, tmp_path / "set", task="t", skip_bad=True)
    assert [name for name, _ in report.skipped] == ["episode_0.hdf5"]


def test_every_episode_is_bad(aloha, tmp_path):
    for path in aloha.iterdir():
        change(path, without_action)
    with pytest.raises(DatasetFormatError, match="'action'"):
        run(aloha, tmp_path / "set", task="t", skip_bad=True)
    assert not (tmp_path / "set").exists()


def test_a_damaged_file_of_several(recordings, tmp_path):
    root = recordings.write_libero(tmp_path / "source")
    cut(root / "close_the_drawer_demo.hdf5")
    with pytest.raises(DatasetFormatError, match=r"close_the_drawer_demo\.hdf5"):
        run(root, tmp_path / "set")
    report = run(root, tmp_path / "set", skip_bad=True)
    assert (report.num_episodes, report.skipped[0][0]) == (2, "close_the_drawer_demo.hdf5")


@pytest.mark.parametrize("recorded", [-3, -20])
def test_a_video_shorter_than_its_numbers(recordings, tmp_path, recorded):
    root = recordings.write_droid(tmp_path / "source", lengths=(20,), recorded=recorded)
    message = r"(?s)20 frames, as trajectory.h5 has.*17.*30.mp4" if recorded == -3 else r"(?s)video.*30.mp4"
    with pytest.raises(DatasetFormatError, match=message):
        run(root, tmp_path / "set")


def test_a_video_that_is_missing(recordings, tmp_path):
    root = recordings.write_droid(tmp_path / "source", lengths=(20,))
    (root / "lab/success/day0/recordings/MP4/20.mp4").unlink()
    with pytest.raises(DatasetFormatError, match=r"(?s)No such file.*20.mp4"):
        run(root, tmp_path / "set")


def test_zarr_arrays_of_other_lengths(recordings, tmp_path):
    values = recordings.push_t()
    values["action"] = values["action"][:20]
    path = recordings.write_zarr(tmp_path / "p.zarr", values, [10, 25])
    with pytest.raises(DatasetFormatError, match=r"(?s)25 rows, as meta/episode_ends says.*20.*data/action, episode 0"):
        run(path, tmp_path / "set", fps=10, task="t")
    path = recordings.write_zarr(tmp_path / "q.zarr", recordings.push_t(), [10, 10, 25])
    with pytest.raises(DatasetFormatError, match="ends of episodes that ascend"):
        run(path, tmp_path / "set", fps=10, task="t")


def test_zarr_without_episodes_or_a_store(recordings, tmp_path):
    path = recordings.write_zarr(tmp_path / "p.zarr", recordings.push_t(), [])
    with pytest.raises(DatasetNotFoundError, match="at least one episode"):
        open_reader(path)
    (tmp_path / "q.zarr").mkdir()
    with pytest.raises(DatasetFormatError, match="a readable Zarr store"):
        open_reader(tmp_path / "q.zarr")
    (tmp_path / "r.zarr.zip").write_bytes(b"PK no zip")
    with pytest.raises(DatasetFormatError, match=r"(?s)a readable Zarr store.*zip"):
        open_reader(tmp_path / "r.zarr.zip")


def test_formats_that_nobody_knows(aloha, tmp_path):
    with pytest.raises(UnknownNameError, match=r"(?s)did you mean aloha"):
        open_reader(aloha, "alohaa")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    with pytest.raises(DatasetFormatError, match=r"(?s)aloha: episode_N.hdf5.*zarr: .*found notes.txt"):
        open_reader(tmp_path / "other")
    with h5py.File(tmp_path / "other/x.hdf5", "w") as file:
        file["values"] = 1
    with pytest.raises(DatasetFormatError, match=r"(?s)observations/qpos \(ALOHA\) or data/demo_N.*found values"):
        open_reader(tmp_path / "other")
    with pytest.raises(DatasetNotFoundError, match=r"at least one episode: folders with trajectory\.h5"):
        open_reader(aloha, "droid")
    with pytest.raises(DatasetNotFoundError, match="found nothing"):
        open_reader(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"(?s)marks skipped frames: droid.*aloha"):
        open_reader(aloha, drop_skipped=True)


def test_a_join_of_what_is_not_there(aloha, tmp_path):
    with pytest.raises(MissingFeatureError, match=r"(?s)the vectors speed.*only observation.state"):
        run(aloha, tmp_path / "set", task="t", joins=(("action", ("observation.state", "speed")),))


def test_what_is_excluded_is_left_out(recordings, tmp_path):
    """Depth is left out, and said to be; a name that nothing has is refused."""
    path = tmp_path / "depth.hdf5"
    with h5py.File(path, "w") as file:
        file["data/demo_0/actions"] = recordings.numbers(5, 7, 0)
        file["data/demo_0/obs/image"] = recordings.pictures(5)
        file["data/demo_0/obs/depth"] = np.zeros((5, 48, 64, 1), np.float32)
    with pytest.raises(MissingFeatureError, match=r"(?s)among action, .*found 'deep'"):
        run(path, tmp_path / "set", task="t", exclude=("deep",))
    report = run(path, tmp_path / "set", task="t")
    assert report.remarks == (("observation.images.depth", "records depth, not colours: left out"),)
    assert open_dataset(tmp_path / "set").cameras == ["observation.images.image"]
    assert run(path, tmp_path / "other", task="t", exclude=("observation.images.depth",)).remarks == ()


def test_an_attribute_that_is_no_json(recordings, tmp_path):
    root = recordings.write_libero(tmp_path / "source")
    with h5py.File(root / "open_the_drawer_demo.hdf5", "a") as file:
        file["data"].attrs["problem_info"] = "{"
    with pytest.raises(DatasetFormatError, match=r"(?s)JSON in the attribute 'problem_info'.*open_the_drawer"):
        run(root, tmp_path / "set")


@pytest.mark.parametrize("settings", [{"crf": 52}, {"fps": 0}, {"fps": -1}, {"resize": (0, 8)}])
def test_settings_that_cannot_be(settings):
    with pytest.raises(ConfigError, match="crf from 0 to 51"):
        ConvertSettings(**settings)


def test_an_existing_target_is_kept(aloha, tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(StorageError, match="does not exist yet"):
        run(aloha, tmp_path / "set", task="t")
    assert list((tmp_path / "set").iterdir()) == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_full_disk(recordings, tmp_path, mount, num_workers):
    root = recordings.write_aloha(tmp_path / "source", (150,) * 3, cameras=("top",))
    rng = np.random.default_rng(0)
    for path in root.iterdir():
        with h5py.File(path, "a") as file:
            file["observations/images/top"][:] = rng.integers(0, 255, (150, 48, 64, 3))
    disk = mount(1)
    message = r"(?s)No space left on device.*run the same command again; finished episodes wait in .*\.set\.parts"
    with pytest.raises(StorageError, match=message):
        run(root, disk / "set", task="t", num_workers=num_workers)
    assert not (disk / "set").exists()
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    report = run(root, disk / "set", task="t")
    assert (report.num_episodes, report.reused) == (3, 2)


def test_a_file_that_may_not_be_read(aloha, tmp_path):
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("needs setpriv, to be someone who may not read the file")
    (aloha / "episode_1.hdf5").chmod(0)
    script = "import sys; from pathlib import Path; from manipi.convert.formats import open_reader\n"
    script += "with open_reader(Path(sys.argv[1])).open('episode_1.hdf5'): pass"
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--reuid=65534"] if os.geteuid() == 0 else []
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and len(folder.parts) > 2:
            folder.chmod(0o755)
    if subprocess.run([*drop, sys.executable, "-c", ""], capture_output=True).returncode:
        pytest.skip("needs an interpreter that everybody may run")
    done = subprocess.run([*drop, sys.executable, "-c", script, str(aloha)], capture_output=True, text=True)
    assert "DatasetFormatError" in done.stderr
    assert "Permission denied" in done.stderr


def test_without_the_libraries(aloha, tmp_path):
    script = "import sys; sys.modules['h5py'] = None\nfrom manipi.cli import main\nmain(sys.argv[1:])"
    command = [sys.executable, "-c", script, "convert", str(aloha), str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the library h5py" in done.stderr
    assert "pip install 'manipi[convert]'" in done.stderr
