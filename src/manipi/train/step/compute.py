"""How a step computes, applied from outside to the same model: what backward recomputes, and what is compiled.

                        forward keeps for backward          backward computes once more
    none                everything                          nothing
    elementwise         results of matrices and attention   norms, GELU and gating, rotations, casts
    full                the input of each layer             each layer

The unit is one Gemma block with all its experts, or one SigLIP layer. Names and values of parameters stay, and so does
every number (Chen et al. 2016; which results to keep, Korthikanti et al. 2022).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from manipi.model import VLA
from manipi.model.device import many_variants
from manipi.train.config import ComputeConfig

_KEPT_OPS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


def apply_compute(model: VLA, config: ComputeConfig) -> None:
    """Give the layers of `model` another `forward`; once, before training."""
    for layer in [*model.vision.blocks, *model.gemma.blocks]:
        if config.recompute != "none":
            layer.forward = _recomputing(layer.forward, config.recompute)
        if config.compile:
            layer.forward = torch.compile(layer.forward, **many_variants())


def _recomputing(forward: Callable[..., Any], recompute: str) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # the layers draw nothing
    if recompute == "elementwise":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _kept_ops())

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

    return recomputed


def _kept_ops() -> list[Any]:
    kept: list[Any] = [getattr(torch.ops.aten, name).default for name in _KEPT_OPS if hasattr(torch.ops.aten, name)]
    return [*kept, torch.ops.higher_order.flex_attention]
