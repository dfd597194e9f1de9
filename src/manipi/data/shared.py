"""Memory that processes share: files without a name, gone with the last process that holds them.

Named shared memory outlives killed processes, and in containers is often limited to 64 MB.
"""

import mmap
import os
import tempfile
import weakref
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np


def nameless_file(size: int) -> int:
    """The descriptor of a file of `size` bytes in RAM, all of them allocated."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("manipi")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    allocate(descriptor, size)
    return descriptor


def allocate(descriptor: int, size: int) -> None:
    """Make the file at least so large, and take the room now; later, a store into its map would be fatal."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


class SharedArray:
    """A read-only array that processes spawned later use in place, where pickling would give each a copy."""

    def __init__(self, values: np.ndarray):
        self._open(nameless_file(max(1, values.nbytes)), values.dtype, values.shape)
        self.array[...] = values
        self.array.setflags(write=False)

    def _open(self, descriptor: int, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self.array = np.ndarray(shape, dtype, mmap.mmap(descriptor, 0))

    def __reduce__(self) -> tuple:
        return _attach, (DupFd(self._descriptor), self.array.dtype, self.array.shape)


def _attach(descriptor: Any, dtype: np.dtype, shape: tuple[int, ...]) -> SharedArray:
    shared = SharedArray.__new__(SharedArray)
    shared._open(descriptor.detach(), dtype, shape)
    shared.array.setflags(write=False)
    return shared
