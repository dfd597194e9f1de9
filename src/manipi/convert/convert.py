"""Recordings of any known format become a LeRobot v3.0 dataset.

    SOURCE ──open──> episode ──encode──> .TARGET.parts/episode-000042/ ──┐   each process, one episode at a time
                                                                         │
    TARGET  <──rename──  packets and tables, one behind the other  <─────┘   at the end, one process

An episode's folder takes its name when it is complete. A conversion that was killed therefore goes on with the
episodes that have none, and comes to the same bytes. `TARGET` appears when all is done, and the parts vanish.
"""

import itertools
import os
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal, cast

import av
import numpy as np
from tqdm import tqdm

from manipi.convert.formats import EpisodeReader, RecordedEpisode
from manipi.data.dataset import Feature
from manipi.data.lerobot.episode import EpisodeEncoder, Pictures, Texts
from manipi.data.lerobot.language import LANGUAGE
from manipi.data.lerobot.writer import Parts
from manipi.errors import ConfigError, DataError, ManipiError, MissingFeatureError, StorageError, quoted, shown
from manipi.processes import on_cluster, start_helper
from manipi.records import fingerprint, json_bytes, read_json, to_json
from manipi.storage import atomic_directory, atomic_write, require_absent, storage_errors
from manipi.transforms.model_input import resize_with_pad
from manipi.types import Said


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """What becomes of the episodes. `None` and empty: as the source has it."""

    task: str = ""
    """The instruction of frames that have none."""
    fps: int | None = None
    robot_type: str = ""
    joins: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Vectors made of others: the name of the whole, and its parts in order."""
    resize: tuple[int, int] | None = None
    """Height and width; the aspect is kept, and the rest black."""
    rotate: Literal[0, 180] = 0
    """Degrees by which every picture is turned."""
    exclude: tuple[str, ...] = ()
    """Vectors and cameras to leave out, by the names that they would have."""
    swap_channels: tuple[str, ...] | None = None
    """Cameras whose red and blue were recorded in each other's place, to exchange them; empty: all of them."""
    pix_fmt: Literal["yuv420p", "yuv444p"] = "yuv420p"
    crf: int = 23

    def __post_init__(self) -> None:
        if not 0 <= self.crf <= 51 or min((self.fps or 1, *(self.resize or (1,)))) < 1 or self.fps == 0:
            raise ConfigError(
                expected="crf from 0 to 51; fps, height and width of at least 1",
                found=f"crf {self.crf}, fps {self.fps}, size {self.resize}",
                where="ConvertSettings",
                next="correct the flag",
            )


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What was converted."""

    target: str
    num_episodes: int
    num_frames: int
    reused: int
    """Episodes that an earlier, interrupted conversion had encoded."""
    skipped: tuple[tuple[str, str], ...]
    """Bad episodes that were left out, and why."""
    remarks: tuple[tuple[str, str], ...] = ()
    """Features that were left out, or read from an unusual layout, of the first episode that can be read; timestamps
    that are others now."""


def convert(
    reader: EpisodeReader,
    target: Path,
    settings: ConvertSettings,
    *,
    num_workers: int = 1,
    skip_bad: bool = False,
    ray: bool = False,
    show: bool = True,
) -> ConvertReport:
    """Write `target`, or go on writing it. Memory holds one episode's vectors and a block of its pictures per process.

    Args:
        num_workers: processes that encode; 0 encodes in the caller's. Any number gives the same bytes.
        skip_bad: leave out episodes that cannot be converted, where otherwise the first one ends it.
        ray: encode on a Ray cluster instead, whose hosts all see the recordings and `target`.

    Raises:
        ConfigError: no rate, instruction or part of a join; another conversion to `target` was begun or is going on.
        DataError: an episode that cannot be read; the others that are encoded stay for the next attempt.
        StorageError: `target` exists, or the disk is full.
    """
    parts = Parts(target, "conversion")
    if not parts.finished:
        require_absent(parts.target)
    encoder, remarks = _encoder(reader, settings, skip_bad)
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(reader.files())]
    wanted = {
        "settings": to_json(settings),
        "source": str(reader.root),
        "episodes and files": fingerprint([list(reader.names), stamps, reader.drop_skipped]),
        "encoder": av.__version__,
    }
    numbers = range(len(reader.names))
    try:
        with parts.claimed(), storage_errors(parts.target):
            # What was begun there must be this conversion, or its episodes would not belong together.
            if not (parts.episodes() or parts.finished):
                atomic_write(parts.begun, json_bytes(wanted))
            parts.require_own()
            begun = read_json(parts.begun)
            if changed := [name for name, value in wanted.items() if begun.get(name) != value]:
                raise ConfigError(
                    expected="the conversion that was begun there, to go on with it",
                    found=f"another: {', '.join(changed)} changed",
                    where=str(parts.folder),
                    next=f"repeat the first command, or start afresh with: rm -r {quoted(parts.folder)}",
                )
            if parts.finished:
                report = parts.settle()
            else:
                job = _Job(reader=reader, encoder=encoder, settings=settings, parts=parts, skip_bad=skip_bad)
                todo = [number for number in numbers if not parts.episode(number).exists()]
                reused, total, bad = len(numbers) - len(todo), len(numbers), dict[int, str]()
                bar = tqdm(desc="encode", unit="episode", initial=reused, total=total, disable=not show)
                running = on_cluster(job, [(number,) for number in todo]) if ray else _run(job, todo, num_workers)
                with bar, closing(running) as results:
                    for number, error in results:
                        if ray and not error:
                            _require_shared(parts.episode(number))
                        bad |= {number: error} if error else {}
                        bar.update()
                folders = [parts.episode(number) for number in numbers if number not in bad]
                skipped = [(reader.names[number], bad[number]) for number in sorted(bad)]
                report = {"reused": reused, "skipped": skipped, "remarks": remarks}
                robot_type, files = settings.robot_type or reader.robot_type, reader.kept_files()
                report = parts.finish(folders, encoder, robot_type, report, files=files, show=show)
    except StorageError as error:
        again = "make room, or allow writing there, and run the same command again"
        next = f"{again}; finished episodes wait in {parts.folder}"
        raise StorageError(expected=error.expected, found=error.found, where=error.where, next=next) from error
    pairs = {key: tuple((name, text) for name, text in report[key]) for key in ("skipped", "remarks")}
    return ConvertReport(**{**report, "target": str(parts.target), **pairs})


def _encoder(
    reader: EpisodeReader, settings: ConvertSettings, skip_bad: bool
) -> tuple[EpisodeEncoder, tuple[tuple[str, str], ...]]:
    """Features and rate, and the remarks, of the first episode that can be read."""
    fps = settings.fps or reader.fps
    if fps is None or fps != round(fps):
        raise ConfigError(
            expected="a whole number of frames per second",
            found="none in the source" if fps is None else f"{fps}",
            where=str(reader.root),
            next="--fps N",
        )
    for name in reader.names:
        features = {}
        try:
            with reader.open(name) as episode:
                for key, values in _converted(episode, reader, settings, name)[0].items():
                    if isinstance(values, np.ndarray):
                        names = reader.dimension_names.get(key, ())
                        names = names if len(names) == values.shape[1] else ()
                        shape, dtype = values.shape[1:], str(values.dtype)
                        features[key] = Feature(kind="vector", shape=shape, dtype=dtype, names=names)
                    elif key in episode.language:
                        features[key] = LANGUAGE
                    else:
                        shape = next((block.shape[1:] for block in cast(Pictures, values)), ())
                        features[key] = Feature(kind="image", shape=shape, dtype="video")
                remarks = episode.remarks
        except (DataError, ConfigError):
            if not skip_bad or name == reader.names[-1]:
                raise
            continue
        encoder = EpisodeEncoder(features=features, fps=round(fps), pix_fmt=settings.pix_fmt, crf=settings.crf)
        pairs = [*remarks.items(), *reader.remarks(fps).items()]
        return encoder, tuple((k, text) for k, text in pairs if text and k not in settings.exclude)
    raise AssertionError("a reader has at least one episode")


# One episode --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a process needs to encode any episode. Everything in it pickles."""

    reader: EpisodeReader
    encoder: EpisodeEncoder
    settings: ConvertSettings
    parts: Parts
    skip_bad: bool

    def __call__(self, number: int) -> tuple[int, str]:
        """Encode an episode; its number, and why it was skipped."""
        name = self.reader.names[number]
        try:
            with self.reader.open(name) as episode, atomic_directory(self.parts.episode(number)) as folder:
                data, task = _converted(episode, self.reader, self.settings, name)
                self.encoder.encode(folder, data, task, f"{self.reader.root}, {name}")
        except (DataError, ConfigError) as error:
            if not self.skip_bad:
                raise
            return number, f"{error.where}: expected {error.expected}, found {error.found}"
        return number, ""


def _converted(
    episode: RecordedEpisode, reader: EpisodeReader, settings: ConvertSettings, name: str
) -> tuple[Mapping[str, np.ndarray | Pictures | Texts], str | list[str]]:
    """The vectors, those joined of others, the pictures, turned and resized, and the language columns; the instruction,
    or one per frame."""
    where = f"{reader.root}, {name}"
    usual = [(whole, parts) for whole, parts in reader.joins if all(part in episode.columns for part in parts)]
    names = [*episode.columns, *(whole for whole, _ in (*settings.joins, *usual)), *episode.pictures, *episode.language]
    for flag, named, known in (
        ("exclude", settings.exclude, (*names, *episode.remarks)),
        ("swap-channels", settings.swap_channels or (), episode.pictures),
    ):
        if unknown := sorted(set(named) - set(known)):
            raise MissingFeatureError(
                expected=f"names for --{flag}, among {', '.join(dict.fromkeys(known))}",
                found=shown(", ".join(unknown)),
                where=where,
                next=f"--{flag} NAME",
            )
    columns = {key: episode.columns[key] for key in episode.columns if key not in settings.exclude}
    for whole, parts in (*settings.joins, *usual):
        if missing := [part for part in parts if part not in episode.columns]:
            raise MissingFeatureError(
                expected=f"the vectors {', '.join(missing)}, to join into {whole!r}",
                found=f"only {', '.join(episode.columns)}",
                where=where,
                next=f"--join {whole}=NAME,NAME",
            )
        if (whole, parts) in settings.joins or whole not in columns:
            columns[whole] = np.concatenate([episode.columns[part] for part in parts], axis=1)
    data = columns | {camera: _Shown(blocks, settings, camera) for camera, blocks in episode.pictures.items()}
    data |= {key: list(_retimed(items, episode, reader, settings)) for key, items in episode.language.items()}
    tasks = [text or settings.task for text in ([episode.task] if isinstance(episode.task, str) else episode.task)]
    if not all(tasks):
        raise ConfigError(
            expected="an instruction, which tells the policy what to do",
            found="none in the source",
            where=where,
            next='--task "what the robot does there"',
        )
    task = tasks[0] if isinstance(episode.task, str) else tasks
    return {key: values for key, values in data.items() if key not in settings.exclude}, task


def _retimed(
    items: Texts, episode: RecordedEpisode, reader: EpisodeReader, settings: ConvertSettings
) -> Iterator[tuple[int, Said]]:
    """Texts that begin to hold at the frames at which they did; without those about cameras that are left out."""
    assert episode.seconds is not None, "a reader that knows texts knows the time"
    seconds_T, fps = episode.seconds.astype(np.float32), settings.fps or reader.fps or 1
    moved = not np.array_equal(seconds_T, (np.arange(len(seconds_T)) / fps).astype(np.float32))
    for frame, one in items:
        if one.timestamp is not None and moved:
            one = replace(one, timestamp=float(np.searchsorted(seconds_T, np.float32(one.timestamp)) / fps))
        if one.camera not in settings.exclude:
            yield frame, one


@dataclass(frozen=True)
class _Shown:
    """Pictures as the dataset is to show them."""

    blocks: Iterable[np.ndarray]
    settings: ConvertSettings
    camera: str

    def __iter__(self) -> Iterator[np.ndarray]:
        swapped = self.settings.swap_channels
        for block in self.blocks:
            turned = block[:, ::-1, ::-1] if self.settings.rotate else block
            if swapped is not None and (not swapped or self.camera in swapped):
                turned = turned[..., ::-1]
            if self.settings.resize and turned.shape[1:3] != self.settings.resize:
                turned = np.stack([resize_with_pad(image, *self.settings.resize) for image in turned])
            yield turned


# Processes ----------------------------------------------------------------------------------------------------------


def _require_shared(folder: Path) -> None:
    if not folder.exists():
        raise StorageError(
            expected="an episode that a host of the Ray cluster wrote, in a folder that this one sees, too",
            found="none",
            where=str(folder),
            next="convert to a folder that all hosts share, or without --ray",
        )


def _run(job: _Job, numbers: list[int], num_workers: int) -> Generator[tuple[int, str], None, None]:
    """Results in the order in which they are ready.

    Pipes alone join the processes: what a pool's queues are made of has names in /dev/shm, which stay there when all
    processes are killed at once.
    """
    if not num_workers:
        yield from map(job, numbers)
        return
    waiting, workers = iter(numbers), dict[Connection, BaseProcess]()
    try:
        for number in itertools.islice(waiting, num_workers):
            process, worker = start_helper(_work, job)
            workers[worker] = process
            worker.send(number)
        while workers:
            ready = wait(list(workers))
            for worker in [worker for worker in workers if worker in ready]:
                result = worker.recv()
                if isinstance(result, ManipiError):
                    raise result
                yield result
                if (number := next(waiting, None)) is not None:
                    worker.send(number)
                else:
                    workers.pop(worker).kill()
    except (EOFError, ConnectionError):
        raise DataError(
            expected="processes that encode until all is done",
            found="the end of one (its error stands above; without one it was killed, often for want of memory)",
            where=str(job.reader.root),
            next="run the same command again, with a smaller --num-workers",
        ) from None
    finally:
        for process in workers.values():
            process.kill()
        for process in workers.values():
            process.join()


def _work(job: _Job, caller: Connection) -> None:
    """Encode the episodes that the caller names, one after the other; its end ends this process at once."""
    numbers = queue.SimpleQueue[int]()

    def listen() -> None:
        try:
            while True:
                numbers.put(caller.recv())
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        try:
            result = job(numbers.get())
        except ManipiError as error:
            result = error
        caller.send(result)
