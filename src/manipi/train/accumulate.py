"""Gradients of a large batch from small parts of it, exactly.

The loss is a mean over real elements, and parts may hold different numbers of these (chunks end with their episode),
so that a mean over the parts' means would be another loss:

    loss = Σ_parts weight_part · loss_part / Σ_parts weight_part        weight: real elements (flow), samples (tokens)

The total comes from the masks, before the first part runs, so that each part can be scaled and forgotten.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from manipi.model import VLA, ModelInput


def accumulate_gradients(model: VLA, inputs: ModelInput, draws: Sequence[Tensor], parts: int) -> Tensor:
    """Add the gradients of the batch's loss to those of the parameters, part after part. Returns the loss.

    Args:
        draws: noise and timesteps of the whole batch; none for π0-FAST.
        parts: how many follow each other; the batch divides by it.
    """
    total = model.loss_weight(inputs, draws[0].shape[1] if draws else 1).clamp(min=1)
    loss = torch.zeros((), device=total.device)
    for part, *drawn in zip(inputs.split(parts), *(draw.chunk(parts) for draw in draws), strict=True):
        found = model(part, *drawn)
        share = found.loss * (found.weight / total)
        share.backward()
        loss += share.detach()
    return loss
