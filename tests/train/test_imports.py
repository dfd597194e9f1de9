"""What a process imports before it trains, reads batches or writes checkpoints: by name, since times vary."""

import subprocess
import sys

OF_THE_COMMAND_LINE = {"tyro", "manipi.cli", "manipi.recipes"}
OF_DATA = {"pyarrow", "av", "manipi.data.open", "manipi.data.dataset", "manipi.data.norm_stats", "manipi.data.review"}
OF_PICTURES = {"PIL", "simplejpeg", "matplotlib", "manipi.train.watch.first_batch", "manipi.train.watch.validation"}
OF_FILES = {
    "safetensors",
    "tokenizers",
    "sentencepiece",
    "manipi.checkpoints.native",
    "manipi.weights",
    "manipi.remote",
}
OF_SERVING = {"websockets", "manipi.serve", "manipi.evaluate", "manipi.exchange"}
SLOW_PARTS = {"scipy", "numpy.random", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint"}

FOR_BATCHES = {*OF_THE_COMMAND_LINE, *OF_SERVING, "torch", "scipy", "matplotlib", "manipi.policy", "manipi.train"}
FOR_CHECKPOINTS = {*OF_THE_COMMAND_LINE, *OF_SERVING, *SLOW_PARTS, *OF_DATA - {"manipi.data.dataset"}} | {
    *("manipi.train.data", "manipi.train.watch.validation", "manipi.train.plan", "manipi.remote"),
    *("manipi.weights.layouts", "manipi.weights.names"),
}
FOR_STEPS = {*FOR_CHECKPOINTS, *OF_DATA, *OF_PICTURES, *OF_FILES} | {
    *("manipi.policy", "manipi.transforms", "manipi.train.run.saving")
}


def imported(*modules: str) -> list[set[str]]:
    """What a fresh process has imported after each of them."""
    code = "; ".join(["import sys", *(f"import {name}; print(*sys.modules)" for name in modules)])
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return [set(line.split()) for line in found.stdout.splitlines()]


def test_a_trainer_and_its_writer_start_without_what_they_do_not_need():
    loop, and_writer = imported("manipi.train.loop", "manipi.train.run.saving")
    assert sorted(FOR_STEPS & loop) == []
    assert sorted(FOR_CHECKPOINTS & and_writer) == []


def test_a_data_worker_starts_without_torch():
    """Whose import is most of the time that a process takes to start."""
    feed = ", ".join(f"manipi.data.{name}" for name in ("feed.loader", "feed.mixture", "feed.cache", "open"))
    assert sorted(FOR_BATCHES & imported(feed)[0]) == []
