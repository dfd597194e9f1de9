"""Two hosts, each a network namespace of its own, train what one does; one of them dies, and the run ends the same."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.commands import Interpreter
from tests.train.test_killed import RECIPE, without_clock

from manipi.records import write_json
from manipi.train.run.folder import Run

FIRST, SECOND, PORT = "10.213.77.1", "10.213.77.2", 29_577


def ip(command: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *command.split()], capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces, joined by a cable."""
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` of iproute2")
    names = [f"manipi{os.getpid()}{letter}" for letter in "ab"]
    made = ip(f"netns add {names[0]}")
    if made.returncode:
        pytest.skip(f"needs the right to make network namespaces: {made.stderr.strip()}")
    commands = [
        f"netns add {names[1]}",
        f"link add cable netns {names[0]} type veth peer name cable netns {names[1]}",
        *(f"-n {name} addr add {address}/24 dev cable" for name, address in zip(names, (FIRST, SECOND), strict=True)),
        *(f"-n {name} link set {device} up" for name in names for device in ("lo", "cable")),
    ]
    settings = [Path("/etc/netns") / name for name in names]
    try:
        for folder in settings:  # no name server answers in there, so none shall be waited for
            folder.mkdir(parents=True)
            (folder / "resolv.conf").touch()
        for command in commands:
            done = ip(command)
            assert done.returncode == 0, f"ip {command}: {done.stderr}"
        yield names
    finally:
        for name in names:
            die(name)
            ip(f"netns delete {name}")
        for folder in settings:
            shutil.rmtree(folder, ignore_errors=True)


def die(host: str) -> None:
    """Every process of a host, at once."""
    for pid in ip(f"netns pids {host}").stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def start(hosts: list[str], rank: int, folder: Path, run: Path, cold: bool) -> Interpreter | subprocess.Popen:
    """`manipi train` on a host; `cold`: it, torchrun and its worker start from nothing."""
    line = f"--run-dir {run} --processes 1 --nodes 2 --node-rank {rank} --rendezvous {FIRST}:{PORT} --max-restarts 2"
    train = [sys.executable, "-m", "manipi", "train", f"{folder}/recipe.py:recipe", *line.split()]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
    with (folder / f"{hosts[rank]}.log").open("a") as output:
        settings = {"stdout": output, "stderr": subprocess.STDOUT, "env": environment}
        if cold:
            return subprocess.Popen(["ip", "netns", "exec", hosts[rank], *train], **settings)
        return Interpreter(train, network=hosts[rank], **settings)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("cold", [False, pytest.param(True, marks=pytest.mark.long)], ids=["forks", "cold"])
def test_two_hosts_of_which_one_dies_train_what_one_does(twelve_steps, of_two_ranks, hosts, tmp_path, cold):
    config, undisturbed = twelve_steps, of_two_ranks
    write_json(tmp_path / "config.json", config)
    (tmp_path / "recipe.py").write_text(RECIPE.format(folder=str(tmp_path)))
    run = Run(tmp_path / "hosts", config)
    first, second = (start(hosts, rank, tmp_path, run.folder, cold) for rank in (0, 1))

    def said() -> str:
        return "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))

    deadline = time.monotonic() + 500
    while len(run.read_metrics()) < 5:
        assert first.poll() is None, said()
        assert time.monotonic() < deadline, said()
        time.sleep(0.01)
    die(hosts[1])
    second.wait()
    assert 4 in run.steps()
    assert run.steps()[-1] < 12
    second = start(hosts, 1, tmp_path, run.folder, cold)
    for host in (first, second):
        assert host.wait(max(1, deadline - time.monotonic())) == 0, said()
    assert "-m torch.distributed.run --nproc-per-node 1 --max-restarts 2 --nnodes 2" in said()
    assert "expected every process of the run to go on" in (tmp_path / f"{hosts[0]}.log").read_text()
    assert without_clock(run.folder) == without_clock(undisturbed.parents[1])
    for name in ("model.safetensors", "self_test.npz"):
        assert (run.checkpoint(12) / name).read_bytes() == (undisturbed / name).read_bytes()
