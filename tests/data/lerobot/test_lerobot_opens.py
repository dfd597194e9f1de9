"""lerobot itself opens what is written here, and shows the same values, instructions and pictures.

It cannot share an environment with our torch, so it runs in one of its own, whose Python MANIPI_LEROBOT_PYTHON names.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from manipi.convert.convert import ConvertSettings, convert
from manipi.convert.formats import open_reader
from manipi.data.open import open_dataset

READ = """
import json, sys
import numpy as np
import torch

# torchvision's kernels are built for another torch; its import needs only their names.
kernels = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    kernels.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from lerobot.datasets.lerobot_dataset import LeRobotDataset

root, out, rows = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
dataset = LeRobotDataset("manipi/test", root=root, video_backend="torchcodec")
tables = dataset.hf_dataset[rows]
arrays = {key: np.stack([np.asarray(v) for v in values]) for key, values in tables.items() if key != "task"}
arrays["length"], arrays["fps"] = len(dataset), dataset.fps
try:
    from torchcodec.decoders import VideoDecoder
except (ImportError, RuntimeError, OSError) as error:
    arrays["no pictures"] = str(error)[:500]
else:
    items = [dataset[row] for row in rows]
    arrays["task"] = [item["task"] for item in items]
    for camera in dataset.meta.camera_keys:
        arrays[camera] = np.stack([item[camera].numpy() for item in items])
np.savez(out, **arrays)
"""


@pytest.fixture(scope="module")
def lerobot():
    """`lerobot(root, rows, out)` is what LeRobotDataset says about some rows."""
    python = os.environ.get("MANIPI_LEROBOT_PYTHON")
    if not python:
        pytest.skip("set MANIPI_LEROBOT_PYTHON to a Python that has lerobot 0.4.4; see `make test-lerobot`")
    libraries = [str(path) for path in Path(python).parents[1].glob("lib/python*/site-packages/av.libs")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"LD_LIBRARY_PATH": ":".join(libraries), "HF_HUB_OFFLINE": "1"}

    def read(root, rows, out):
        command = [python, "-c", READ, str(root), str(out), str(rows)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=out.parent)
        assert done.returncode == 0, done.stderr
        with np.load(out) as file:
            return {key: file[key] for key in file.files}

    return read


def compare(dataset, theirs, rows):
    assert theirs["length"] == dataset.num_frames
    assert theirs["fps"] == dataset.fps
    for key, feature in dataset.features.items():
        if feature.kind == "vector":
            np.testing.assert_array_equal(theirs[key].reshape(len(rows), -1), dataset.column(key)[rows], err_msg=key)
    if "no pictures" in theirs:
        pytest.skip(f"the numbers are equal; lerobot's video backend does not work here: {theirs['no pictures']}")
    assert theirs["task"].tolist() == [dataset.prompt(row) for row in rows]
    for camera in dataset.cameras:
        ours = dataset.images(camera, np.array(rows)).transpose(0, 3, 1, 2)
        # Two builds of FFmpeg turn YUV into RGB with a rounding of their own.
        assert np.abs(theirs[camera] * 255 - ours).max() < 2.5, camera


def test_a_dataset_of_the_writer(lerobot, written, tmp_path):
    rows = list(range(0, 50, 3))
    compare(open_dataset(written), lerobot(written, rows, tmp_path / "values.npz"), rows)


def test_a_conversion(lerobot, shared_datasets, tmp_path):
    source = open_reader(shared_datasets / "synthetic_lerobot_v21")
    convert(source, tmp_path / "set", ConvertSettings(), num_workers=0, show=False)
    rows = [0, 39, 40, 41, 86, 87, 200, 344]
    compare(open_dataset(tmp_path / "set"), lerobot(tmp_path / "set", rows, tmp_path / "values.npz"), rows)
