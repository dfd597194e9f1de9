"""Gradients of a large batch from small parts of it, one after the other or in several processes, exactly.

The loss is a mean over real elements, and parts may hold different numbers of these (chunks end with their episode),
so that a mean over the parts' means would be another loss:

    loss = Σ_parts weight_part · loss_part / Σ_parts weight_part        weight: real elements (flow), samples (tokens)

The total comes from the masks, before the first part runs, so that each part can be scaled and forgotten.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from manipi.model import VLA, ModelInput
from manipi.train.parallel import ALONE, World


def accumulate_gradients(
    model: VLA, inputs: ModelInput, draws: Sequence[Tensor], parts: int, world: World = ALONE
) -> tuple[Tensor, Tensor]:
    """Add the gradients of the batch's loss to those of the parameters, part after part.

    Returns the loss of the whole batch, and that of each sample here [B].

    Args:
        inputs: this process's rows of the batch.
        draws: their noise and timesteps; none for π0-FAST.
        parts: how many follow each other; the rows divide by it.
        world: the processes among whom the batch is shared.
    """
    total = world.total(model.loss_weight(inputs, draws[0].shape[1] if draws else 1)).clamp(min=1)
    loss, samples = torch.zeros((), device=total.device), []
    for part, *drawn in zip(inputs.split(parts), *(draw.chunk(parts) for draw in draws), strict=True):
        found = model(part, *drawn)
        share = found.loss * (found.weight / total)
        # Gradients are averaged over processes, although each has a share of the sum.
        (share * world.size).backward()
        loss += share.detach()
        samples.append(found[1].detach().flatten(1).mean(1) if found[1].ndim > 1 else found[1].detach())
    return world.total(loss), torch.cat(samples)
