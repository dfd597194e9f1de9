"""One episode to look at: films and curves on one time axis, as one HTML page or as a rerun recording.

Shape letters: T frames of the episode, d dimensions.
"""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from manipi.data.dataset import Dataset, feature_names
from manipi.data.review.describe import is_action, is_state
from manipi.errors import ConfigError, MissingFeatureError, shown
from manipi.page import data_uri, encode_mp4, polyline, render
from manipi.storage import atomic_write, storage_errors

FILM_HEIGHT, FILM_BLOCK, POINTS = 240, 32, 600
"""Pixels of a film; pictures decoded at a time; points of a curve that are drawn, of as many as there are."""
NUMBERING = ("timestamp", "frame_index", "episode_index", "index", "task_index")


def write_view(path: Path, dataset: Dataset, *, without: Sequence[str] = (), show: bool = True) -> None:
    """Write the page of the only episode of `dataset`, as `open_dataset(root, episodes=(3,))` opens it.

    Args:
        without: cameras and vectors to leave out.

    Raises:
        MissingFeatureError: there is nothing of that name to leave out.
        DataError: tables or pictures of the episode are missing or broken.
        StorageError: the file cannot be written.
    """
    keys, episode = _shown(dataset, without), dataset.episodes[0]
    films = []
    for camera in (camera for camera in dataset.cameras if camera in keys):
        height, width, _ = dataset.features[camera].shape
        scale = min(1.0, FILM_HEIGHT / height)
        size = {"height": round(height * scale), "width": round(width * scale)}
        film = encode_mp4(_images(dataset, camera, show), dataset.fps, **size)
        films.append((camera, data_uri("video/mp4", film)))
    sections = list(_sections(dataset, keys))
    curves = [
        [[float(f"{v:.4g}") for v in values.tolist()] for values in chart.curves.values()]
        for _, charts in sections
        for chart in charts
    ]
    seconds = f"{episode.length / dataset.fps:.1f} s at {dataset.fps:g} per second"
    facts = [("dataset", str(dataset.root)), ("episode", str(episode.index))]
    facts.append(("length", f"{episode.length:,} frames, {seconds}"))
    features = [(key, feature) for key, feature in dataset.features.items() if key not in NUMBERING]
    page = render(
        "data/review/view.html",
        title=f"{dataset.name}, episode {episode.index}",
        task=episode.task.strip(),
        films=films,
        last=episode.length - 1,
        sections=sections,
        said=_said(dataset),
        facts=facts + [(key, f"{f.dtype} {' × '.join(map(str, f.shape))}") for key, f in features],
        values={"fps": dataset.fps, "curves": curves},
    )
    atomic_write(path, page)


def _said(dataset: Dataset) -> list[tuple[str, str, str]]:
    """When, what kind of text, and the text: of the language columns, or of subtask_index."""
    persistent, events = dataset.said(0)
    timed = [(one.timestamp or 0.0, one) for one in persistent]
    timed += [(frame / dataset.fps, one) for frame, items in events.items() for one in items]
    rows = [
        (
            seconds,
            ", ".join(filter(None, (one.style, one.role, one.camera))),
            one.content or ", ".join(one.tool_calls or ()),
        )
        for seconds, one in timed
    ]
    if "subtask_index" in dataset.features and (dataset.root / "meta/subtasks.parquet").exists():
        texts, numbers = dataset.texts("subtask")
        begins = (
            [] if any(one.style == "subtask" for one in persistent) else np.flatnonzero(np.diff(numbers, prepend=-1))
        )
        rows += [(frame / dataset.fps, "subtask", texts[numbers[frame]]) for frame in begins]
    return [(f"{seconds:.2f} s", kind, text) for seconds, kind, text in sorted(rows)]


def _shown(dataset: Dataset, without: Sequence[str]) -> list[str]:
    """The features to show: cameras of colours, and numbers that are no numbering."""
    features = [
        k for k, f in dataset.features.items() if f.kind == "image" or (f.kind == "vector" and "float" in f.dtype)
    ]
    if unknown := sorted(set(without) - set(features)):
        raise MissingFeatureError(
            expected=f"features to leave out, among {', '.join(features)}",
            found=shown(", ".join(unknown)),
            where=str(dataset.root),
            next="--without CAMERA",
        )
    return [key for key in features if key not in without and key not in NUMBERING]


def _images(dataset: Dataset, camera: str, show: bool) -> Iterator[np.ndarray]:
    with tqdm(total=dataset.num_frames, desc=camera, unit="frame", disable=not show, leave=False) as progress:
        for start in range(0, dataset.num_frames, FILM_BLOCK):
            rows = np.arange(start, min(start + FILM_BLOCK, dataset.num_frames))
            yield from dataset.images(camera, rows)
            progress.update(len(rows))


@dataclass(frozen=True)
class Chart:
    """One dimension over the episode."""

    name: str
    curves: dict[str, np.ndarray]
    """By kind, "state" or "action", [T]."""

    @property
    def low(self) -> float:
        return min(float(values.min()) for values in self.curves.values())

    @property
    def high(self) -> float:
        return max(float(values.max()) for values in self.curves.values())

    def points(self) -> Iterator[tuple[str, str]]:
        """Kind and SVG points of each curve."""
        for kind, values in self.curves.items():
            yield kind, polyline(values[:: max(1, -(-len(values) // POINTS))], self.low, self.high)


def _sections(dataset: Dataset, keys: Sequence[str]) -> Iterator[tuple[str, list[Chart]]]:
    """Charts of all numbers. A state and an action of as many dimensions share theirs: one follows the other."""
    floats = [key for key in keys if dataset.features[key].kind == "vector"]
    action = next((key for key in floats if is_action(key)), "")
    size = dataset.features[action].shape if action else ()
    state = next((key for key in floats if key != action and is_state(key) and dataset.features[key].shape == size), "")
    pairs = [(f"{state} and {action}", {"state": state, "action": action})] if state else []
    single = [key for key in floats if not state or key not in (state, action)]
    pairs += [(key, {"action" if is_action(key) else "state": key}) for key in single]
    for title, kinds in pairs:
        values = {kind: dataset.column(key) for kind, key in kinds.items()}
        names = feature_names(dataset, next(iter(kinds.values())))
        yield title, [Chart(name, {kind: v[:, d] for kind, v in values.items()}) for d, name in enumerate(names)]


def write_rerun(path: Path, dataset: Dataset, *, without: Sequence[str] = (), show: bool = True) -> None:
    """Write the only episode of `dataset` as a recording that the rerun viewer opens.

    Raises:
        ConfigError: rerun-sdk is not installed.
        DataError, StorageError: as `write_view`.
    """
    keys = _shown(dataset, without)
    try:
        rerun = importlib.import_module("rerun")
    except ImportError as error:
        raise ConfigError(
            expected="the package rerun-sdk",
            found="none",
            where="manipi view --rerun",
            next="pip install 'manipi[view]'  # or leave --rerun out, for a page that any browser shows",
        ) from error
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    recording = rerun.RecordingStream(f"manipi/{dataset.name}")
    recording.save(str(path))
    cameras = {camera: _images(dataset, camera, show) for camera in dataset.cameras if camera in keys}
    charts = [(title, chart) for title, group in _sections(dataset, keys) for chart in group]
    for frame in range(dataset.num_frames):
        recording.set_time("frame", sequence=frame)
        recording.set_time("time", duration=frame / dataset.fps)
        for camera, images in cameras.items():
            recording.log([camera], rerun.Image(next(images)).compress(jpeg_quality=85))
        for title, chart in charts:
            for kind, values in chart.curves.items():
                recording.log([title, chart.name, kind], rerun.Scalars(float(values[frame])))
    recording.flush()
