"""A learnable toy dataset, and training configs so small that a run takes a second.

What takes seconds to import is imported by the fixtures: pytest-xdist's own process runs no test.
"""

import gc
import hashlib
import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
from filelock import FileLock
from tests.forks import PYTHONS, spawn_by_forking
from tests.interrupt import interruptible
from tests.skips import pytest_sessionfinish, pytest_terminal_summary

from manipi.data.dataset import Feature
from manipi.evaluate import policies
from manipi.model.config import GemmaSize, Pi0FastConfig, VisionSize
from manipi.recipes.registry import load_recipe
from manipi.robots.tabletop import TABLETOP
from manipi.train.config import DataConfig, OptimizerConfig, TrainConfig, ValidationConfig

__all__ = ["interruptible", "pytest_sessionfinish", "pytest_terminal_summary"]

spawn_by_forking()

# Examples have no deadline: timings are no tests.
hypothesis.settings.register_profile("short", deadline=None, max_examples=40)
hypothesis.settings.register_profile("long", deadline=None, max_examples=400)
hypothesis.settings.load_profile("short")

IMAGE_SIZE = 16
EPISODE_LENGTHS = (12, 7, 9, 3, 11, 8, 10, 5)
RECIPES = {"pi05": "tabletop", "pi0": "tabletop_pi0", "pi0_fast": "tabletop_pi0_fast"}
RECIPES["joint"] = "manipi.tabletop.recipes:joint_tabletop"
TINY = GemmaSize(width=32, depth=1, mlp_dim=48, num_heads=2, num_kv_heads=1, head_dim=16)


def toy_episode(number: int, length: int) -> dict[str, np.ndarray]:
    """The arm walks at random; the colour of the picture says which way it is told to go."""
    rng = np.random.default_rng(number)
    colour = rng.integers(0, 2, 3)
    position = np.cumsum(rng.normal(0, 0.01, (length, 3)), axis=0)
    gripper = (np.arange(length) < length / 2).astype(float)[:, None]
    towards = (colour * 2 - 1) * 0.02
    images = np.broadcast_to((60 + colour * 130).astype(np.uint8), (length, IMAGE_SIZE, IMAGE_SIZE, 3))
    return {
        "observation/image": np.ascontiguousarray(images),
        "observation/state": np.concatenate([position, gripper], axis=1).astype(np.float32),
        "actions": np.concatenate([position + towards, gripper], axis=1).astype(np.float32),
    }


@pytest.fixture(scope="session")
def toy_episodes() -> list[dict[str, np.ndarray]]:
    return [toy_episode(number, length) for number, length in enumerate(EPISODE_LENGTHS)]


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`once(name, make)` is a folder that `make` was called with, once for all processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = root / name, root / f"{name}.made"
        root.mkdir(exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            if not made.exists():
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def toy_dataset(toy_episodes, once) -> Path:
    """A LeRobot dataset for the robot `tabletop`; tests that change it take a copy."""
    features = {
        "observation/image": Feature(kind="image", shape=(IMAGE_SIZE, IMAGE_SIZE, 3), dtype="video"),
        "observation/state": Feature(kind="vector", shape=(4,), dtype="float32"),
        "actions": Feature(kind="vector", shape=(4,), dtype="float32"),
    }

    from manipi.data.lerobot.writer import LeRobotWriter

    def write(folder: Path) -> None:
        settings = {"fps": 10, "features": features, "robot_type": TABLETOP.name, "pix_fmt": "yuv444p"}
        with LeRobotWriter(folder / "dataset", **settings) as writer:
            for episode in toy_episodes:
                writer.add_episode(episode, task="reach it")

    return once("toy", write) / "dataset"


@pytest.fixture(scope="session")
def tiny(toy_dataset) -> Callable[..., TrainConfig]:
    """`tiny("pi05", steps=3)` is the tabletop recipe of that policy, shrunk, on the toy dataset."""

    def shrink(kind: str = "pi05", **changes) -> TrainConfig:
        recipe = load_recipe(RECIPES[kind])
        vision = VisionSize(width=16, depth=1, mlp_dim=32, num_heads=2, patch_size=8, image_size=IMAGE_SIZE)
        sizes = {"vision": vision, "vlm": TINY, "action_horizon": 4}
        if not isinstance(recipe.model, Pi0FastConfig):
            sizes["action_expert"] = replace(TINY, width=16)
        settings = {
            "data": DataConfig(path=str(toy_dataset), holdout=0.25, num_workers=0),
            "model": replace(recipe.model, **sizes),
            "optimizer": OptimizerConfig(lr=3e-3, final_lr=3e-4, warmup_steps=4, decay_steps=80),
            "steps": 6,
            "batch_size": 4,
            "noise_draws": 2,
            "log_every": 1,
            "save_every": 2,
            "num_threads": 1,
            "async_save": False,
            "validation": ValidationConfig(every=0),
        }
        return replace(recipe, **settings | changes)

    return shrink


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the long forms: tests marked long, and more examples")


def pytest_configure(config):
    if config.getoption("--long"):
        hypothesis.settings.load_profile("long")


def pytest_collection_modifyitems(config, items):
    """The slow ones first: one that began last would keep a core busy alone. Long forms where they are asked for."""
    long = {item for item in items if item.get_closest_marker("long")}
    if config.getoption("--long"):
        wanted = long | {item for item in items if hypothesis.is_hypothesis_test(item.obj)}
    else:
        wanted = set(items) - long
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = [item for item in items if item in wanted]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """The garbage collector looks no more at what was imported and collected, which is most of all that there is."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def servers_are_forks(monkeypatch):
    """What `manipi eval` and the demo start."""
    from tests.commands import Interpreter

    monkeypatch.setattr(policies, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Interpreter}))


@pytest.fixture(scope="session", autouse=True)
def runs_draw_nothing():
    importlib.import_module("tests.pictures")


@pytest.fixture
def drawn(monkeypatch):
    """Runs in this process draw their plots, as they do outside the tests."""
    from tests.pictures import DRAWING, PLOTS

    for (module, name), draw in zip(PLOTS, DRAWING, strict=True):
        monkeypatch.setattr(module, name, draw)


@pytest.fixture
def cold(monkeypatch):
    """Processes that are spawned start from nothing, as they do outside the tests."""
    monkeypatch.setattr(multiprocessing, "get_context", PYTHONS)


@pytest.fixture
def without(monkeypatch):
    """`without("ray")`: from now on as if that package were not installed."""
    return lambda package: monkeypatch.setitem(sys.modules, package, None)


@pytest.fixture
def mount(tmp_path):
    """`mount(megabytes)` is a file system of that size."""
    disk = tmp_path / "disk"

    def mount(megabytes: int) -> Path:
        disk.mkdir()
        options = f"size={megabytes}m"
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True)
        if mounted.returncode:
            pytest.skip("needs the right to mount a small file system")
        return disk

    yield mount
    if disk.is_mount():
        gc.collect()  # The frames of an error that was caught may hold files there.
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def undisturbed(once) -> Callable[[TrainConfig], Path]:
    """`undisturbed(config)` is the folder of a run of that config; tests that change it take a copy."""

    from manipi.train.loop import train

    def run(config: TrainConfig) -> Path:
        name = hashlib.sha256(repr(config).encode()).hexdigest()[:16]
        return once(name, lambda folder: train(config, folder / "run", show=False)) / "run"

    return run


@pytest.fixture(scope="session")
def trained(tiny, undisturbed) -> Callable[[str], Path]:
    """`trained("pi0")` is the checkpoint of two steps of that policy; tests that change it take a copy."""
    return lambda kind: undisturbed(tiny(kind, steps=2)) / "checkpoints/2"


@pytest.fixture(scope="session")
def shared_datasets() -> Path:
    shared = Path(os.environ.get("MANIPI_SHARED", Path(__file__).parents[1] / "../shared")) / "datasets"
    if not shared.is_dir():
        pytest.skip(f"the sample datasets are not at {shared}; set MANIPI_SHARED")
    return shared.resolve()
