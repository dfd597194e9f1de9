"""Datasets in a store: metadata and tables come at once, videos when they are first needed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from manipi.data.dataset import replaced
from manipi.data.open import open_dataset
from manipi.errors import FetchError, TrainingError
from manipi.remote.fetch import home
from manipi.train.data import claim_videos

CAMERA = "observation.images.cam_high"


def videos() -> list[Path]:
    return [path for path in home().rglob("*.mp4") if ".partial" not in str(path)]


@pytest.mark.parametrize("name", ["synthetic_lerobot_v30", "synthetic_lerobot_v21"])
def test_videos_come_when_they_are_needed(serve, store, shared_datasets, name):
    dataset, local = open_dataset(serve(name)), open_dataset(shared_datasets / name)
    np.testing.assert_array_equal(dataset.column("action"), local.column("action"))
    assert dataset.fingerprint == local.fingerprint
    assert not videos()
    rows = np.array([3, 44])
    np.testing.assert_array_equal(dataset.images(CAMERA, rows), local.images(CAMERA, rows))
    assert len(videos()) == (1 if name.endswith("v30") else 2)
    store.files.clear()
    again = open_dataset(f"{store.url}/{name}")
    np.testing.assert_array_equal(again.images(CAMERA, rows), local.images(CAMERA, rows))


BRIGHTNESS = f"""
import sys, numpy as np
from manipi.data.open import open_dataset
print(open_dataset(sys.argv[1]).images({CAMERA!r}, np.arange(5)).sum())
"""


def test_processes_share_what_they_fetch(serve, shared_datasets):
    sources = [serve("synthetic_lerobot_v30")] * 2 + [str(shared_datasets / "synthetic_lerobot_v30")]
    commands = [[sys.executable, "-c", BRIGHTNESS, source] for source in sources]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    sums = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(sums) == 1
    assert len(videos()) == 1


def test_a_video_that_the_store_has_lost(serve, store):
    dataset = open_dataset(serve("synthetic_lerobot_v30"))
    for name in [name for name in store.files if name.endswith(".mp4")]:
        del store.files[name]
    with pytest.raises(FetchError, match=r"cam_high.*file-000\.mp4"):
        dataset.images(CAMERA, np.array([0]))


FILES = f"""
import json, sys
from manipi.data.open import open_dataset
print(json.dumps(open_dataset(sys.argv[1]).picture_files([{CAMERA!r}])))
"""


def copies_are_the_same(in_store, root, chosen, tmp_path):
    """A run goes on with a copy of its dataset on disk or in another store, unless a video has another size."""
    copy = shutil.copytree(root, tmp_path / "copy")
    (tmp_path / "run/checkpoints/3").mkdir(parents=True)
    other_store = {name: state.replace("s3://bucket", "gs://other") + "1" for name, state in in_store.items()}
    for files in (in_store, open_dataset(copy).picture_files([CAMERA]), other_store, in_store):
        claim_videos(tmp_path / "run", {"fingerprint": files})
    with (copy / chosen).open("ab") as file:
        file.write(b"0")
    with pytest.raises(TrainingError, match=f"1 others of the same names: {chosen}"):
        claim_videos(tmp_path / "run", {"fingerprint": open_dataset(copy).picture_files([CAMERA])})


def test_a_store_tells_which_videos_were_replaced(serve, store, shared_datasets, tmp_path):
    pytest.importorskip("s3fs", reason="s3fs is part of manipi[cloud]")
    serve("synthetic_lerobot_v21")
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}

    def told():
        command = [sys.executable, "-c", FILES, "s3://bucket/synthetic_lerobot_v21"]
        env = os.environ | keys | {"AWS_ENDPOINT_URL": store.url}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        return json.loads(done.stdout), done.stderr

    before, _ = told()
    assert {f"synthetic_lerobot_v21/{name}" for name in before} == {
        f for f in store.files if CAMERA in f and ".mp4" in f
    }
    chosen = max(before)
    copies_are_the_same(before, shared_datasets / "synthetic_lerobot_v21", chosen, tmp_path)
    store.files[f"synthetic_lerobot_v21/{chosen}"] = store.files[f"synthetic_lerobot_v21/{chosen}"][::-1]
    after, _ = told()
    assert replaced(before, after) == [chosen]
    for name in list(store.files):
        del store.files[name]
    unknown, said = told()
    assert unknown == {}
    assert "whether the videos of s3://bucket/synthetic_lerobot_v21 were replaced is not known" in said
    assert not videos()


def test_no_dataset_there(store):
    store.add(weights=10)
    with pytest.raises(FetchError):
        open_dataset(f"{store.url}/nothing")
