"""Several processes train what one trains: the same losses, gradients and weights, whatever the mesh."""

import re
import shlex
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.commands import run_manipi
from tests.train import ranks
from tests.train.ranks import Ranks
from tests.train.sizes import with_layers

from manipi.checkpoints.native import verify
from manipi.cli.train import parse_train
from manipi.errors import ConfigError, StorageError, TrainingError
from manipi.model.config import Adapters, LoRA
from manipi.policy import Policy
from manipi.train.config import ParallelConfig
from manipi.train.launch import Launch, mesh_shape, without_flags
from manipi.train.parallel import ALONE
from manipi.train.run.folder import Run
from manipi.train.watch.progress import OF_THE_MACHINE

LORA = Adapters(attention=LoRA(rank=2, alpha=2.0), feed_forward=LoRA(rank=2, alpha=2.0))


def metrics(config, folder) -> list[dict]:
    return [{k: v for k, v in m.items() if k not in OF_THE_MACHINE} for m in Run(folder, config).read_metrics()]


def losses(config, folder) -> list[float]:
    return [m["loss"] for m in metrics(config, folder)]


# ---- the same numbers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size", "replicate", "adapted"),
    [
        ("pi05", 2, 1, False),
        ("pi0_fast", 2, 1, False),
        ("joint", 2, 1, False),
        ("pi0", 2, 2, True),
        ("pi05", 4, 2, False),
    ],
    ids=["FSDP", "FSDP of tokens", "FSDP of both", "copies with adapters", "HSDP"],
)
def test_a_step_equals_the_plain_one(tiny, tmp_path, kind, size, replicate, adapted):
    config = replace(with_layers(tiny(kind, ema_decay=0.5), 2), parallel=ParallelConfig(replicate=replicate))
    if adapted:
        config = replace(config, model=replace(config.model, vlm_adapters=LORA), frozen_dtype="bfloat16")
    answers = Ranks(size, ranks.steps, config, tmp_path).all_well()
    weights, counts, apart = zip(*answers, strict=True)
    if kind != "pi0_fast":
        assert len(set(weights)) > 1, "slices of one weight would not show how they are averaged"
    assert counts[0] > 40
    assert counts[1:] == (0,) * (size - 1), "only rank 0 gathers weights"
    # Attention does not feel a bias that all keys share: its gradient is rounding, which Adam makes steps of.
    apart = {name: value for name, value in apart[0].items() if not name.endswith("k_proj.bias")}
    assert {name: value for name, value in apart.items() if not value < 2e-4} == {}


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tiny, tmp_path):
    config = tiny(steps=6, keep_checkpoints=9, async_save=True)
    whole = ranks.run(config, tmp_path / "whole")
    run = tmp_path / "run"
    Ranks(2, ranks.run, config, run, 2).all_well()
    assert losses(config, run) == pytest.approx(losses(config, tmp_path / "whole")[:2], rel=1e-5)
    ranks.run(config, run, 4)
    folders = Ranks(2, ranks.run, replace(config, parallel=ParallelConfig(replicate=2)), run).all_well()
    assert folders == [run / "checkpoints/6"] * 2
    assert [m["step"] for m in metrics(config, run)] == [1, 2, 3, 4, 5, 6]
    assert losses(config, run) == pytest.approx(losses(config, tmp_path / "whole"), rel=1e-4)
    for step in (0, 2, 4, 6):
        verify(run / f"checkpoints/{step}")
    # Bit for bit where nothing was summed yet.
    assert (run / "checkpoints/0/model.safetensors").read_bytes() == (
        tmp_path / "whole/checkpoints/0/model.safetensors"
    ).read_bytes()
    mine, other = (load_file(folder / "model.safetensors") for folder in (folders[0], whole))
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-3)
    Policy.load(folders[0])


def test_one_process_is_left_alone():
    loss = torch.tensor(0.1, requires_grad=True)
    assert ALONE.total(loss) is loss
    assert ALONE.once(lambda: loss) is loss
    assert ALONE.first("SIGTERM") == "SIGTERM"


# ---- what goes wrong


@pytest.mark.slow
def test_a_killed_rank_is_reported_and_nothing_is_lost(twelve_steps, of_two_ranks, tmp_path):
    config, whole = replace(twelve_steps, async_save=True), of_two_ranks
    run = Run(tmp_path / "killed", config)
    started = Ranks(2, ranks.run, config, run.folder)
    while len(run.read_metrics()) < 6:
        time.sleep(0.002)
    started.processes[1].kill()
    left, _ = started.results(timeout=120)  # it ends by itself, and soon
    assert started.processes[1].exitcode == -signal.SIGKILL
    assert isinstance(left, TrainingError), left
    assert left.expected == "every process of the run to go on"
    assert "rank 0" in left.where
    assert 4 in run.steps()
    assert run.steps()[-1] < 12
    assert Ranks(2, ranks.run, config, run.folder).all_well()[0] == run.checkpoint(12)
    assert metrics(config, run.folder) == metrics(config, whole.parents[1])
    for name in ("model.safetensors", "self_test.npz"):
        assert (run.checkpoint(12) / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_an_error_of_one_process_is_everyones(tiny):
    ours = TrainingError(expected="a", found="b", where="c", next="d")
    for error, expected in ((ours, "expected a\n"), (ValueError("no"), "rank 0 ended with an error of its own")):
        first, second = Ranks(2, ranks.fail_once, tiny(), error).results()
        assert str(error) in str(first)
        assert isinstance(second, TrainingError)
        assert expected in str(second)


@pytest.mark.slow
def test_a_folder_that_hosts_do_not_share(tiny, tmp_path):
    Ranks(2, ranks.need_shared, tiny(), tmp_path, True).results()
    assert list((tmp_path / "shared").iterdir()) == []
    for error in Ranks(2, ranks.need_shared, tiny(), tmp_path, False).results():
        assert isinstance(error, TrainingError)
        assert error.found == "only 1 of 2 processes see what rank 0 wrote"


@pytest.mark.slow
def test_a_full_disk_stops_all_and_leaves_the_checkpoints_before(tiny, mount):
    """There is no room for the training state, or for it alone."""
    disk = mount(64)
    config = tiny(steps=2, save_every=1, keep_checkpoints=9)
    ranks.run(config, disk / "run", 1)
    run, filler = Run(disk / "run", config), disk / "filler"
    before = run.steps()
    for room in (0.3, 3.2):
        left = int(room * (run.checkpoint(1) / "model.safetensors").stat().st_size)
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - left))
        for error in Ranks(2, ranks.run, config, run.folder).results():
            assert isinstance(error, StorageError), error
            assert error.where == str(run.checkpoint(2))
        assert run.steps() == before
        assert not list(run.checkpoints.glob(".*"))
        filler.unlink()
    assert Ranks(2, ranks.run, config, run.folder).all_well()[0] == run.checkpoint(2)


@pytest.mark.parametrize(
    ("size", "parallel", "batch", "message"),
    [
        (3, {}, 4, r"batch size that 3 processes share evenly\n   found 4\n.*--batch-size\n    next --batch-size 6"),
        (2, {"replicate": 4}, 4, r"as there are \(2\)\n   found replicate 4 × shard 1 = 4"),
        (1, {"shard": 2}, 4, r"as there are \(1\)\n   found replicate 1 × shard 2 = 2\n.*\n    next start 2 processes"),
        (4, {"replicate": 1, "shard": 2}, 4, r"as there are \(4\)\n   found replicate 1 × shard 2 = 2"),
        (4, {"replicate": 3}, 12, r"as there are \(4\)\n   found replicate 3 × shard 1 = 3"),
    ],
)
def test_a_mesh_or_a_batch_that_does_not_fit(tiny, size, parallel, batch, message):
    config = replace(tiny(batch_size=batch), parallel=ParallelConfig(**parallel))
    with pytest.raises(ConfigError, match=message):
        mesh_shape(config, size)


@pytest.mark.parametrize(
    ("size", "parallel", "shape"), [(4, {}, (1, 4)), (4, {"replicate": 2}, (2, 2)), (1, {}, (1, 1))]
)
def test_the_mesh(tiny, size, parallel, shape):
    assert mesh_shape(replace(tiny(), parallel=ParallelConfig(**parallel)), size) == shape


# ---- torchrun


def test_the_torchrun_line(tiny):
    flags = ["r.py:f", "--nodes=2", "--node_rank", "0", "--steps", "9", "--gpus", "2", "--rendezvous", "head:29500"]
    assert without_flags(flags, Launch) == ["r.py:f", "--steps", "9"]
    line = Launch(nodes=2, gpus=2, rendezvous="head:29500").command(tiny(), flags)
    assert " ".join(line[1:]) == (
        "-m torch.distributed.run --nproc-per-node 2 --max-restarts 0 --nnodes 2 --rdzv-backend c10d"
        " --rdzv-endpoint head:29500 --rdzv-conf is_host=1 --local-addr head"
        " -m manipi train r.py:f --steps 9 --parallel.device=cuda"
    )
    alone = Launch(processes=4, max_restarts=3).command(tiny(), ["tabletop"])
    assert alone[2:] == [
        *("torch.distributed.run", "--nproc-per-node", "4", "--max-restarts", "3", "--standalone"),
        *("-m", "manipi", "train", "tabletop", "--parallel.device=cpu"),
    ]


@pytest.mark.parametrize("name", ["slurm.sbatch", "skypilot.yaml"])
def test_the_examples_flags(tiny, name):
    """Their command lines, with numbers for the cluster's variables."""
    text = (Path(__file__).parents[2] / "examples" / name).read_text().replace("\\\n", "")
    line = re.search(r"manipi train (.*--max-restarts \d+)", text)[1]
    line = re.sub(r'"\$\(.*?\)(:\d+)"|"\$HEAD"', "127.0.0.1:29500", line)
    numbers = {"NNODES": "2", "NUM_NODES": "2", "NODEID": "1", "NODE_RANK": "1", "ON_NODE": "8", "PER_NODE": "8"}
    line = re.sub(r'"\$\w*?(NUM_NODES|NNODES|NODEID|NODE_RANK|ON_NODE|PER_NODE)"', lambda m: numbers[m[1]], line)
    _, *flags = shlex.split(line)
    launch = parse_train("tabletop", tiny(batch_size=16), flags).launch
    assert (launch.nodes, launch.node_rank, launch.gpus, launch.max_restarts) == (2, 1, 8, 3)
    torchrun = launch.command(tiny(batch_size=16), ["tabletop", *flags])
    assert torchrun[torchrun.index("--local-addr") + 1] == "127.0.0.1"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"gpus": 1, "processes": 1}, "one of the two"),
        ({"nodes": 2}, "one of the two"),
        ({"gpus": 1, "node_rank": 1}, "--node-rank below --nodes"),
        ({"gpus": 1, "nodes": 2, "rendezvous": "head"}, "--rendezvous HOST:PORT"),
        ({"gpus": 1, "nodes": 2, "node_rank": 1, "rendezvous": "no.such.host:1"}, "that this one can reach"),
        ({"gpus": 3}, "3 processes share evenly"),
    ],
)
def test_a_line_that_cannot_be(tiny, flags, message):
    with pytest.raises(ConfigError, match=message):
        Launch(**flags).command(tiny(), [])


def test_more_gpus_than_there_are():
    """One error, and no torchrun that starts so many processes to hear it from each."""
    there = torch.cuda.device_count()
    done = run_manipi("train", "tabletop", "--gpus", there + 2, "--batch-size", 4 * (there + 2), "--data.path", "none")
    assert done.returncode == 1
    assert f"expected {there + 2} GPUs on this host" in done.stderr
    assert "--processes N to train on the processor" in done.stderr
    assert "torch.distributed.run" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
