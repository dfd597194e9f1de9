"""`manipi view`: one file with films and curves that agree with the dataset."""

import base64
import importlib.util
import io
import json
import re
import shutil

import av
import numpy as np
import pytest

from manipi.cli.dataset import run_view as main
from manipi.data.open import open_dataset
from manipi.errors import ConfigError


def films(html):
    """The pictures of each film in a page."""
    for source in re.findall(r'<video src="data:video/mp4;base64,([\w+/=]+)"', html):
        with av.open(io.BytesIO(base64.b64decode(source))) as container:
            yield np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize(
    ("name", "episode", "cameras"),
    [("synthetic_lerobot_v21", 3, 2), ("synthetic_lerobot_v30_image", 1, 2), ("open50_lerobot_v3", 3, 1)],
)
def test_page(shared_datasets, manipi, tmp_path, name, episode, cameras):
    out = tmp_path / "page.html"
    done = manipi("view", shared_datasets / name, episode, "--out", out)
    assert done.returncode == 0, done.stderr
    html, dataset = out.read_text(encoding="utf-8"), open_dataset(shared_datasets / name, episodes=(episode,))
    assert not re.search(r"https?://|url\(|@import", re.sub(r"base64,[\w+/=]+", "", html))
    assert dataset.episodes[0].task in html

    values = json.loads(re.search(r'id="values">(.*?)</script>', html).group(1))
    state, action = (next(k for k in dataset.features if k.split(".")[-1].startswith(w)) for w in ("state", "action"))
    assert len(values["curves"]) == dataset.features[state].shape[0] == html.count('class="cursor"')
    for d, (of_state, of_action) in enumerate(values["curves"]):
        np.testing.assert_allclose(of_state, dataset.column(state)[:, d], rtol=1e-3)
        np.testing.assert_allclose(of_action, dataset.column(action)[:, d], rtol=1e-3)

    shown = list(films(html))
    assert len(shown) == cameras
    for camera, film in zip(dataset.cameras, shown, strict=True):
        assert len(film) == dataset.num_frames
        original = dataset.images(camera, np.array([dataset.num_frames - 1]))[0]
        factor = original.shape[0] // film.shape[1]
        small = original[::factor, ::factor] if factor > 1 else original
        difference = np.abs(film[-1].astype(int) - small[: film.shape[1], : film.shape[2]])
        assert np.median(difference) < 12


def test_first_episode_in_the_current_folder(shared_datasets, manipi, tmp_path):
    done = manipi("view", shared_datasets / "synthetic_lerobot_v30")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cwd/view-synthetic_lerobot_v30-0.html").is_file()


def test_an_episode_whose_neighbours_are_broken(copy_of, manipi, tmp_path):
    root = copy_of("synthetic_lerobot_v21")
    (root / "data/chunk-000/episode_000002.parquet").write_bytes(b"")
    assert manipi("view", root, 1).returncode == 0
    broken = manipi("view", root, 2)
    assert broken.returncode == 1
    assert "episode_000002.parquet" in broken.stderr
    assert not (tmp_path / "cwd/view-synthetic_lerobot_v21-2.html").exists()


def test_without_a_camera_whose_files_are_gone(copy_of, manipi):
    root = copy_of("synthetic_lerobot_v30")
    camera = sorted((root / "videos").iterdir())[0]
    shutil.rmtree(camera)
    broken = manipi("view", root, 1)
    assert broken.returncode == 1
    assert "manipi view --without CAMERA" in broken.stderr
    done = manipi("view", root, 1, "--without", camera.name)
    assert done.returncode == 0, done.stderr


def test_unknown_episode(shared_datasets, manipi):
    done = manipi("view", shared_datasets / "synthetic_lerobot_v30", 9)
    assert done.returncode == 1
    assert "unknown [9]" in done.stderr


def test_rerun_that_is_not_installed(shared_datasets, tmp_path, without):
    without("rerun")
    with pytest.raises(ConfigError, match=r"pip install 'manipi\[view\]'"):
        main([str(shared_datasets / "synthetic_lerobot_v30"), "--rerun", "--out", str(tmp_path / "episode.rrd")])


@pytest.mark.skipif(importlib.util.find_spec("rerun") is None, reason="needs manipi[view]")
def test_rerun(shared_datasets, manipi, tmp_path):
    out = tmp_path / "episode.rrd"
    done = manipi("view", shared_datasets / "synthetic_lerobot_v30", "--rerun", "--out", out)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes()[:3] == b"RRF"
