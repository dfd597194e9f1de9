import os
from pathlib import Path

import numpy as np
import pytest

from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.data.open import open_dataset

FEATURES = {
    "observation.images.top": Feature(kind="image", shape=(32, 48, 3), dtype="video"),
    "observation.state": Feature(kind="vector", shape=(3,), dtype="float32", names=("x", "y", "grip")),
    "action": Feature(kind="vector", shape=(2,), dtype="float32"),
    "reward": Feature(kind="vector", shape=(1,), dtype="float32"),
}
LENGTHS = (20, 7, 13, 1, 9)
TASKS = ("push the block", "öffne die Schublade")


def make_episode(number: int, length: int) -> dict[str, np.ndarray]:
    """Smooth random pictures, so that the codec keeps them, with the frame's row as brightness of the left half."""
    rng = np.random.default_rng(number)
    images = np.full((length, 32, 48, 3), 40 * number + 30, np.uint8)
    images[:, :, :24] = (8 * np.arange(length) + 20)[:, None, None, None]
    return {
        "observation.images.top": images,
        "observation.state": rng.standard_normal((length, 3)).astype(np.float32),
        "action": rng.standard_normal((length, 2)).astype(np.float32),
        "reward": rng.standard_normal((length, 1)).astype(np.float32),
    }


@pytest.fixture(scope="session")
def episodes() -> list[dict[str, np.ndarray]]:
    return [make_episode(number, length) for number, length in enumerate(LENGTHS)]


@pytest.fixture(scope="session")
def write(episodes):
    """Write the episodes to a folder; keyword arguments go to the writer."""

    def write(root: Path, **options) -> Path:
        with LeRobotWriter(root, fps=10, features=FEATURES, robot_type="tabletop", **options) as writer:
            for number, episode in enumerate(episodes):
                writer.add_episode(episode, task=TASKS[number % 2])
        return root

    return write


@pytest.fixture(scope="session")
def written(write, tmp_path_factory) -> Path:
    """A small dataset; tests that change it take a copy."""
    return write(tmp_path_factory.mktemp("data") / "written")


@pytest.fixture
def tiny_disk(mount):
    """A file system of one megabyte."""
    return mount(1)


@pytest.fixture
def dataset(written):
    return open_dataset(written)


@pytest.fixture(scope="session")
def shared_cases() -> Path:
    """Inputs that failed once."""
    shared = Path(os.environ.get("MANIPI_SHARED", Path(__file__).parents[2] / "../shared")) / "cases/data"
    if not shared.is_dir():
        pytest.skip(f"the inputs that failed are not at {shared}; set MANIPI_SHARED")
    return shared.resolve()
