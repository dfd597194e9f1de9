"""`manipi check` finds every defect that is planted into a copy of a sound dataset, and nothing else."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manipi.data.check import check_dataset
from manipi.data.dataset import Feature
from manipi.data.lerobot_writer import LeRobotWriter
from manipi.robots.tabletop import TABLETOP

V21, V30, G1 = "synthetic_lerobot_v21", "synthetic_lerobot_v30", "g1_bottle_lerobot_v30"


def table_of(root, episode=2):
    return root / f"data/chunk-000/episode_{episode:06d}.parquet"


def video_of(root, episode):
    return root / f"videos/chunk-000/observation.images.cam_high/episode_{episode:06d}.mp4"


def edit(path, column, change):
    """Rewrite a column of a parquet file: `change` alters its values in place."""
    table = pq.read_table(path)
    values = table.column(column)
    rows = np.array(values.to_pylist())
    change(rows)
    position = table.schema.get_field_index(column)
    pq.write_table(table.set_column(position, column, pa.array(rows.tolist(), values.type)), path)


def the_finding(root, *, severity="error", **options):
    """The only finding, which must be of this severity."""
    findings = check_dataset(root, quick=options.pop("quick", True), **options).findings
    assert [finding.severity for finding in findings] == [severity], findings
    return findings[0]


def put(index, value):
    def change(rows):
        rows[index] = value

    return change


@pytest.mark.parametrize("name", [V21, V30, "synthetic_lerobot_v30_multi", "synthetic_lerobot_v30_image", G1])
def test_nothing_found_in_sound_datasets(shared_datasets, name):
    report = check_dataset(shared_datasets / name, quick=name.endswith("image"))
    assert report.findings == ()
    assert report.num_frames in (345, 1043)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_value(copy_of, value):
    root = copy_of(V21)
    edit(table_of(root), "observation.state", put((slice(5, 8), 3), value))
    finding = the_finding(root)
    assert (finding.check, finding.where) == ("values", "episode 2, frame 5")
    assert finding.what == f"{value} in observation.state[3] 'j3' (3 values in the episode)"


def test_bad_value_in_v30_is_placed_in_its_episode(copy_of):
    root = copy_of(V30)
    edit(root / "data/chunk-000/file-000.parquet", "action", put((40 + 47 + 5, 0), np.nan))
    assert the_finding(root).where == "episode 2, frame 5"


def test_timestamps_out_of_order(copy_of):
    root = copy_of(V21)
    edit(table_of(root), "timestamp", put(slice(10, 12), [0.22, 0.20]))
    finding = the_finding(root)
    assert (finding.check, finding.where) == ("timestamps", "episode 2, frame 11")
    assert "from 0.2200 s to 0.2000 s (1 frame in all)" in finding.what


def test_timestamps_of_another_rate(copy_of):
    root = copy_of(V21)

    def slower(rows):
        rows *= 2

    edit(table_of(root), "timestamp", slower)
    finding = the_finding(root, severity="warning")
    assert "0.0400 s after the frame before, not 1/50 s (53 frames in all)" in finding.what


@pytest.mark.parametrize(("column", "belongs"), [("frame_index", 7), ("index", 40 + 47 + 7)])
def test_rows_numbered_wrongly(copy_of, column, belongs):
    root = copy_of(V21)
    edit(table_of(root), column, put(7, 3))
    finding = the_finding(root)
    assert (finding.check, finding.where) == ("numbering", "episode 2, frame 7")
    assert finding.what.startswith(f"{column} is 3 where {belongs} belongs")


def test_missing_column(copy_of):
    root = copy_of(V21)
    pq.write_table(pq.read_table(table_of(root)).drop_columns(["action"]), table_of(root))
    finding = the_finding(root)
    assert (finding.check, finding.where) == ("tables", "data/chunk-000/episode_000002.parquet")
    assert finding.what.startswith("expected the columns action; found only")


def test_truncated_table_does_not_hide_the_other_tables(copy_of):
    root = copy_of(V21)
    table_of(root).write_bytes(table_of(root).read_bytes()[:-100])
    edit(table_of(root, 4), "action", put((0, 0), np.nan))
    findings = check_dataset(root, quick=True).findings
    assert [(f.check, f.where) for f in findings] == [
        ("tables", "data/chunk-000/episode_000002.parquet"),
        ("values", "episode 4, frame 0"),
    ]


def test_damaged_table(copy_of):
    root = copy_of(V21)
    content = bytearray(table_of(root).read_bytes())
    content[4:4000] = bytes(3996)
    table_of(root).write_bytes(content)
    finding = the_finding(root)
    assert (finding.check, finding.where) == ("tables", "data/chunk-000/episode_000002.parquet")


def test_lost_rows(copy_of):
    root = copy_of(V21)
    pq.write_table(pq.read_table(table_of(root)).slice(0, 50), table_of(root))
    finding = the_finding(root)
    assert (finding.where, finding.what) == ("episode 2", "50 rows in the data tables, 54 in the metadata")


def test_episode_index_twice(copy_of):
    root = copy_of(V21)
    edit(table_of(root, 4), "episode_index", put(slice(None), 2))
    findings = check_dataset(root, quick=True).findings
    assert [(f.severity, f.where) for f in findings] == [("error", "episode 2"), ("error", "episode 4")]
    assert findings[0].what == "episode_index 2 occurs twice in the data tables"
    assert findings[1].what == "no rows in the data tables"


def test_episode_listed_twice(copy_of):
    root = copy_of(V21)
    episodes, info = root / "meta/episodes.jsonl", root / "meta/info.json"
    lines = episodes.read_text().splitlines()
    episodes.write_text("\n".join([*lines, lines[2]]))
    info.write_text(info.read_text().replace('"total_frames": 345', '"total_frames": 399'))
    assert check_dataset(root, quick=True).findings[0].what == "episode 2 is listed 2 times"


def test_metadata_that_disagree(copy_of):
    root = copy_of(V21)
    info = root / "meta/info.json"
    info.write_text(info.read_text().replace('"total_frames": 345', '"total_frames": 399'))
    finding = the_finding(root)
    assert (finding.check, finding.where) == ("metadata", f"{root}/meta")
    assert "399 frames in all episodes" in finding.what


def test_zero_length_episode(copy_of):
    root = copy_of(V21)
    with (root / "meta/episodes.jsonl").open("a") as file:
        file.write('{"episode_index": 6, "tasks": ["pick up the cube"], "length": 0}\n')
    pq.write_table(pq.read_table(table_of(root)).slice(0, 0), table_of(root, 6))
    assert the_finding(root).what == "episode 6 has 0 frames"


def test_instruction_without_text(copy_of):
    root = copy_of(V21)
    path = root / "meta/tasks.jsonl"
    path.write_text(path.read_text().replace("open the drawer", " "))
    findings = check_dataset(root, quick=True).findings
    assert [f.where for f in findings] == ["episode 1", "episode 3", "episode 5"]
    assert findings[0].what == "task_index [1] has no text in meta/tasks"


def test_truncated_video(copy_of):
    root = copy_of(V21)
    path = video_of(root, 3)
    path.write_bytes(path.read_bytes()[:20_000])
    finding = the_finding(root)
    assert finding.check == "pictures"
    assert finding.where == "videos/chunk-000/observation.images.cam_high/episode_000003.mp4, episode 3, frame 0"


def test_video_shorter_than_its_episode(copy_of):
    root = copy_of(V21)
    shutil.copyfile(video_of(root, 0), video_of(root, 5))
    finding = the_finding(root, quick=False)
    assert finding.where.endswith("episode_000005.mp4, episode 5, frame 40")
    assert "truncated, or shorter than its metadata say" in finding.what
    assert "frame 74" in the_finding(root, quick=True).where


def test_video_longer_than_its_episode(copy_of):
    root = copy_of(V21)
    shutil.copyfile(video_of(root, 5), video_of(root, 0))
    finding = the_finding(root, severity="warning")
    assert finding.what == "75 frames, and only 40 in the episodes that it belongs to"


def test_damage_in_the_middle_of_a_video_is_found_unless_quick(copy_of):
    root = copy_of(G1)
    path = root / "videos/observation.images.cam_high/chunk-000/file-000.mp4"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = bytes(20_000)
    path.write_bytes(content)
    assert check_dataset(root, quick=True).findings == ()
    assert the_finding(root, quick=False).where.startswith("videos/observation.images.cam_high/chunk-000/file-000.mp4")


def test_dimension_that_never_moves(copy_of):
    root = copy_of(V30)
    edit(root / "data/chunk-000/file-000.parquet", "action", put((slice(None), [3, 5]), 0.25))
    finding = the_finding(root, severity="warning")
    assert finding.what == "98 % of the values lie within 0.0001 in action[3] 'j3', action[5] 'j5'"


def test_jump(copy_of):
    root = copy_of(V21)
    edit(table_of(root), "observation.state", put((20, 3), 50.0))
    finding = the_finding(root, severity="warning")
    assert finding.where in ("episode 2, frame 20", "episode 2, frame 21")
    assert finding.what.startswith("observation.state[3] 'j3' steps by 5")
    assert "at most 0.05" in finding.what


def test_gripper_is_no_jump_and_a_copy_is_found(tmp_path):
    """A gripper snaps shut in every episode but for two, among them a copy of another episode."""
    features = {
        "image": Feature(kind="image", shape=(16, 16, 3), dtype="video"),
        "state": Feature(kind="vector", shape=(2,), dtype="float32"),
    }
    with LeRobotWriter(tmp_path / "set", fps=10, features=features, robot_type="toy") as writer:
        for seed in (0, 1, 2, 3, 1):
            arm = np.cumsum(np.random.default_rng(seed).normal(scale=0.01, size=30))
            gripper = np.arange(30) > (15 if seed != 3 else 99)
            state = np.stack([arm, gripper], axis=1).astype(np.float32)
            writer.add_episode({"image": np.zeros((30, 16, 16, 3), np.uint8), "state": state}, task="close it")
    finding = the_finding(tmp_path / "set", severity="warning")
    assert (finding.where, finding.what) == ("episode 4", "the same numbers as episode 1")


def test_robot_that_does_not_fit(shared_datasets):
    findings = check_dataset(shared_datasets / V30, robot=TABLETOP, quick=True).findings
    assert [(f.severity, f.check) for f in findings] == [("error", "robot")] * 3 + [("warning", "robot")]
    assert "expected image 'observation/image'" in findings[0].what
    assert "'tabletop' runs at 10 Hz, the dataset at 50 Hz" in findings[3].what


def test_command(copy_of, manipi, recipe_file, tmp_path):
    root = copy_of(V30)
    sound = manipi("check", root, "--quick", "--robot", f"{recipe_file}:ROBOT")
    assert sound.returncode == 0, sound.stderr
    assert "6 episodes · 345 frames · 2 cameras" in sound.stdout
    edit(root / "data/chunk-000/file-000.parquet", "action", put((5, 0), np.nan))
    broken = manipi("check", root, "--quick", "--json", tmp_path / "findings.json")
    assert broken.returncode == 1
    assert "error    values  episode 0, frame 5" in broken.stdout
    report = json.loads((tmp_path / "findings.json").read_text())
    assert [f["what"] for f in report["findings"]] == ["nan in action[0] 'j0' (1 value in the episode)"]


def test_command_on_a_folder_without_a_dataset(manipi, tmp_path):
    done = manipi("check", tmp_path)
    assert done.returncode == 1
    assert "expected a metadata file; found nothing" in done.stdout
