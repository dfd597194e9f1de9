"""`manipi check` finds every defect that is planted into a copy of a sound dataset, and nothing else."""

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.data.review.check import check_dataset
from manipi.robots import Joints, Robot, State
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
    check = options.pop("check", None)
    report = check_dataset(root, quick=options.pop("quick", True), **options)
    findings = [f for f in report.findings if check in (None, f.check)]
    assert [finding.severity for finding in findings] == [severity], findings
    return findings[0]


def put(index, value):
    def change(rows):
        rows[index] = value

    return change


@pytest.mark.parametrize("name", [V21, V30, "synthetic_lerobot_v30_multi", "synthetic_lerobot_v30_image", G1])
def test_nothing_found_in_sound_datasets(shared_datasets, name):
    report = check_dataset(shared_datasets / name, quick=name.endswith("image"))
    # The hand of the real robot is commanded to its limits; nothing else is wrong with any.
    assert [f.what[:22] for f in report.findings] == (["commands that rest at "] if name == G1 else [])
    assert report.num_frames in (345, 1043)
    assert [e.index for e in report.episodes] == list(range(report.num_episodes))


def test_timestamps_of_another_rate(copy_of):
    """The videos have no pictures at these times; without videos, they are only odd."""
    root = copy_of(V21)

    def slower(rows):
        rows *= 2

    edit(table_of(root), "timestamp", slower)
    report = check_dataset(root, quick=True)
    assert [(f.severity, f.check, f.episodes) for f in report.findings] == 2 * [("error", "timestamps", (2,))]
    assert "its timestamps are 0.04 s apart, and fps is 50 in meta/info.json" in report.findings[0].what
    copy = copy_of("synthetic_lerobot_v30_image")
    edit(copy / "data/chunk-000/file-000.parquet", "timestamp", slower)
    report = check_dataset(copy, quick=True)
    assert [(f.severity, f.episodes) for f in report.findings] == [("warning", (e,)) for e in range(6)]
    assert "0.0400 s after the frame before, not 1/50 s (53 frames in all)" in report.findings[2].what


@pytest.mark.parametrize(("column", "belongs"), [("frame_index", 7), ("index", 40 + 47 + 7)])
def test_rows_numbered_wrongly(copy_of, column, belongs):
    root = copy_of(V21)
    edit(table_of(root), column, put(7, 3))
    finding = the_finding(root)
    assert (finding.check, finding.where) == ("numbering", "episode 2, frame 7")
    assert finding.what.startswith(f"{column} is 3 where {belongs} belongs")


def test_truncated_table_does_not_hide_the_other_tables(copy_of):
    root = copy_of(V21)
    table_of(root).write_bytes(table_of(root).read_bytes()[:-100])
    edit(table_of(root, 4), "action", put((0, 0), np.nan))
    findings = check_dataset(root, quick=True).findings
    assert [(f.check, f.where) for f in findings] == [
        ("tables", "data/chunk-000/episode_000002.parquet"),
        ("values", "data/chunk-000/episode_000004.parquet, episode 4, frame 0"),
    ]


def test_damaged_table(copy_of):
    root = copy_of(V21)
    content = bytearray(table_of(root).read_bytes())
    content[4:4000] = bytes(3996)
    table_of(root).write_bytes(content)
    finding = the_finding(root)
    assert (finding.check, finding.where) == ("tables", "data/chunk-000/episode_000002.parquet")


def test_metadata_that_disagree(copy_of):
    root = copy_of(V21)
    info = root / "meta/info.json"
    info.write_text(info.read_text().replace('"total_frames": 345', '"total_frames": 399'))
    finding = the_finding(root)
    assert (finding.check, finding.where) == ("metadata", "meta")
    assert "399 frames in all" in finding.what


def test_video_longer_than_its_episode(copy_of):
    root = copy_of(V21)
    shutil.copyfile(video_of(root, 5), video_of(root, 0))
    finding = the_finding(root, severity="warning")
    where = "videos/chunk-000/observation.images.cam_high/episode_000000.mp4"
    assert finding.what == f"75 frames in {where}, and only 40 in the episodes that it belongs to"
    assert finding.where == "episode 0"


def test_damage_in_the_middle_of_a_video_is_found_unless_quick(copy_of):
    root = copy_of(G1)
    path = root / "videos/observation.images.cam_high/chunk-000/file-000.mp4"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = bytes(20_000)
    path.write_bytes(content)
    assert check_dataset(root, quick=True).count("error") == 0
    assert the_finding(root, quick=False, check="pictures").where.startswith(
        "videos/observation.images.cam_high/chunk-000/file-000.mp4"
    )


def test_jump(copy_of):
    root = copy_of(V21)
    edit(table_of(root), "observation.state", put((20, 3), 50.0))
    finding = the_finding(root, severity="warning")
    assert finding.where in ("episode 2, frame 20", "episode 2, frame 21")
    assert finding.what.startswith("observation.state[3] 'j3' steps by 5")
    assert "at most 0.05" in finding.what


FEATURES = {
    "image": Feature(kind="image", shape=(16, 16, 3), dtype="video"),
    "state": Feature(kind="vector", shape=(2,), dtype="float32"),
    "action": Feature(kind="vector", shape=(2,), dtype="float32"),
}


def write(root, states, *, actions=None, tasks=None):
    """A dataset at 10 Hz with black pictures; one [T, 2] array of states per episode."""
    actions, tasks = actions or states, tasks or len(states) * ["close it"]
    with LeRobotWriter(root, fps=10, features=FEATURES, robot_type="toy") as writer:
        for state, action, task in zip(states, actions, tasks, strict=True):
            image = np.zeros((len(state), 16, 16, 3), np.uint8)
            data = {"image": image, "state": state.astype(np.float32), "action": action.astype(np.float32)}
            writer.add_episode(data, task=task)
    return root


def wave(seed, length=60):
    """Two smooth dimensions, always on the move, different for every seed."""
    t = np.arange(length) / 10
    return np.stack([np.sin(2 * t + seed), np.cos(3 * t + 2 * seed)], axis=1)


def whats(root, **options):
    report = check_dataset(root, quick=True, **options)
    return {f.what: f for f in report.findings}


def test_sound_waves(tmp_path):
    assert whats(write(tmp_path / "set", [wave(seed) for seed in range(5)])) == {}


def test_gripper_is_no_jump_and_a_copy_is_found(tmp_path):
    """A gripper snaps shut in every episode but for two, among them a copy of another episode."""
    episodes = []
    for seed in (0, 1, 2, 3, 1):
        arm = wave(seed)[:, 0]
        episodes.append(np.stack([arm, np.arange(60) > (15 if seed != 3 else 99)], axis=1))
    (finding,) = whats(write(tmp_path / "set", episodes)).values()
    assert (finding.where, finding.what) == ("episodes 4, 1", "the same numbers as episode 1")


def test_nearly_the_same_episode(tmp_path):
    close, other = wave(1) + 0.003, wave(1) + 0.1
    (what,) = whats(write(tmp_path / "set", [wave(0), wave(1), wave(2), close, other]))
    assert what == "within 1% of the movement of episode 1"


def test_shaking(tmp_path):
    shaken = wave(3) + 0.1 * np.random.default_rng(0).standard_normal((60, 2))
    findings = whats(write(tmp_path / "set", [*(wave(seed) for seed in range(3)), shaken]))
    assert {(f.check, f.where) for f in findings.values()} == {("movement", "episode 3")}
    assert all("has a jerk of" in what for what in findings)
    report = check_dataset(tmp_path / "set", quick=True)
    assert report.episodes[3].jerk > 5 * max(e.jerk for e in report.episodes[:3])


def test_clipped_commands(tmp_path):
    states = [wave(seed) for seed in range(5)]
    actions = [np.clip(state, [-0.9, -2], [0.9, 2]) for state in states]
    (finding,) = whats(write(tmp_path / "set", states, actions=actions)).values()
    assert finding.check == "values"
    assert "action[0] (2" in finding.what
    assert "action[1]" not in finding.what
    row = finding.frame
    assert abs(states[finding.episodes[0]][row, 0]) >= 0.9


def test_commands_beyond_limits(tmp_path):
    root = write(tmp_path / "set", [wave(seed) for seed in range(4)])
    robot = Robot(
        name="toy",
        cameras={"base": "image"},
        state=(State("state", 2),),
        actions=(Joints(1, low=(-0.5,), high=(2.0,)), Joints(1)),
        action_key="action",
        control_hz=10,
    )
    (finding,) = whats(root, robot=robot).values()
    first = next((e, t) for e in range(4) for t in range(60) if wave(e)[t, 0] < -0.5)
    assert (finding.check, finding.where) == ("robot", f"episode {first[0]}, frame {first[1]}")
    assert "outside -0.5 to 2" in finding.what


def test_pauses(tmp_path):
    frozen = np.concatenate([wave(1, 20), np.repeat(wave(1, 20)[-1:], 40, axis=0)])
    report = check_dataset(write(tmp_path / "set", [wave(0), frozen, wave(2)]), quick=True)
    (finding,) = report.findings
    assert finding.episodes == (1,)
    assert finding.what == "nothing moves in more than 50% of the frames; in 67% of episode 1"
    assert [round(e.idle * 60) for e in report.episodes] == [0, 40, 0]
    assert report.idle == pytest.approx(40 / 180)


def test_language(tmp_path):
    tasks = ["close it", "Close it.", "close  it", "open it", "", "close it"]
    report = check_dataset(write(tmp_path / "set", [wave(seed) for seed in range(6)], tasks=tasks), quick=True)
    silent, spelled = report.findings
    assert (silent.what, silent.episodes) == ("1 of 6 episodes have no instruction", (4,))
    assert spelled.what == "one instruction in 3 spellings: 'close it' (2), 'Close it.' (1), 'close  it' (1)"
    assert spelled.episodes == (1, 2)
    assert report.tasks == {"close it": 2, "Close it.": 1, "close  it": 1, "open it": 1, "": 1}


def spoilt(**changes):
    """Writes five waves, of which episode 1 is changed, or all commands are."""

    def make(root):
        states, tasks = [wave(s) for s in range(5)], ["close it"] * 5
        if "state" in changes:
            states[1] = changes["state"](states[1])
        if "task" in changes:
            tasks[1] = changes["task"]
        actions = [changes["action"](state) for state in states] if "action" in changes else None
        return write(root, states, actions=actions, tasks=tasks)

    return make


ADVICE = {
    "pause": (
        spoilt(state=lambda s: np.repeat(s[:20], [1] * 19 + [41], axis=0)),
        "nothing moves",
        "manipi filter ROOT --idle",
    ),
    "twins": (spoilt(state=lambda s: wave(0)), "the same numbers", r"manipi filter ROOT --without \d+ --out"),
    "jump": (
        spoilt(state=lambda s: s + [5, 0] * (np.arange(60) == 30)[:, None]),
        "steps by",
        "look at the frame: a lost",
    ),
    "shaking": (
        spoilt(state=lambda s: s + 0.1 * np.random.default_rng(0).standard_normal((60, 2))),
        "has a jerk",
        "look at the episode",
    ),
    "clipped": (spoilt(action=lambda s: np.clip(s, [-0.9, -2], [0.9, 2])), "commands that rest", "were cut off"),
    "still": (spoilt(action=lambda s: s * [1, 0]), "98 % of the values", "leave out what the robot does not use"),
    "silent": (spoilt(task=""), "have no instruction", "write what the robot does there"),
    "spelling": (spoilt(task="Close it."), "in 2 spellings", "spell it in one way"),
}


@pytest.mark.parametrize("cause", ADVICE)
def test_advice_fits_its_cause(tmp_path, cause):
    """Of warnings; tests/data/test_bad_input.py has that of errors."""
    plant, what, advice = ADVICE[cause]
    root = plant(tmp_path / "set")
    found = [f for f in check_dataset(root, quick=True).findings if what in f.what]
    assert found
    for finding in found:
        assert re.search(advice.replace("ROOT", re.escape(str(root))), finding.next)
        assert not re.search("hf download|manipi check|<folder>", finding.next)


def test_a_table_left_behind(copy_of):
    root = copy_of(V21)
    shutil.copyfile(table_of(root, 1), table_of(root, 9))
    finding = the_finding(root, severity="warning")
    assert finding.what == "data/chunk-000/episode_000009.parquet belongs to no episode of the metadata"


def test_the_page_stands_alone_and_shows_the_frame(copy_of, manipi, tmp_path):
    root, page = copy_of(V21), tmp_path / "report.html"
    edit(table_of(root), "observation.state", put((20, 3), 50.0))
    edit(table_of(root, 4), "action", put((5, 0), np.nan))
    done = manipi("check", root, "--quick", "--html", page)
    assert done.returncode == 1, done.stderr
    html = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import", re.sub(r"base64,[\w+/=]+", "", html))
    assert html.count("<img") == 4  # two cameras of two frames
    for text in ("episode 2, frame 2", "episode 4, frame 5", "steps by 5", "nan in action[0]", "open the drawer"):
        assert text in html
    assert html.index("nan in action") < html.index("steps by 5")  # errors first
    assert html.count('<th scope="row">') > 6


def test_strict(copy_of, manipi):
    root = copy_of(V21)
    edit(table_of(root), "observation.state", put((20, 3), 50.0))
    assert manipi("check", root, "--quick").returncode == 0
    assert manipi("check", root, "--quick", "--strict").returncode == 1


def test_robot_that_does_not_fit(shared_datasets):
    findings = check_dataset(shared_datasets / V30, robot=TABLETOP, quick=True).findings
    assert [(f.severity, f.check) for f in findings] == [("error", "robot")] * 3 + [("warning", "robot")]
    assert "expected image 'observation/image'" in findings[0].what
    assert "'tabletop' runs at 10 Hz, the dataset at 50 Hz" in findings[3].what


def test_command(copy_of, manipi, recipe_file, tmp_path):
    root = copy_of(V30)
    sound = manipi("check", root, "--quick", "--robot", f"{recipe_file}:ROBOT")
    assert sound.returncode == 0, sound.stderr
    assert "6 episodes · 345 frames · cameras: 2" in sound.stdout
    edit(root / "data/chunk-000/file-000.parquet", "action", put((5, 0), np.nan))
    broken = manipi("check", root, "--quick", "--json", tmp_path / "findings.json")
    assert broken.returncode == 1
    assert "error    values  data/chunk-000/file-000.parquet, episode 0, frame 5" in broken.stdout
    report = json.loads((tmp_path / "findings.json").read_text())
    assert [f["what"] for f in report["findings"]] == ["nan in action[0] 'j0' (1 value in the episode)"]


def test_command_on_a_folder_without_a_dataset(manipi, tmp_path):
    done = manipi("check", tmp_path)
    assert done.returncode == 1
    assert "expected the folder of a LeRobot dataset" in done.stdout


def test_the_speed_of_an_episode_does_not_end_in_a_stop_that_it_has_not(shared_datasets):
    facts = check_dataset(shared_datasets / V30, quick=True).episodes
    assert all(episode.motion[-1] > 0.1 for episode in facts)
