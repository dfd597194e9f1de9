"""Every defect, planted into copies of real and synthetic datasets: `manipi check` finds it, training meets it with an
error that names the place, and a run that leaves the bad episodes out trains on the others."""

import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manipi.data.lerobot.video import VideoWriter
from manipi.data.open import open_dataset
from manipi.data.review.check import check_dataset, sort_episodes
from manipi.errors import BadValueError, DataError, DatasetFormatError

SETS = ["synthetic_lerobot_v21", "synthetic_lerobot_v30", "g1_bottle_lerobot_v21", "g1_bottle_lerobot_v30"]
EPISODE, FRAME, CAMERA = 2, 5, "observation.images.cam_high"
NOBODY = 65534
SOUND = set[str]()
"""Of SETS those that were seen to be free of defects before one was planted."""


class Copy:
    """A copy of a dataset, and where things are in it."""

    def __init__(self, root: Path):
        self.root = root
        self.v3 = root.name.endswith("v30")
        self.episodes = len(open_dataset(root).episodes)

    @property
    def table(self) -> Path:
        name = "file-000" if self.v3 else f"episode_{EPISODE:06d}"
        return self.root / f"data/chunk-000/{name}.parquet"

    @property
    def video(self) -> Path:
        name = f"{CAMERA}/chunk-000/file-000" if self.v3 else f"chunk-000/{CAMERA}/episode_{EPISODE:06d}"
        return self.root / f"videos/{name}.mp4"

    @property
    def entries(self) -> Path:
        return self.root / ("meta/episodes/chunk-000/file-000.parquet" if self.v3 else "meta/episodes.jsonl")

    def rows(self, episode: int = EPISODE) -> np.ndarray:
        return np.flatnonzero(pq.read_table(self.table).column("episode_index").to_numpy() == episode)

    def put(self, column: str, rows, value, path: Path | None = None) -> None:
        path = path or self.table
        table = pq.read_table(path)
        values = np.array(table.column(column).to_pylist())
        values[rows] = value
        kind = table.schema.field(column).type
        position = table.schema.get_field_index(column)
        pq.write_table(table.set_column(position, column, pa.array(values.tolist(), kind)), path)

    def edit_entries(self, change: Callable[[list[dict]], list[dict]]) -> None:
        if self.v3:
            table = pq.read_table(self.entries)
            pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), table.schema), self.entries)
        else:
            entries = [json.loads(line) for line in self.entries.read_text().splitlines()]
            self.entries.write_text("\n".join(map(json.dumps, change(entries))))

    def edit_info(self, **entries) -> None:
        path = self.root / "meta/info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def truncate_video(copy: Copy) -> None:
    copy.video.write_bytes(copy.video.read_bytes()[: copy.video.stat().st_size // 3])


def drop_column(copy: Copy) -> None:
    pq.write_table(pq.read_table(copy.table).drop_columns(["action"]), copy.table)


def put_bad_value(copy: Copy, value: float) -> None:
    copy.put("observation.state", (copy.rows()[FRAME], 3), value)


def swap_timestamps(copy: Copy) -> None:
    rows = copy.rows()[FRAME - 1 : FRAME + 1]
    copy.put("timestamp", rows, pq.read_table(copy.table).column("timestamp").to_numpy()[rows[::-1]])


def shorten_video(copy: Copy) -> None:
    if copy.v3:  # the file ends ten frames before its last episode does

        def later(entries):
            seconds = 10 / open_dataset(copy.root).fps
            entries[-1][f"videos/{CAMERA}/from_timestamp"] += seconds
            return entries

        copy.edit_entries(later)
    else:
        shorter = min(range(copy.episodes), key=lambda e: open_dataset(copy.root).episodes[e].length)
        shutil.copyfile(copy.video.with_name(f"episode_{shorter:06d}.mp4"), copy.video)


def put_unknown_task(copy: Copy) -> None:
    copy.put("task_index", copy.rows()[FRAME], 77)


def fix_a_dimension(copy: Copy) -> None:
    for path in (copy.root / "data").rglob("*.parquet"):
        copy.put("action", (slice(None), 3), 0.25, path)


def resize_video(copy: Copy) -> None:
    length = open_dataset(copy.root).num_frames if copy.v3 else len(copy.rows())
    fps = int(open_dataset(copy.root).fps)
    copy.video.unlink()
    writer = VideoWriter(copy.video, fps=fps, height=32, width=48)
    writer.add(np.zeros((length, 32, 48, 3), np.uint8))
    writer.close()


def change_version(copy: Copy) -> None:
    copy.edit_info(codebase_version="v9.9")


def lose_rows(copy: Copy) -> None:
    table = pq.read_table(copy.table)
    keep = np.ones(len(table), bool)
    keep[copy.rows()[-3:]] = False
    pq.write_table(table.filter(pa.array(keep)), copy.table)


def lose_entry(copy: Copy) -> None:
    copy.edit_entries(lambda entries: [e for e in entries if e["episode_index"] != EPISODE])


def break_entry(copy: Copy) -> None:
    lines = copy.entries.read_text().splitlines()
    copy.entries.write_text("\n".join(line[:20] if i == EPISODE else line for i, line in enumerate(lines)))


def add_empty_episode(copy: Copy) -> None:
    copy.edit_entries(lambda entries: [*entries, {**entries[-1], "episode_index": copy.episodes, "length": 0}])
    copy.edit_info(total_episodes=copy.episodes + 1)


def number_twice(copy: Copy) -> None:
    rows = copy.rows()
    if copy.v3:
        copy.put("episode_index", copy.rows(EPISODE + 1), EPISODE)
    else:
        copy.put("episode_index", rows, EPISODE - 1)


def list_twice(copy: Copy) -> None:
    copy.edit_entries(lambda entries: [*entries, entries[EPISODE]])


def forbid(copy: Copy, what: str) -> None:
    getattr(copy, what).chmod(0)


@dataclass(frozen=True)
class Defect:
    """What is planted, and who says what about it."""

    plant: Callable[[Copy], None]
    advice: str
    """What the check says to do about it; `FETCH` alone speaks of fetching."""
    check: str
    where: str
    what: str
    error: type[DataError] | None = DatasetFormatError
    """What training meets, with the same words; None: it trains."""
    severity: str = "error"
    hopeless: bool = False
    """No choice of episodes avoids it."""
    only: str = ""
    """Part of the name of the sets that can have it."""


FETCH = "hf download <dataset> --repo-type dataset --local-dir /"
FRAMES = r"episode \d+, frame \d+"
HERE, EXACT = f"{{table}}, episode {EPISODE}", f"{{table}}, episode {EPISODE}, frame {FRAME}"
DEFECTS = {
    "truncated video": Defect(truncate_video, FETCH, "pictures", f"{{video}}, {FRAMES}", "expected a frame at"),
    "short video": Defect(shorten_video, FETCH, "pictures", f"{{video}}, {FRAMES}", "truncated, or shorter"),
    "picture of another size": Defect(
        resize_video,
        r"correct its shape in .*meta/info.json",
        "pictures",
        f"{{video}}, {FRAMES}",
        r"found \(32, 48, 3\)",
    ),
    "missing column": Defect(
        drop_column,
        "--exclude action|record or convert its episodes again",
        "tables",
        "{table}",
        "expected the columns action",
    ),
    "NaN": Defect(
        partial(put_bad_value, value=np.nan),
        "repair the values, or leave the episode out",
        "values",
        EXACT,
        "nan in ",
        BadValueError,
    ),
    "infinity": Defect(
        partial(put_bad_value, value=-np.inf),
        "repair the values, or leave the episode out",
        "values",
        EXACT,
        "-inf in ",
        BadValueError,
    ),
    "timestamp out of order": Defect(
        swap_timestamps,
        "sort its rows, or write timestamp = frame / fps",
        "timestamps",
        EXACT,
        "expected ascending timestamps",
    ),
    "task without text": Defect(
        put_unknown_task,
        "give the task a text in the metadata",
        "numbering",
        EXACT,
        "expected a task_index with a text.*found 77",
    ),
    "still dimension": Defect(
        fix_a_dimension,
        "leave out what the robot does not use",
        "values",
        "all episodes",
        r"lie within 0.0001 in action\[3\]",
        None,
        severity="warning",
    ),
    "unknown version": Defect(
        change_version,
        "convert_dataset_v21_to_v30",
        "metadata",
        "meta/info.json",
        "expected codebase_version.*'v9.9'",
        hopeless=True,
    ),
    "rows missing": Defect(
        lose_rows,
        "correct its length in the metadata, or add or take out rows",
        "tables",
        HERE,
        r"expected \d+ rows.*found \d+",
    ),
    "entry missing": Defect(
        lose_entry,
        "correct total_episodes in .*, or put back the entries",
        "metadata",
        "meta",
        r"expected \d episodes in all",
    ),
    "entry broken": Defect(break_entry, FETCH, "metadata", "meta/episodes.jsonl, line 3", "expected JSON", only="v21"),
    "episode of no frames": Defect(
        add_empty_episode,
        "take its entry out of .*meta",
        "metadata",
        r"meta, episode \d",
        "expected at least one frame",
    ),
    "two episodes of one number": Defect(
        number_twice,
        "in one piece, under a number of its own|correct its length|give its rows an entry|take its entry out",
        "tables",
        r"{table}, episode \d",
        "expected ",
    ),
    "two entries of one episode": Defect(
        list_twice,
        "take out all of its entries in .*meta but one",
        "metadata",
        "meta",
        f"expected episode {EPISODE} once",
    ),
    "forbidden table": Defect(partial(forbid, what="table"), r"chmod \+r ", "tables", "{table}", "Permission denied"),
    "forbidden video": Defect(
        partial(forbid, what="video"), r"chmod \+r ", "pictures", f"{{video}}, {FRAMES}", "Permission denied"
    ),
    "forbidden metadata": Defect(
        partial(forbid, what="entries"), r"chmod \+r ", "metadata", "meta/episodes", "Permission denied", hopeless=True
    ),
}
CASES = [(name, dataset) for name, d in DEFECTS.items() for dataset in SETS if d.only in dataset]


@pytest.fixture
def copy(shared_datasets, request) -> Iterator[Copy]:
    """In a folder that other users may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        root = Path(folder) / request.param
        shutil.copytree(shared_datasets / request.param, root, copy_function=shutil.copyfile)
        for path in (root, *root.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield Copy(root)


@contextmanager
def nobody() -> Iterator[None]:
    """As a user whom permissions bind, which root is not."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def train(root: Path, episodes: tuple[int, ...] = ()) -> None:
    """What a run reads: the columns, the instructions, and pictures of each episode, here some of them."""
    dataset = open_dataset(root, episodes)
    for key in ("observation.state", "action"):
        dataset.column(key)
    for episode in dataset.episodes:
        dataset.prompt(episode.start)
        rows = episode.start + np.array([0, episode.length // 2, episode.length - 1])
        for camera in dataset.cameras:
            dataset.images(camera, rows)


@pytest.mark.parametrize(("defect", "copy"), CASES, indirect=["copy"])
def test_defect(defect, copy):
    planted = DEFECTS[defect]
    if copy.root.name not in SOUND:  # every module is imported that nobody may be forbidden to read
        train(copy.root)
        assert sort_episodes(copy.root)[1] == {}
        SOUND.add(copy.root.name)
    planted.plant(copy)
    paths = {name: str(getattr(copy, name).relative_to(copy.root)) for name in ("table", "video")}
    where = planted.where.format(**paths)
    everyone = tuple(range(copy.episodes))
    with nobody() if "forbidden" in defect else nullcontext():
        findings = check_dataset(copy.root, quick=True, num_workers=2).findings
        found = [f for f in findings if (f.severity, f.check) == (planted.severity, planted.check)]
        matching = [f for f in found if _matches(where, f.where) and _matches(planted.what, f.what)]
        assert matching, findings
        for finding in matching:
            assert _matches(planted.advice, finding.next)
            assert ("hf download" in finding.next) == (planted.advice == FETCH)
            assert "manipi check" not in finding.next  # where it comes from
        if planted.error is None:
            assert sort_episodes(copy.root)[1] == {}
            train(copy.root)
            return
        with pytest.raises(planted.error) as caught:
            train(copy.root)
        said = str(caught.value).replace(f"{copy.root}/", "")
        assert _matches(where, said), said
        assert _matches(planted.what, said), said
        if planted.hopeless:
            with pytest.raises(planted.error):
                sort_episodes(copy.root)[1]
            return
        bad = sort_episodes(copy.root)[1]
        assert bad, findings
        assert all(number in bad for f in matching for number in f.episodes)
        if good := tuple(sorted(set(everyone) - set(bad))):
            train(copy.root, good)
        else:
            assert copy.v3, "one bad file of v2.1 spoils one episode"


def _matches(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.DOTALL) is not None


def test_forbidden_files_are_forbidden(tmp_path):
    """Otherwise the cases above would prove nothing."""
    path = tmp_path / "file"
    path.write_text("x")
    path.chmod(0)
    assert stat.S_IMODE(path.stat().st_mode) == 0
    with nobody(), pytest.raises(PermissionError):
        path.read_text()
