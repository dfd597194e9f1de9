"""Equal batches for any number of workers, and loud ends."""

import importlib
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from manipi.data.feed.cache import CachedDataset
from manipi.data.feed.loader import Loader
from manipi.data.feed.sampler import Sampler, Stream
from manipi.data.open import open_dataset
from manipi.errors import BadValueError, TrainingError

CAMERA = "observation.images.top"


@pytest.fixture
def encoders(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    return importlib.import_module("encoders")


@pytest.fixture
def batches(dataset, encoders):
    """The first batches of a loader, with its process count in between."""

    def batches(encode="encode", count=4, data=dataset, **options):
        sampler = Sampler(Stream(data.num_frames, seed=1, fingerprint=data.fingerprint), 16)
        samples = partial(encoders.samples, getattr(encoders, encode), data)
        with Loader(samples, sampler, **options) as loader:
            result = [(step, batch) for step, batch, wait in itertools.islice(loader, count) if wait > 0]
        assert multiprocessing.active_children() == []
        return result

    return batches


def assert_equal(a, b):
    assert [step for step, _ in a] == [step for step, _ in b]
    for (_, x), (_, y) in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


def test_batches_are_those_of_the_sampler(batches, dataset, episodes):
    for step, batch in batches():
        rows = Sampler(Stream(50, seed=1, fingerprint=dataset.fingerprint), 16).rows(step)
        assert batch["image"].shape == (16, 32, 48, 3)
        places = [(e, f) for e, f in batch["place"].tolist()]
        assert [dataset.episodes[e].start + f for e, f in places] == rows.tolist()
        np.testing.assert_array_equal(batch["actions"][:, 0], [episodes[e]["action"][f] for e, f in places])


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same(batches, workers):
    assert_equal(batches(num_workers=workers, count=7), batches(count=7))


def test_rooms_are_used_again_once_their_arrays_are_gone(dataset, encoders):
    """An array that somebody keeps, if only a part of it, is never overwritten; the memory of the others is."""
    sampler = Sampler(Stream(dataset.num_frames, seed=1, fingerprint=dataset.fingerprint), 16)
    samples = partial(encoders.samples, encoders.encode, dataset)
    with Loader(samples, sampler, num_workers=1, prefetch=2) as loader:
        steps = iter(loader)
        kept = next(steps)[1]["image"][3:4]
        copy, places = kept.copy(), set()
        for _, batch, _ in itertools.islice(steps, 20):
            places.add(batch["image"].__array_interface__["data"][0])
            del batch
    np.testing.assert_array_equal(kept, copy)
    assert kept.__array_interface__["data"][0] not in places
    assert len(places) <= 4  # two made ahead, the one that is looked at, and the one whose end is not yet told


def test_resume_gives_the_same(batches):
    assert_equal(batches(num_workers=2, start_step=3, count=2), batches(count=5)[3:])


def test_ranks_share_a_batch(batches):
    whole = batches(count=2)
    ranks = [batches(count=2, rank=rank, world_size=2) for rank in (0, 1)]
    for step in (0, 1):
        joined = np.concatenate([rank[step][1]["place"] for rank in ranks])
        np.testing.assert_array_equal(joined, whole[step][1]["place"])


@pytest.mark.parametrize("format", ["raw", "jpeg"])
def test_cached_pictures_through_workers(batches, dataset, tmp_path, format):
    # Seven batches of 16 from 50 rows: the first epoch fills the cache, later ones read it.
    cached = CachedDataset(dataset, [CAMERA], tmp_path / "workers", format=format)
    alone = CachedDataset(dataset, [CAMERA], tmp_path / "alone", format=format)
    assert_equal(batches(data=cached, num_workers=2, count=7), batches(data=alone, count=7))
    if format == "raw":
        assert_equal(batches(data=cached, num_workers=1, count=7), batches(count=7))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_step_1000_is_the_same(batches, dataset, tmp_path, world_size, workers):
    cached = CachedDataset(dataset, [CAMERA], tmp_path)
    (expected,) = batches(count=1, start_step=1000)
    for data in (dataset, cached):
        resumed = {"data": data, "num_workers": workers, "start_step": 999, "count": 2, "world_size": world_size}
        ranks = [batches(rank=rank, **resumed)[1] for rank in range(world_size)]
        assert_equal(
            [(1000, {key: np.concatenate([rank[1][key] for rank in ranks]) for key in expected[1]})], [expected]
        )


def test_workers_use_the_columns_that_were_read(batches, written, tmp_path):
    root = shutil.copytree(written, tmp_path / "set")
    dataset = open_dataset(root)
    expected = batches(data=dataset)
    shutil.rmtree(root / "data")
    assert_equal(batches(data=dataset, num_workers=2), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_piles_up_over_epochs(dataset, encoders, workers):
    sampler = Sampler(Stream(dataset.num_frames, seed=1), 16)
    counts = []
    with Loader(partial(encoders.samples, encoders.encode, dataset), sampler, num_workers=workers) as loader:
        for step, _, _ in loader:
            pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            counts.append([sum(is_durable(file) for file in Path(f"/proc/{pid}/fd").iterdir()) for pid in pids])
            if step == 40:
                break
    assert np.min(counts[20:], axis=0).tolist() == np.min(counts[8:20], axis=0).tolist()


def is_durable(file: Path) -> bool:
    """An open file other than a batch on its way."""
    try:
        return "memfd" not in os.readlink(file)
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("workers", [0, 2])
def test_error_of_a_worker_is_the_callers(batches, workers):
    with pytest.raises(BadValueError, match=r"(?s)good frames.*episode 2, frame"):
        batches(encode="refuse_episode_2", num_workers=workers)
    assert multiprocessing.active_children() == []


def test_killed_worker(batches):
    with pytest.raises(TrainingError, match=r"(?s)a batch from a data worker.*exit code -9.*--data.num-workers 0"):
        batches(encode="die_at_episode_2", num_workers=2)
    assert multiprocessing.active_children() == []


def test_crashed_worker_shows_its_traceback(batches, capfd):
    with pytest.raises(TrainingError, match="exit code 1 "):
        batches(encode="crash_at_episode_2", num_workers=1)
    assert "ZeroDivisionError: a mistake in the code" in capfd.readouterr().err


ORPHAN = """
import multiprocessing, sys, time
from functools import partial
import encoders
from manipi.data.open import open_dataset
from manipi.data.feed.loader import Loader
from manipi.data.feed.sampler import Sampler, Stream

if __name__ == "__main__":
    dataset = open_dataset(sys.argv[1])
    samples = partial(encoders.samples, encoders.encode, dataset)
    loader = iter(Loader(samples, Sampler(Stream(50, seed=1), 16), num_workers=2))
    next(loader), next(loader)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(60)
"""


def test_workers_end_with_their_parent(written, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(ORPHAN)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    command = [sys.executable, str(script), str(written)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    ) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "the workers outlive their parent"
        time.sleep(0.05)


def test_workers_need_no_torch():
    modules = "manipi.data.feed.cache, manipi.data.feed.loader, manipi.data.lerobot.reader"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
