"""Where tensors are and what torch can do there: devices, shards, compiled code.

Of a sharded tensor each process holds a part (torch's DTensor). A plain tensor passes through every function here as it
is, so that one process and many run the same code. DTensor is imported where there is one: it takes a second, which
those who serve have no use for.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manipi.errors import ConfigError, shown

RECOMPILE_LIMIT = 64
"""One layer's code serves prefix, state and steps, with and without padding, of one length and of any: more than the
eight variants after which torch would go on uncompiled, without a word."""


def choose_device(wanted: str) -> str:
    """`auto` stands for a GPU where torch has one, and else for the processor."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_device(device: str) -> None:
    """Raises ConfigError where torch has no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise ConfigError(
            expected="a device that torch can use here, such as cpu or cuda",
            found=str(error).splitlines()[0],
            where=f"device {shown(device)}",
            next="manipi doctor  # says what there is; or --device cpu",
        ) from error


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch, CUDA or cuBLAS raise where a GPU has no memory left."""
    said = str(error)
    words = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in said for word in words)
    )


def many_variants() -> dict[str, Any]:
    """Options of `torch.compile` for code of which it makes many variants, in whichever thread it is called."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": RECOMPILE_LIMIT}
    # torch 2.11, whose setting is the process's; later it is each thread's, and one made here is not that of a server.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    return {}


def is_shard(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh")


class Sharding(NamedTuple):
    """Which part of what a process holds in a shard, apart from the mesh and the numbers."""

    placements: Sequence[Any]
    shape: torch.Size
    stride: tuple[int, ...]


def sharding(tensor: Tensor) -> Sharding | None:
    """None of a plain tensor."""
    return Sharding(tensor.placements, tensor.shape, tensor.stride()) if is_shard(tensor) else None  # type: ignore[reportAttributeAccessIssue]


def shard_from(local: Tensor, sharding: Sharding | None, mesh: Any) -> Tensor:
    """The inverse of `local`, on a mesh that may be another."""
    if sharding is None:
        return local
    from torch.distributed.tensor import DTensor

    placements, shape, stride = sharding
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copy the whole tensor, or this process's shard of it, into `target`; every process has the same `whole`."""
    if is_shard(target):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = target.device_mesh, target.placements  # type: ignore[reportAttributeAccessIssue]
        whole = distribute_tensor(whole.to(mesh.device_type), mesh, placements, src_data_rank=None)
    target.copy_(whole)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on its device. All processes have to ask at the same time."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[reportAttributeAccessIssue]


def local(tensor: Tensor) -> Tensor:
    """This process's shard, sharing its memory."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[reportAttributeAccessIssue]


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm over all elements of all tensors, the same on every process.

    Shards meet in one reduction; torch's own sum over DTensors would take one for every tensor.
    """
    norm = torch.nn.utils.get_total_norm([local(t.detach()) for t in tensors])
    if not tensors or not is_shard(tensors[0]):
        return norm
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = tensors[0].device_mesh, tensors[0].placements  # type: ignore[reportAttributeAccessIssue]
    parts = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    return DTensor.from_local(norm.square(), mesh, parts).full_tensor().sqrt()
