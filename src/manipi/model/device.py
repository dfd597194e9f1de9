"""Which device a model runs on, and what torch says where there is none, or too little memory on it."""

import torch

from manipi.errors import ConfigError, shown


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
