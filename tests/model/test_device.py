import pytest
import torch

from manipi.cli.arguments import OnDevice
from manipi.errors import ConfigError
from manipi.model.device import choose_device, ran_out_of_memory, require_device


def test_a_gpu_where_there_is_one(monkeypatch, capsys):
    """What was chosen for a user is said, and what a user chose is not changed."""
    for there, wanted, chosen in ((True, "auto", "cuda"), (False, "auto", "cpu"), (True, "cpu", "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device(wanted) == OnDevice(device=wanted).start() == chosen
        assert capsys.readouterr().out == (f"device  {chosen}\n" if wanted == "auto" else "")
    assert choose_device("cuda:1") == "cuda:1"


def test_a_device_that_torch_does_not_have():
    with pytest.raises(ConfigError, match="manipi doctor"):
        require_device("no such\ndevice")


def test_what_counts_as_out_of_memory():
    said = ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
    full = [torch.OutOfMemoryError("x"), *map(RuntimeError, said)]
    assert all(map(ran_out_of_memory, full))
    assert not any(
        map(ran_out_of_memory, [RuntimeError("CUDA error: misaligned address"), MemoryError("out of memory")])
    )
