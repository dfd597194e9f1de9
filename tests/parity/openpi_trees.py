"""The reference's parameters as whole trees, to and from state dicts; manipi itself streams them, layer by layer."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from manipi.model.config import ModelConfig
from manipi.weights.names import (
    Array,
    openpi_arrays,
    require_match,
    stack_layer,
    unstack_layer,
)
from manipi.weights.stores import to_torch

_TREE = "the reference's parameter tree"


def from_openpi_tree(arrays: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Tensor]:
    """The state dict of `VLA(config)` from the reference's parameters, in their dtype.

    Args:
        arrays: by tree path joined with "/", without the `value` leaves of training checkpoints.

    Raises:
        WeightsMismatchError: arrays are missing, unexpected or mis-shaped; it lists all of them.
    """
    tree = openpi_arrays(config)
    require_match({path: a.shape for path, a in tree.items()}, {path: a.shape for path, a in arrays.items()}, _TREE)
    state: dict[str, Tensor] = {}
    for path, array in tree.items():
        values = to_torch(arrays[path]).reshape(len(array.names), *array.layer_shape)
        for layer, of_layer in enumerate(values):
            state.update(unstack_layer(array, layer, of_layer))
    return state


def to_openpi_tree(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, np.ndarray]:
    """The inverse of `from_openpi_tree`, as float32.

    Raises:
        WeightsMismatchError: tensors are missing, unexpected or mis-shaped; it lists all of them.
    """
    tree = openpi_arrays(config)
    expected = {name: a.our_shape for a in tree.values() for layer in a.names for name in layer}
    require_match(expected, {name: tuple(tensor.shape) for name, tensor in state.items()}, "the state dict")

    def stack(array: Array) -> np.ndarray:
        layers = [stack_layer(array, layer, state).float() for layer in range(len(array.names))]
        return torch.stack(layers).reshape(array.shape).cpu().numpy()

    return {path: stack(array) for path, array in tree.items()}
