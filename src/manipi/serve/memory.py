"""What a process that serves for months does about its memory: no long collections, and nothing kept of large messages.

All of it concerns the whole process. The C library is Linux's (glibc); others are left alone.
"""

import ctypes
import gc
import sys
from typing import Any

LARGE_BYTES = 2**20
"""A message beyond this leaves gaps in the heap that are worth giving back."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST_REUSED = 32 * 2**20


def reuse_freed_memory() -> None:
    """Blocks that a message and its copies have filled are filled again by the next one.

    The library otherwise gives each back to the system as soon as it is free, and every call begins with some hundred
    page faults. These are the thresholds that it comes to itself once a block of 32 MiB has been freed.
    """
    library = _c_library()
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_REUSED)
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_REUSED)


def give_back() -> None:
    """Returns what is free to the system, as after a message that was far larger than the others.

    The free end of another thread's heap stays, which has at most 64 MiB.
    """
    library = _c_library()
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def keep_collections_short() -> None:
    """What exists now, such as modules and weights, is never looked at again by the garbage collector.

    A full collection otherwise takes some twenty milliseconds in the middle of a call, and more with torch.
    """
    gc.collect()
    gc.freeze()


def _c_library() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
