"""Samples per second of LeRobotDataset, one figure per line of input, for `harness.lerobot_rate`; needs lerobot."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import torch


def name_kernels() -> None:
    """torchvision's kernels may be built for another torch; its import needs only their names."""
    spec = importlib.util.find_spec("torchvision")
    assert spec
    assert spec.origin
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        kernels.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        kernels.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


kernels = torch.library.Library("torchvision", "FRAGMENT")
name_kernels()
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: E402  # type: ignore[reportMissingImports]

if __name__ == "__main__":
    task = json.loads(sys.stdin.readline())
    chunk = {task["action"]: [i / task["fps"] for i in range(task["horizon"])]}
    dataset = LeRobotDataset("bench/bench", root=task["root"], delta_timestamps=chunk)
    options = {"batch_size": task["batch"], "num_workers": task["workers"], "prefetch_factor": 2}
    batches = iter(torch.utils.data.DataLoader(dataset, sampler=task["rows"], **options))
    for _ in sys.stdin:
        for _ in range(task["skip"]):
            next(batches)
        began = time.perf_counter()
        for _ in range(task["count"]):
            next(batches)
        print(task["count"] * task["batch"] / (time.perf_counter() - began), flush=True)
