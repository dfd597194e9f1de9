"""Samples per second of LeRobotDataset, one figure per line of input, for bench_loader; needs lerobot."""

import json
import sys
import time

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # type: ignore[reportMissingImports]

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
