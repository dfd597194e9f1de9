"""Compiled layers and CUDA graphs.

torch compiles one layer of each kind; the others have the same code and shapes, and share what was compiled. What it
made stays on disk, in `compile/` of manipi's home (or where TORCHINDUCTOR_CACHE_DIR says), so that the second start is
quick. On a GPU a whole call is recorded once per shape, and then played back without Python in between.
"""

import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manipi.errors import ConfigError
from manipi.model.device import many_variants
from manipi.storage import home


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
    """Calls on tensors, recorded as CUDA graphs: one per their names and shapes, and whatever is not a tensor."""

    def __init__(self) -> None:
        self._recorded: dict[Any, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]] = {}
        # One memory for all: they never run at the same time, and answers are copied before the next one does.
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, function: Callable[[dict[str, Tensor]], Tensor], tensors: Mapping[str, Tensor], others: Hashable
    ) -> Tensor:
        """`function(tensors)`, which depends on `others` too."""
        key = (others, *((name, one.shape, one.dtype) for name, one in tensors.items()))
        device = next(iter(tensors.values())).device
        with torch.cuda.device(device):  # streams and graphs are made on the thread's GPU, which is the first one
            if key not in self._recorded:
                self._recorded[key] = self._record(function, tensors)
            graph, places, answer = self._recorded[key]
            for name, place in places.items():
                place.copy_(tensors[name])
            graph.replay()
            return answer.clone()

    def _record(
        self, function: Callable[[dict[str, Tensor]], Tensor], tensors: Mapping[str, Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]:
        own = {name: one.clone() for name, one in tensors.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, tunes and allocates outside of the recording
            for _ in range(3):
                function(dict(own))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):  # torch's own stream is of one GPU for all
            answer = function(dict(own))
        return graph, own, answer
