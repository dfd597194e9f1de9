"""Compiled layers and CUDA graphs.

torch compiles one layer of each kind; the others have the same code and shapes, and share what was compiled. What it
made stays on disk, in `compile/` of manipi's home (or where TORCHINDUCTOR_CACHE_DIR says), so that the second start is
quick. On a GPU a whole call is recorded once per shape, and then played back without Python in between.
"""

import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from manipi.errors import ConfigError
from manipi.storage import home

RECOMPILE_LIMIT = 64
"""One layer's code serves prefix, state and steps, with and without padding, of one length and of any: more than the
eight variants after which torch would go on uncompiled, without a word."""


def many_variants() -> dict[str, Any]:
    """Options of `torch.compile` for code of which it makes many variants, in whichever thread it is called."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": RECOMPILE_LIMIT}
    # torch 2.11, whose setting is the process's; later it is each thread's, and one made here is not that of a server.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    return {}


def compile_layers(layers: Iterable[nn.Module], device: torch.device, **options: Any) -> None:
    """Have the layers compiled at their first call, with the tuning of matrix products on a GPU."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home() / "compile"))
    if device.type == "cuda":
        options.setdefault("mode", "max-autotune-no-cudagraphs")
    for layer in layers:
        layer.compile(**many_variants(), **options)


def require_compiled(warm_up: Callable[[], object]) -> None:
    """Run the first calls, in which torch compiles. Raises ConfigError where it cannot."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        warm_up()
    except (TorchDynamoException, InductorError) as error:
        raise ConfigError(
            expected="layers that torch can compile here",
            found=str(error).strip().splitlines()[0],
            where="torch.compile, during warm-up",
            next="install a C++ compiler (and Triton, for a GPU); or leave --compile out, which needs none",
        ) from error


class Graphs:
    """Calls on tensors, recorded as CUDA graphs: one per function, shapes, and whatever is not a tensor."""

    def __init__(self) -> None:
        self._recorded: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        # One memory for all: they never run at the same time, and answers are copied before the next one does.
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[..., Tensor], batch: Any, noise: Tensor) -> Tensor:
        """`function(batch, noise)`, where `batch` is a named tuple."""
        arguments = (*batch, noise)
        key = tuple((one.shape, one.dtype) if isinstance(one, Tensor) else one for one in arguments)
        with torch.cuda.device(noise.device):  # streams and graphs are made on the thread's GPU, which is the first one
            if key not in self._recorded:
                self._recorded[key] = self._record(function, batch, noise)
            graph, places, answer = self._recorded[key]
            for place, value in zip(places, (one for one in arguments if isinstance(one, Tensor)), strict=True):
                place.copy_(value)
            graph.replay()
            return answer.clone()

    def _record(
        self, function: Callable[..., Tensor], batch: Any, noise: Tensor
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        own = [one.clone() if isinstance(one, Tensor) else one for one in (*batch, noise)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, tunes and allocates outside of the recording
            for _ in range(3):
                function(type(batch)(*own[:-1]), own[-1])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):  # torch's own stream is of one GPU for all
            answer = function(type(batch)(*own[:-1]), own[-1])
        return graph, [one for one in own if isinstance(one, Tensor)], answer
