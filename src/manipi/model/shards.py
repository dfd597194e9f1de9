"""Tensors of which each process holds a shard (torch's DTensor), beside plain ones: whole to shard, and back.

A plain tensor passes through every function here as it is, so that one process and many run the same code. DTensor is
imported where there is one: it takes a second, which those who serve have no use for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def is_shard(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh")


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
