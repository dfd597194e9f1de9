"""A model rearranged for inference: the results of `VLA` in fewer and larger steps.

    pictures ─▶ SigLIP, all cameras in one batch ─┐
    prompt ───▶ embedding ────────────────────────┴─▶ "vlm" layers ─▶ cache ◀─ state token (π0), once
                                                                       │
    timesteps ─▶ tables of time MLP and adaptive norms, made once      │
                                        noise ─▶ num_steps × "action" layers ─▶ actions

It runs the forward pass of the model, which stays the oracle, with other layers (`fused`), a cache of fixed size in
which several noises share one prefix, and tables of what depends on timesteps and weights alone. On a GPU a whole call
is one CUDA graph: `run` reads nothing back, and its shapes follow from `Kept`.

torch compiles one layer of each kind; the others have the same code and shapes, and share what was compiled. What it
made stays on disk, in `compile/` of manipi's home (or where TORCHINDUCTOR_CACHE_DIR says), so that the second start is
quick.

Shape suffixes: B batch, K noise draws, T timesteps, N norms, H action horizon, A action dimensions, D width.
"""

import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manipi.errors import ConfigError
from manipi.model.config import Pi0FastConfig
from manipi.model.device import many_variants
from manipi.model.flow import CLEAN, Continuation, FlowHead, Pi0Head, Pi05Head, euler_times, timestep_embedding
from manipi.model.gemma import AdaptiveRMSNorm, Block, ExpertLayer, Span
from manipi.model.inference.fused import (
    FusedExpertLayer,
    FusedVisionBlock,
    Quantization,
    StaticCache,
    StepConditioning,
    StepNorm,
    compute_dtype,
    maker,
    twin,
)
from manipi.model.inputs import Kept, ModelInput
from manipi.model.siglip import VisionBlock
from manipi.model.vla import VLA
from manipi.storage import home


class Engine(VLA):
    """Takes over the model's weights; where they keep their dtype it shares their memory.

    Args:
        num_steps: Euler steps of `sample`.
        quantization: how the transformers' matrices are kept.

    Raises:
        ConfigError: fp8 on a device without it, or a quirk of the reference's decoding that needs its cache.
    """

    quantization: Quantization

    @torch.no_grad()
    def __init__(self, model: VLA, num_steps: int = 10, quantization: Quantization = "none"):
        nn.Module.__init__(self)
        config, gemma, device = model.config, model.gemma, model.gemma.token_embedding.device
        flows = not isinstance(config, Pi0FastConfig)
        quirks = ("fast_contiguous_cache", "fast_position_offset", "fast_writes_past_eos")
        found = [name for name in quirks if getattr(config.compat, name)]
        if found and not flows:
            raise ConfigError(
                expected="decoding without the quirks of the reference's cache",
                found=", ".join(found),
                where="Pi0FastConfig.compat",
                next="serve it without --compile, or without these quirks",
            )
        self.config, self.num_steps, self.quantization = config, num_steps, quantization
        self.trim, self.guidable = True, quantization == "none"
        self.dtype = compute_dtype(model.dtype, device)
        self._graphs: Graphs | None = None
        make = maker(quantization, device, model.dtype)
        vision = nn.ModuleList(FusedVisionBlock(cast(VisionBlock, one), make) for one in model.vision.blocks)
        self.vision = twin(model.vision, blocks=vision)
        blocks, only_keys = nn.ModuleList(), None if config.writes else (len(gemma.blocks) - 1, "vlm")
        for index, block in enumerate(gemma.blocks):
            layers = {name: cast(ExpertLayer, layer) for name, layer in cast(Block, block).experts.items()}
            fused = {n: FusedExpertLayer(one, make, attends=(index, n) != only_keys) for n, one in layers.items()}
            blocks.append(Block(fused))
        norms = [one for one in gemma.modules() if isinstance(one, AdaptiveRMSNorm)]
        final = {name: StepNorm(0) if norm in norms else norm for name, norm in gemma.final_norms.items()}
        self.gemma = twin(gemma, blocks=blocks, final_norms=nn.ModuleDict(final))
        if flows:
            self.head = StepHead(model.head, num_steps, config.action_horizon, norms, self.dtype)

    def compile(self, **options: Any) -> None:
        """Compile the layers, and on a GPU play one CUDA graph per shape from then on.

        Raises:
            ConfigError: nothing that compiles is installed; it says what is missing.
        """
        device = self.gemma.token_embedding.device
        compile_layers([*self.vision.blocks, *self.gemma.blocks], device, **options)
        self._graphs = Graphs() if device.type == "cuda" else None

    def sample(self, inputs: ModelInput, noise: Tensor, num_steps: int | None = None, max_delay: int = 0) -> Tensor:
        """Action chunks [B, (K,) H, A], as `VLA.sample` makes them.

        Args:
            num_steps: those that the engine was made for, which is the default.
            max_delay: the longest prefix that the weights were trained with; longer delays are met by guidance.

        Raises:
            ConfigError: other steps than the engine's tables have, or guidance through matrices in 8 bits.
        """
        if num_steps not in (None, self.num_steps):
            raise ConfigError(
                expected=f"{self.num_steps} steps, for which the engine has tables",
                found=str(num_steps),
                where="Engine.sample",
                next="make another Engine with that num_steps",
            )
        return super().sample(inputs, noise, self.num_steps, max_delay)

    def run(
        self, inputs: ModelInput, kept: Kept, noise_BKHA: Tensor, num_steps: int, continuation: Continuation
    ) -> Tensor:
        if continuation == "guidance" and not self.guidable:
            raise ConfigError(
                expected="no previous chunk with matrices in 8 bits, through which no gradient passes",
                found="one",
                where="Engine.sample",
                next="serve the policy as it was trained, or let the client wait for its chunks",
            )
        # No graph holds the gradients of guidance, nor a ragged batch's pictures, whose places come from the host.
        ragged = len(kept.places) < inputs.batch_size * len(kept.cameras)
        if self._graphs is None or continuation == "guidance" or ragged:
            return super().run(inputs, kept, noise_BKHA, num_steps, continuation)

        def recorded(tensors: dict[str, Any]) -> Tensor:
            noise = tensors.pop("noise")
            return VLA.run(self, ModelInput(**tensors), kept, noise, num_steps, continuation)

        return self._graphs(recorded, inputs.tensors | {"noise": noise_BKHA}, (kept, continuation))

    def prefill(self, inputs: ModelInput, prefix: Span, num_draws: int = 1) -> StaticCache:
        """Keys and values of pictures, prompt and state, with slots for an action chunk; of each noise draw its own.

        π0's state token sees the prefix and itself, so that all steps and draws share it.
        """
        cache = self.decoding_cache(prefix, self.config.action_horizon + self.head.has_state)
        self.gemma({"vlm": prefix}, cache, commit=True, outputs=())
        if self.head.has_state:
            state = self.head.state_token(inputs.state, self.dtype)
            self.gemma({"action": state}, cache, commit=True, outputs=())
        return cache.repeated(num_draws)

    def decoding_cache(self, prefix: Span, max_tokens: int) -> StaticCache:
        b, t, _ = prefix.tokens_BTD.shape
        return StaticCache.of_size(self.gemma.size, b, t + max_tokens, prefix.tokens_BTD)


class StepHead(FlowHead):
    """A head with tables of what depends on timesteps and weights alone: each step's, and last for given actions.

    Args:
        norms: those that timesteps modulate, layer by layer and last the final one.
        dtype: to compute in.
    """

    starts: Tensor
    table: Tensor
    """[T, D], or of norms [T, N, 3, D]."""

    def __init__(self, head: FlowHead, num_steps: int, horizon: int, norms: list[AdaptiveRMSNorm], dtype: torch.dtype):
        nn.Module.__init__(self)
        self.action_in, self.action_out = head.action_in, head.action_out
        self.head, self.num_steps, self.has_state = head, num_steps, isinstance(head, Pi0Head)
        time_T = torch.tensor([*euler_times(num_steps), CLEAN], device=head.action_in.weight.device)
        embedded_TD = timestep_embedding(time_T, head.action_in.out_features)
        if isinstance(head, Pi0Head):
            # The time's share of the MLP's first layer; `suffix_at` adds that of the actions.
            weight, bias = head.time_mlp_in.weight, head.time_mlp_in.bias
            table = F.linear(embedded_TD, weight[:, len(weight) :].float(), bias.float())
        else:
            assert isinstance(head, Pi05Head)
            cond_TD = head.condition(embedded_TD).to(dtype)
            made = [norm.modulation(cond_TD).float().unflatten(-1, (3, -1)) for norm in norms]
            table = torch.stack(made, dim=1)
            table[:, :, 0] += 1  # scale to factor
        self.register_buffer("table", table)
        self.register_buffer("starts", torch.arange(horizon, device=table.device) == 0)

    def suffix_at(
        self, state_BA: Tensor, x_BKHA: Tensor, timestep: float, dtype: torch.dtype, given_BH: Tensor | None
    ) -> Span:
        """The action tokens [B·K, H, D] of one of the steps: draws are rows, and the state is in the cache."""
        row, clean = self.table[round((1 - timestep) * self.num_steps)], self.table[-1]
        if given_BH is not None:
            given_BH1 = given_BH.repeat_interleave(x_BKHA.shape[1], dim=0)[..., None]
            row = torch.where(given_BH1, clean[..., None, None, :], row[..., None, None, :])
        tokens_BTD, cond = self.action_in(x_BKHA.flatten(0, 1)), None
        if isinstance(self.head, Pi0Head):
            weight = self.head.time_mlp_in.weight
            mixed_BTD = F.linear(tokens_BTD, weight[:, : len(weight)].float()) + row
            tokens_BTD = self.head.time_mlp_out(F.silu(mixed_BTD))
        else:
            cond = StepConditioning(row.flatten(0, 1).unbind(0))
        return self._span(tokens_BTD.to(dtype), cond)

    def state_token(self, state_BA: Tensor, dtype: torch.dtype) -> Span:
        """π0's, as a span of its own."""
        assert isinstance(self.head, Pi0Head)
        return self._span(self.head.state_in(state_BA)[:, None].to(dtype), None)

    def _span(self, tokens_BTD: Tensor, cond: StepConditioning | None) -> Span:
        b, t, _ = tokens_BTD.shape
        return Span(
            tokens_BTD=tokens_BTD,
            valid_BT=self.starts[:1].expand(b, t),
            starts_block_BT=self.starts[:t].expand(b, t),
            cond=cond,
            all_valid=True,
            one_block=True,
        )


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
