"""Low-rank adapters merged into the matrices that they adapt."""

from collections.abc import Container, Mapping

import torch
from torch import Tensor

from manipi.model import VLA
from manipi.model.config import ModelConfig
from manipi.model.layers import AdaptedLinear


def merge_adapters(weights: Mapping[str, Tensor], config: ModelConfig, keep: Container[str] = ()) -> dict[str, Tensor]:
    """The weights with plain matrices, `W + scale · B A`, each in the wider dtype of the two.

    Args:
        config: of the model that the weights belong to.
        keep: names of adapters that stay beside their matrices.
    """
    with torch.device("meta"):
        model = VLA(config)
    model.load_state_dict(dict(weights), strict=True, assign=True)
    merged = dict(weights)
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and f"{name}.lora_a" not in keep:
            # Rounding to a coarser base would lose what the adapters learned.
            dtype = torch.promote_types(module.weight.dtype, module.lora_a.dtype)
            merged[f"{name}.weight"] = module.merged().to(dtype)
            del merged[f"{name}.lora_a"], merged[f"{name}.lora_b"]
    return merged
