"""What a process that serves for months does about its memory: no long collections, and nothing kept of large messages.

Both concern the whole process, so only one that does nothing but serve does it.
"""

import ctypes
import gc

LARGE_BYTES = 2**20
"""A message beyond this leaves gaps in the heap that are worth giving back."""


def keep_collections_short() -> None:
    """Everything that exists now, such as modules and weights, is never looked at again by the garbage collector.

    A full collection otherwise looks at every object of torch and NumPy, some ten milliseconds in the middle of a call.
    """
    gc.collect()
    gc.freeze()


def give_back() -> None:
    """Returns what is free to the system. The C library of Linux keeps freed blocks of up to 32 MiB for later ones."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # elsewhere the library does not keep them
        trim(0)
