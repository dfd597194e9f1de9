"""Norm stats of a robot of 14 dimensions, or `--dims`: frames per second on two cores, and beside openpi's own way.

Rates are frames per second of processor time, times two, which is what two free cores give; wall time is printed
beside them. `memory`: the columns are there; `parquet`: they are read from a LeRobot dataset first.

openpi's script (scripts/compute_norm_stats.py) reads every frame with its pictures through LeRobotDataset, in worker
processes, and passes batches of 32 through its class RunningStats. It needs JAX and an old LeRobot, so its two dear
parts are measured instead, on frames and chunks of the same kind: the class itself, and LeRobotDataset 0.4.4 where
`MANIPI_LEROBOT_PYTHON` names a Python that has it (`make test-lerobot` makes one), three cameras and as many processes
as cores. Otherwise our own reader decodes as many pictures, which takes a part of the time.

    python benchmarks/bench_stats.py --openpi FOLDER      a git repository of openpi, to read the class from
"""

import argparse
import importlib.util
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from harness import Measure, lerobot_dataset, report

from manipi.data.dataset import Dataset, Feature, action_chunks
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.data.norm_stats import Workers, compute_norm_stats
from manipi.data.open import open_dataset
from manipi.robots import Joints, Robot, State

HORIZON, LENGTH, CORES = 50, 500, 2
REPEATS, OPENPI_FRAMES, BATCH = 5, 8_192, 32
CAMERAS = ("top", "left_wrist", "right_wrist")


def robot(dims: int, *, relative: bool) -> Robot:
    state = (State("observation.state", dims),)
    actions = (Joints(dims, relative=relative),)
    return Robot(name="bench", cameras={"base": "top"}, state=state, actions=actions, action_key="action")


def write(root: Path, episodes: int, dims: int, *, pictures: bool) -> Path:
    """Smooth random walks; with pictures of 480 by 640, as in the sets that openpi is fine-tuned on."""
    vector = Feature(kind="vector", shape=(dims,), dtype="float32")
    features = {"observation.state": vector, "action": vector}
    if pictures:
        features |= dict.fromkeys(CAMERAS, Feature(kind="image", shape=(480, 640, 3), dtype="video"))
    rng = np.random.default_rng(0)
    with LeRobotWriter(root, fps=50, features=features, robot_type="bench") as writer:
        for _ in range(episodes):
            action = np.sin(np.cumsum(rng.normal(0, 0.02, (LENGTH, dims)), axis=0)).astype(np.float32)
            state = action + rng.normal(0, 0.01, action.shape).astype(np.float32)
            episode = {"observation.state": state, "action": action}
            if pictures:
                noise = rng.integers(0, 256, (LENGTH, 15, 20, 3), dtype=np.uint8)
                episode |= dict.fromkeys(CAMERAS, noise.repeat(32, axis=1).repeat(32, axis=2))
            writer.add_episode(episode, task="bench")
    return root


@dataclass
class Rate:
    frames: int
    cpu_s: float
    wall_s: float

    @property
    def two_cores(self) -> float:
        return CORES * self.frames / self.cpu_s


def timed(frames: int, run: Callable[[], object]) -> Rate:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Rate(frames, time.process_time() - cpu, time.perf_counter() - wall)


def ours(dataset: Dataset, *, relative: bool) -> Rate:
    rows = np.arange(dataset.num_frames)
    workers, dims = Workers(threads=CORES), dataset.features["action"].shape[0]
    return timed(
        len(rows), lambda: compute_norm_stats(dataset, robot(dims, relative=relative), HORIZON, rows, workers=workers)
    )


def running_stats(repository: Path) -> type:
    """openpi's class, from its repository, into a temporary module; nothing of it is kept."""
    source = ["git", "-C", str(repository), "show", "HEAD:src/openpi/shared/normalize.py"]
    text = subprocess.run(source, capture_output=True, text=True, check=True).stdout
    # Its file layer needs packages that the class does not.
    text = text[text.index("class RunningStats") : text.index("class _NormStatsDict")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "running_stats.py"
        header = "import numpy as np\nfrom types import SimpleNamespace as NormStats\n\n\n"
        path.write_text(f"from __future__ import annotations\n{header}{text}")
        spec = importlib.util.spec_from_file_location("running_stats", path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.RunningStats


def theirs(kind: type, dataset: Dataset) -> Rate:
    """Relative chunks in batches of 32 through openpi's class; making the chunks is not counted."""
    rows = np.arange(OPENPI_FRAMES)
    state = dataset.column("observation.state")[rows]
    chunks = action_chunks(dataset, rows, action_key="action", horizon=HORIZON)[0] - state[:, None]
    stats = {"state": kind(), "actions": kind()}

    def run() -> None:
        for start in range(0, OPENPI_FRAMES, BATCH):
            stats["state"].update(state[start : start + BATCH])
            stats["actions"].update(chunks[start : start + BATCH])

    return timed(OPENPI_FRAMES, run)


def decoding(dataset: Dataset) -> Rate:
    """The pictures of some frames, by our own reader."""
    rows = np.arange(0, dataset.num_frames, 2)
    batches = [(camera, rows[i : i + BATCH]) for camera in CAMERAS for i in range(0, len(rows), BATCH)]
    return timed(len(rows), lambda: [dataset.images(*batch) for batch in batches])


@contextmanager
def through_lerobot(root: Path) -> Iterator[Callable[[], Rate]]:
    """What reads some frames through LeRobotDataset, in order; a rate on the wall, of as many processes as cores."""
    skip, count = 2 * CORES, 8
    task = {"root": str(root), "action": "action", "fps": 50, "horizon": HORIZON, "batch": BATCH, "workers": CORES}
    rows = [i % LENGTH for i in range((REPEATS + 2) * (skip + count) * BATCH)]
    with lerobot_dataset(task | {"skip": skip, "count": count, "rows": rows}) as (rate, _):

        def read() -> Rate:
            wall_s = count * BATCH / rate()
            return Rate(count * BATCH, CORES * wall_s, wall_s)

        yield read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--openpi", type=Path)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--dims", type=int, default=14, help="of state and action; the goals are for 14")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = write(Path(folder) / "columns", args.episodes, args.dims, pictures=False)
        rates: dict[str, list[Rate]] = {}
        kind = running_stats(args.openpi) if args.openpi else None
        filmed = write(Path(folder) / "filmed", 1, args.dims, pictures=True) if kind else root
        is_lerobot = kind is not None and "MANIPI_LEROBOT_PYTHON" in os.environ
        ours_instead = nullcontext(partial(decoding, open_dataset(filmed)))
        with through_lerobot(filmed) if is_lerobot else ours_instead as read:
            for _ in range(REPEATS):
                for relative, name in ((False, "absolute"), (True, "relative")):
                    dataset = open_dataset(root)
                    rates.setdefault(f"{name}, parquet", []).append(ours(dataset, relative=relative))
                    rates.setdefault(f"{name}, memory", []).append(ours(dataset, relative=relative))
                if kind:
                    rates.setdefault("openpi's RunningStats", []).append(theirs(kind, dataset))
                    rates.setdefault("reading, 3 cameras", []).append(read())
    middle = {name: sorted(some, key=lambda rate: rate.two_cores)[REPEATS // 2] for name, some in rates.items()}
    for name, rate in middle.items():
        wall = f"{rate.frames / rate.wall_s:>12,.0f} frames/s on the wall"
        print(f"{name:<24}{rate.two_cores:>12,.0f} frames/s on two cores{wall}   cpu {rate.cpu_s:.2f} s")
    goals = {"absolute": 1e6, "relative": 2e5}
    measures = [
        Measure(name=name, value=rate.two_cores, unit="frames/s", goal=goals[name.split(",")[0]], at_most=False)
        for name, rate in middle.items()
        if name.split(",")[0] in goals
    ]
    if kind:
        class_s, reading_s = (1 / middle[name].two_cores for name in ("openpi's RunningStats", "reading, 3 cameras"))
        ratio = middle["relative, parquet"].two_cores * (class_s + reading_s)
        way = "openpi's way, with LeRobotDataset" if is_lerobot else "openpi's way, with our reader"
        measures.append(Measure(name=f"relative, beside {way}", value=ratio, unit="times", goal=1_000, at_most=False))
    report(measures)


if __name__ == "__main__":
    main()
