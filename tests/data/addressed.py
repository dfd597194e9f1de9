"""Small LeRobot datasets, v2.1 and v3.0, whose pictures carry their own address: 16 blocks along the top, white for 1,
eight bits of the number of the frame in its episode's video and then eight of the episode."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from manipi.data.lerobot.video import VideoWriter

CAMERA, BLOCK, HEIGHT = "observation.images.front", 8, 16
LENGTHS = (12, 9, 10)
TASK = "pick the red cube"


def picture(frame: int, episode: int) -> np.ndarray:
    bits = np.array([number >> bit & 1 for number in (frame, episode) for bit in range(8)])
    return np.broadcast_to(255 * bits.repeat(BLOCK)[None, :, None], (HEIGHT, 16 * BLOCK, 3)).astype(np.uint8)


def addresses(images: np.ndarray) -> np.ndarray:
    """Frame and episode that are written in pictures, [n, 2]."""
    bits = images[:, HEIGHT // 2, BLOCK // 2 :: BLOCK].mean(-1) > 127
    return (bits.reshape(-1, 2, 8) << np.arange(8)).sum(-1)


def write_set(
    root: Path,
    version: str = "v3.0",
    *,
    lengths: Sequence[int] = LENGTHS,
    rows: Sequence[Sequence[int]] | None = None,
    seconds: Callable[[int, np.ndarray], np.ndarray] = lambda episode, frames: frames / 10,
    time_type: pa.DataType | None = None,
    fps: float = 10,
    video_fps: int = 10,
    pictures: str = "video",
    tables: Sequence[int] | None = None,
) -> Path:
    """Write a dataset.

    Args:
        lengths: frames of each episode in the videos.
        rows: per episode the frames that the tables have; None: all of them.
        seconds: timestamps of frames of an episode.
        fps: in info.json.
        pictures: "video", "struct" (PNG in the tables as lerobot keeps it) or "bytes" (plain PNG).
        tables: of v3.0, in which data file each episode is; None: all in the first.
    """
    rows = [range(length) for length in lengths] if rows is None else rows
    index, parts = 0, []
    for e, kept in enumerate(rows):
        frames = np.array(kept)
        count = len(frames)
        part = {
            "observation.state": pa.array([[float(f), float(e)] for f in frames], pa.list_(pa.float32())),
            "action": pa.array([[float(f) + 1, float(e)] for f in frames], pa.list_(pa.float32())),
            "timestamp": pa.array(seconds(e, frames), time_type or pa.float32()),
            "frame_index": np.arange(count),
            "episode_index": np.full(count, e),
            "index": index + np.arange(count),
            "task_index": np.zeros(count, int),
        }
        if pictures != "video":
            encoded = [png(picture(int(f), e)) for f in frames]
            part[CAMERA] = pa.array(encoded if pictures == "bytes" else [{"bytes": b, "path": None} for b in encoded])
        parts.append(pa.table(part))
        index += count
    (root / "meta").mkdir(parents=True)
    writer = _write_v3 if version == "v3.0" else _write_v2
    writer(root, parts, list(lengths), video_fps, pictures == "video", list(tables or [0] * len(parts)))
    features = {"observation.state": ("float32", 2), "action": ("float32", 2), "timestamp": ("float32", 1)}
    features |= dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), ("int64", 1))
    info = {
        "codebase_version": version,
        "robot_type": "x",
        "total_episodes": len(parts),
        "total_frames": index,
        "chunks_size": 1000,
        "fps": fps,
        "data_path": DATA[version],
        "video_path": VIDEO[version],
        "features": {
            CAMERA: {
                "dtype": "video" if pictures == "video" else "image",
                "shape": [HEIGHT, 16 * BLOCK, 3],
                "names": ["height", "width", "channels"],
            },
            **{key: {"dtype": dtype, "shape": [size], "names": None} for key, (dtype, size) in features.items()},
        },
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


DATA = {
    "v2.1": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "v3.0": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}
VIDEO = {
    "v2.1": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    "v3.0": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}


def _write_v2(root: Path, parts: list[pa.Table], lengths: list[int], fps: int, video: bool, tables: list[int]) -> None:
    entries = [{"episode_index": e, "tasks": [TASK], "length": len(part)} for e, part in enumerate(parts)]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": TASK}))
    for e, part in enumerate(parts):
        write_table(part, root / f"data/chunk-000/episode_{e:06d}.parquet")
        if video:
            path = root / f"videos/chunk-000/{CAMERA}/episode_{e:06d}.mp4"
            write_video(path, [picture(f, e) for f in range(lengths[e])], fps)


def _write_v3(root: Path, parts: list[pa.Table], lengths: list[int], fps: int, video: bool, tables: list[int]) -> None:
    for file in set(tables):
        chosen = pa.concat_tables([part for part, its in zip(parts, tables, strict=True) if its == file])
        write_table(chosen, root / f"data/chunk-000/file-{file:03d}.parquet")
    zeros = [0] * len(parts)
    columns = {
        "episode_index": list(range(len(parts))),
        "tasks": [[TASK] for _ in parts],
        "length": [len(part) for part in parts],
        "data/chunk_index": zeros,
        "data/file_index": tables,
    }
    if video:
        ends = np.cumsum(lengths) / fps
        columns |= {f"videos/{CAMERA}/{name}": zeros for name in ("chunk_index", "file_index")}
        columns[f"videos/{CAMERA}/from_timestamp"] = [0.0, *ends[:-1].tolist()]
        columns[f"videos/{CAMERA}/to_timestamp"] = ends.tolist()
        shown = [picture(f, e) for e, length in enumerate(lengths) for f in range(length)]
        write_video(root / f"videos/{CAMERA}/chunk-000/file-000.mp4", shown, fps)
    write_table(pa.table(columns), root / "meta/episodes/chunk-000/file-000.parquet")
    write_table(pa.table({"task_index": [0], "task": [TASK]}), root / "meta/tasks.parquet")


def write_table(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def write_video(path: Path, images: list[np.ndarray], fps: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    video = VideoWriter(path, fps=fps, height=HEIGHT, width=16 * BLOCK)
    video.add(np.stack(images))
    video.close()


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def edit_column(path: Path, column: str, values: pa.Array) -> None:
    """Replace or add a column of a parquet file."""
    table = pq.read_table(path)
    if column in table.column_names:
        table = table.set_column(table.column_names.index(column), column, values)
    else:
        table = table.append_column(column, values)
    pq.write_table(table, path)


def edit_info(root: Path, **entries: object) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def edit_feature(root: Path, key: str, **entries: object) -> None:
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features[key] = features.get(key, {"dtype": "float32", "shape": [1], "names": None}) | entries
    edit_info(root, features=features)
