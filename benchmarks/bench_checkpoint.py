"""How long a save holds training, beside a synchronous `torch.save` of the same state.

    python benchmarks/bench_checkpoint.py [--rounds 5] [--folder FOLDER]

Two layers of π0.5 at full width with small MLPs; the state (weights, average, moments) is more than 1 GB. One round is
a step without a save, a save with the step after it, and a `torch.save`, each once nothing else is under way. What a
save holds is the time in `save`, and the wait for its copy before the update. The step after a save also shares the
processors with the copy and the writer; how much longer it takes is printed beside.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from harness import Measure, report

from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.model import ModelInput
from manipi.model.config import GemmaSize, Pi05Config, VisionSize
from manipi.robots.tabletop import TABLETOP
from manipi.train.config import ComputeConfig, DataConfig, TrainConfig
from manipi.train.data import prepare
from manipi.train.loop import checkpoint_writer
from manipi.train.run.folder import Run, alone
from manipi.train.run.saving import AsyncSaver, _fixed
from manipi.train.step.state import TrainState
from manipi.train.step.step import train_step

MODEL = Pi05Config(
    vlm=GemmaSize(width=2048, depth=2, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=256),
    action_expert=GemmaSize(width=1024, depth=2, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256),
    vision=VisionSize(width=1152, depth=1, mlp_dim=4304, num_heads=16, patch_size=14, image_size=224),
    vocab_size=1024,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, alone(Path(folder)) as lock:
        data = DataConfig(path=str(_dataset(Path(folder) / "dataset")), holdout=0.0, num_workers=0)
        compute = ComputeConfig(precision="fp32")  # bfloat16 is slow on processors without it
        config = TrainConfig(robot=TABLETOP, data=data, model=MODEL, batch_size=1, compute=compute)
        state, run, prepared = TrainState.initial(config), Run(Path(folder), config), prepare(config, Path(folder))
        with prepared.loader(0) as loader:
            _, samples, _ = next(iter(loader))
        batch = ModelInput.from_numpy(samples)
        with AsyncSaver(checkpoint_writer(run, prepared), state, lock) as saver:
            times = Times(saver)
            for _ in range(1 + args.rounds):  # the first is for warming up
                _round(times, saver, state, config, batch, Path(folder) / "state.pt")
    _report(times, sum(t.nbytes for t in state._tensors().values()))


class Times:
    """Seconds by what they were spent on, of every round."""

    def __init__(self, saver: AsyncSaver):
        self.found: dict[str, list[float]] = {}
        before_update = saver._before_update

        def timed() -> None:
            with self.of("join"):
                before_update()

        saver._before_update = timed

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.found.setdefault(name, []).append(time.perf_counter() - began)

    def median(self, name: str) -> float:
        return statistics.median(self.found[name][1:])


def _round(
    times: Times, saver: AsyncSaver, state: TrainState, config: TrainConfig, batch: ModelInput, file: Path
) -> None:
    with times.of("step"):
        train_step(state, batch, config)
    times.found["join"].pop()
    with times.of("save"):
        saver.save([])
    with times.of("step after"):
        train_step(state, batch, config)
    with times.of("writer"):
        saver.wait()
    with times.of("copy alone"):
        saver._snapshot.copy(saver._snapshot.source(_fixed(state._tensors())))
    with times.of("torch.save"):
        torch.save(state._tensors(), file)
    file.unlink()
    print(", ".join(f"{name} {found[-1]:.3f} s" for name, found in times.found.items()), flush=True)


def _report(times: Times, size: int) -> None:
    held = [save + join for save, join in zip(times.found["save"], times.found["join"], strict=True)][1:]
    shares = [one / whole for one, whole in zip(held, times.found["torch.save"][1:], strict=True)]
    names = ("step", "step after", "save", "join", "copy alone", "writer", "torch.save")
    print(f"state of {size / 1e9:.2f} GB;", ", ".join(f"{name} {times.median(name):.3f} s" for name in names))
    for number, share in enumerate(shares, 1):
        print(f"round {number}: held {held[number - 1]:.3f} s, {share:.1%} of torch.save")
    slower = times.median("step after") - times.median("step")
    print(f"the step after a save takes {slower:.2f} s longer, {slower / times.median('torch.save'):.1%} of torch.save")
    share = statistics.median(shares)
    report([Measure(name="checkpoint stall, of torch.save", value=100 * share, unit="%", goal=5)])


def _dataset(root: Path) -> Path:
    """Noise, in the robot's keys."""
    rng = np.random.default_rng(0)
    features = {"observation/image": Feature(kind="image", shape=(224, 224, 3), dtype="video")}
    features |= {key: Feature(kind="vector", shape=(4,), dtype="float32") for key in ("observation/state", "actions")}
    with LeRobotWriter(root, fps=10, features=features, robot_type=TABLETOP.name) as writer:
        episode = {key: rng.random((12, 4)).astype(np.float32) for key in ("observation/state", "actions")}
        pictures = rng.integers(0, 255, (12, 224, 224, 3), dtype=np.uint8)
        writer.add_episode({"observation/image": pictures, **episode}, task="reach it")
    return root


if __name__ == "__main__":
    main()
