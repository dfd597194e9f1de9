"""Peak memory and time of importing a random checkpoint of released size: openpi's Orbax layout, float32.

    python benchmarks/bench_import.py [--dtype bfloat16] [--whole-arrays] [--dir FOLDER]

The bound: the size of the weights in the target dtype, plus 2 GiB. `--whole-arrays` writes each array as one chunk, as
a single device does; the default is one chunk per layer. Needs about 35 GB of disk. Exits with 1 beyond the bound.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from manipi.exchange.importing import import_checkpoint
from manipi.model.config import REFERENCE, Pi05Config
from manipi.records import write_json
from manipi.robots import Joints, Robot, State
from manipi.train.config import DataConfig, TrainConfig
from manipi.weights.names import openpi_arrays
from manipi.weights.stores import ArrayInfo, write_tree

GIB = 2**30
MODEL = Pi05Config(compat=REFERENCE, action_horizon=10)
ROBOT = Robot(name="arm", cameras={"base": "image"}, state=(State("state", 8),), actions=(Joints(7),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--whole-arrays", action="store_true")
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        source, target = args.child
        _import(source, target, args.dtype)
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as root:
        source, target = Path(root) / "source", Path(root) / "target"
        began = time.perf_counter()
        _write_random(source, whole=args.whole_arrays)
        print(f"wrote a random π0.5 in {time.perf_counter() - began:.0f} s", flush=True)
        command = [sys.executable, __file__, "--child", str(source), str(target), "--dtype", args.dtype]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(said)
        shutil.rmtree(target)
    sys.exit(json.loads(said.splitlines()[-1])["peak_gib"] > json.loads(said.splitlines()[-1])["bound_gib"])


def _import(source: Path, target: Path, dtype: str) -> None:
    recipe = TrainConfig(robot=ROBOT, data=DataConfig(path="none"), model=MODEL, tokenizer="byte")
    idle = _peak()
    began, cpu = time.perf_counter(), time.process_time()
    certificate = import_checkpoint(source, target, recipe=recipe, dtype=getattr(torch, dtype))
    size = (target / "model.safetensors").stat().st_size / GIB
    result = {
        "parameters": certificate.parameters,
        "dtype": dtype,
        "weights_gib": round(size, 2),
        "peak_gib": round(_peak(), 2),
        "bound_gib": round(size + 2, 2),
        "idle_gib": round(idle, 2),
        "difference": certificate.difference,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }
    print("\n".join(f"{name:<14}{text}" for name, text in certificate.rows()))
    print(json.dumps(result))


def _peak() -> float:
    """GiB. Unlike ru_maxrss, the kernel's high-water mark does not begin at the parent's when a process is started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / GIB


def _write_random(folder: Path, *, whole: bool) -> None:
    arrays = openpi_arrays(MODEL)
    (folder / "params").mkdir(parents=True)
    infos = {path: ArrayInfo(array.shape, torch.float32) for path, array in arrays.items()}
    rng = np.random.default_rng(0)

    def layers() -> Iterator[tuple[str, int | None, Tensor]]:
        for path, array in arrays.items():
            if whole or len(array.names) == 1:
                yield path, None, torch.from_numpy(rng.standard_normal(array.shape, np.float32) * 0.02)
                continue
            for layer in range(len(array.names)):
                yield path, layer, torch.from_numpy(rng.standard_normal(array.layer_shape, np.float32) * 0.02)

    write_tree(folder / "params", infos, layers())
    (folder / "assets" / "arm").mkdir(parents=True)
    fields = {"mean": [0.0] * 8, "std": [1.0] * 8, "q01": [-1.0] * 8, "q99": [1.0] * 8}
    write_json(folder / "assets/arm/norm_stats.json", {"norm_stats": {"state": fields, "actions": fields}})


if __name__ == "__main__":
    main()
