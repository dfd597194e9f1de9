"""How fast samples come: random frames, the cache, a whole loader beside LeRobot's; and the memory of ten epochs.

A sample is what π0.5 trains on: three cameras at 224 px, 14 state dimensions, a chunk of 50 steps, a prompt, all behind
the whole pipeline. The dataset is written here, by LeRobotWriter (H.264, a keyframe every second frame), with the real
pictures of `MANIPI_SHARED/datasets/g1_bottle_lerobot_v30` where it is present, else with moving noise.

Rates of one process are per second of its CPU time; those of two loaders come from turns that alternate. The median of
the turns counts. `MANIPI_LEROBOT_PYTHON` names a Python in which lerobot and its video backend import; without it the
comparison is left out, and said so. It compares equal samples: whole pictures, state, chunk and prompt, without the
pipeline, which LeRobotDataset does not have.
"""

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from multiprocessing import active_children
from pathlib import Path

import av
import numpy as np
from harness import Measure, lerobot_dataset, report

from manipi.data.dataset import Dataset, Feature
from manipi.data.feed.cache import CachedDataset, CacheFormat
from manipi.data.feed.loader import Loader
from manipi.data.feed.mixture import EncodedDataset
from manipi.data.feed.sampler import Sampler, Stream
from manipi.data.lerobot.video import VideoFrames
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.data.norm_stats import compute_norm_stats
from manipi.data.open import open_dataset
from manipi.model.config import Pi05Config
from manipi.robots.robot import Joints, Robot, State
from manipi.tokenizers import ByteTokenizer, Tokenizers
from manipi.transforms import pipeline

EPISODES, LENGTH, HEIGHT, WIDTH, FPS = 8, 100, 480, 640, 30
BATCH, HORIZON, TURNS, EPOCHS, WORKERS = 32, 50, 5, 10, 2
REAL = Path(os.environ.get("MANIPI_SHARED", Path(__file__).parents[1] / "../shared")) / "datasets/g1_bottle_lerobot_v30"
SLOTS = ("base", "left_wrist", "right_wrist")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = write(Path(folder) / "written")
        measures = [*random_access(written, Path(folder)), *from_cache(written, Path(folder)), ten_epochs(written)]
        print(
            f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores;", *(f"{m.name} {m.value:.4g};" for m in measures)
        )
        for name, root in {"H.264": written, "AV1": REAL}.items():
            if "MANIPI_LEROBOT_PYTHON" not in os.environ:
                print("beside LeRobotDataset: left out, MANIPI_LEROBOT_PYTHON is not set")
                break
            if root.is_dir():
                measures.append(beside_lerobot(name, root))
    report(measures)


# Data ---------------------------------------------------------------------------------------------------------------


def pictures() -> np.ndarray:
    if REAL.is_dir():
        dataset = open_dataset(REAL)
        return dataset.images(dataset.cameras[0], np.arange(LENGTH))
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    still = noise.repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([np.roll(still, 2 * i, axis=1) for i in range(LENGTH)])


def write(root: Path) -> Path:
    shown, rng = pictures(), np.random.default_rng(0)
    features = {f"images.{slot}": Feature(kind="image", shape=(HEIGHT, WIDTH, 3), dtype="video") for slot in SLOTS}
    features |= {key: Feature(kind="vector", shape=(14,), dtype="float32") for key in ("state", "action")}
    with LeRobotWriter(root, fps=FPS, features=features, robot_type="bench", video_mb=3) as writer:
        for _ in range(EPISODES):
            vectors = {key: rng.standard_normal((LENGTH, 14)).astype(np.float32) for key in ("state", "action")}
            writer.add_episode({f"images.{slot}": shown for slot in SLOTS} | vectors, task="pick up the bottle")
    return root


def source(dataset: Dataset) -> EncodedDataset:
    state, action = (next(k for k in dataset.features if k.endswith(name)) for name in ("state", "action"))
    size = dataset.features[action].shape[0]
    robot = Robot(
        name="bench",
        cameras=dict(zip(SLOTS, dataset.cameras, strict=False)),
        state=(State(state, dataset.features[state].shape[0]),),
        actions=(Joints(size, relative=True),),
        action_key=action,
    )
    stats = compute_norm_stats(dataset, robot, HORIZON, np.arange(dataset.num_frames))
    model = Pi05Config(action_horizon=HORIZON)
    steps = pipeline.build(robot, model, stats, Tokenizers(ByteTokenizer(), None), "quantile")
    return EncodedDataset(dataset=dataset, pipeline=steps, action_horizon=HORIZON)


def bare_samples(source: EncodedDataset, rows: np.ndarray) -> list[dict[str, np.ndarray]]:
    """What LeRobotDataset returns."""
    return [{**f.observation, "actions": f.actions, "valid": f.action_valid} for f in source.frames(rows)]


# Measurements -------------------------------------------------------------------------------------------------------


def random_access(written: Path, folder: Path) -> Iterator[Measure]:
    ours, theirs = sorted(written.rglob("*.mp4"))[0], folder / "lerobot.mp4"
    with av.open(str(theirs), "w") as container:  # lerobot's settings for H.264
        stream = container.add_stream("libx264", rate=FPS, options={"g": "2", "crf": "30"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for picture in pictures():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    videos, times = VideoFrames(), np.random.default_rng(0).integers(0, LENGTH, 200) / FPS

    def rate(path: Path) -> float:
        began = time.process_time()
        for seconds in times.tolist():
            videos.frame(path, seconds, where="")
        return len(times) / (time.process_time() - began)

    for name, path in {"LeRobotWriter's": ours, "lerobot's": theirs}.items():
        value = median_of(lambda path=path: rate(path))
        yield Measure(name=f"random access, {name} file", value=value, unit="frames/s", goal=300, at_most=False)


def from_cache(written: Path, folder: Path) -> Iterator[Measure]:
    def rate(loader: Iterator) -> float:
        next(loader)
        began, (worker,) = 0.0, active_children()
        # A worker is two batches ahead, at the beginning as at the end.
        began = cpu_seconds(worker.pid)
        for _ in range(20):
            next(loader)
        return 20 * BATCH / (cpu_seconds(worker.pid) - began)

    formats: tuple[CacheFormat, ...] = ("raw", "jpeg")
    for format in formats:
        dataset = open_dataset(written)
        cached = CachedDataset(dataset, dataset.cameras, folder / "cache", 224, format=format)
        with batches(source(cached), num_workers=1) as loader:
            for _ in range(-(-dataset.num_frames // BATCH)):
                next(loader)  # the first epoch fills the cache
            value = median_of(lambda loader=loader: rate(loader))
        goal = 1000 if format == "raw" else 400
        yield Measure(name=f"{format} cache, per worker", value=value, unit="samples/s", goal=goal, at_most=False)


def ten_epochs(written: Path) -> Measure:
    rows = np.arange(0, EPISODES * LENGTH, 5)
    sizes, steps = [], len(rows) // BATCH
    with batches(source(open_dataset(written)), rows, num_workers=WORKERS) as loader:
        for _ in range(EPOCHS):
            for _ in range(steps):
                next(loader)
            sizes.append(sum(proportional_mb(pid) for pid in (os.getpid(), *(c.pid for c in active_children()))))
    print("memory of all processes per epoch, MB:", *(f"{size:.0f}" for size in sizes))
    growth = 100 * (max(sizes[EPOCHS // 2 :]) / max(sizes[: EPOCHS // 2]) - 1)
    return Measure(name="memory, epochs 6-10 over 1-5", value=growth, unit="% more", goal=5)


def beside_lerobot(name: str, root: Path) -> Measure:
    dataset = open_dataset(root)
    skip, count, batch = 2 * WORKERS, 6, 16
    shown = source(dataset)
    sampler = Sampler(Stream(dataset.num_frames, seed=0, fingerprint=dataset.fingerprint), batch)
    rows = [sampler.rows(step).tolist() for step in range((TURNS + 2) * (skip + count))]
    task = {"root": str(root), "action": shown.pipeline.robot.action_key, "fps": dataset.fps, "horizon": HORIZON}
    task |= {"batch": batch, "workers": WORKERS, "skip": skip, "count": count, "rows": [*chain(*rows)]}
    pairs = []
    with (
        lerobot_dataset(task) as (rate, group),
        Loader(partial(bare_samples, shown), sampler, num_workers=WORKERS) as loader,
    ):
        ours = iter(loader)
        list(islice(ours, skip))
        for _ in range(TURNS):
            # Workers make batches ahead, and would do so in the other's turn.
            with stopped(*(child.pid for child in active_children() if child.pid)):
                their_rate = rate()
            with stopped(-group):
                list(islice(ours, skip))
                began = time.perf_counter()
                list(islice(ours, count))
                pairs.append((count * batch / (time.perf_counter() - began), their_rate))
    print(f"{name}: samples/s, ours and LeRobotDataset's:", *(f"{a:.0f}/{b:.1f}" for a, b in pairs))
    ratio = statistics.median(a / b for a, b in pairs)
    return Measure(name=f"over LeRobotDataset, {name}", value=ratio, unit="times", goal=3, at_most=False)


# Tools --------------------------------------------------------------------------------------------------------------


@contextmanager
def batches(source: EncodedDataset, rows: np.ndarray | None = None, *, num_workers: int) -> Iterator[Iterator]:
    rows = np.arange(source.dataset.num_frames) if rows is None else rows
    with Loader(source.samples, Sampler(Stream(rows, seed=0), BATCH), num_workers=num_workers) as loader:
        yield iter(loader)


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes that stand still meanwhile; a negative number is a group of them."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def median_of(measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(TURNS))


def cpu_seconds(pid: int | None) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def proportional_mb(pid: int | None) -> float:
    """Memory of a process, with what several share divided among them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


if __name__ == "__main__":
    main()
