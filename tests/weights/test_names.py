from dataclasses import replace

import numpy as np
import pytest
import torch
from openpi_trees import from_openpi_tree, to_openpi_tree

from manipi.errors import WeightsMismatchError
from manipi.model import VLA
from manipi.model.config import Adapters, GemmaSize, LoRA, Pi0Config, Pi0FastConfig, Pi05Config, VisionSize
from manipi.weights.names import openpi_arrays

SIZES = {
    "vision": VisionSize(width=6, depth=2, mlp_dim=10, num_heads=2, patch_size=2, image_size=4),
    "vlm": GemmaSize(width=8, depth=3, mlp_dim=12, num_heads=4, num_kv_heads=2, head_dim=2),
    "vocab_size": 11,
    "action_dim": 5,
}
EXPERT = GemmaSize(width=4, depth=3, mlp_dim=14, num_heads=4, num_kv_heads=2, head_dim=2)
# As many key/value heads as query heads: the reference joins the three projections.
JOINED = {"vlm": replace(SIZES["vlm"], num_kv_heads=4), "vlm_adapters": Adapters(attention=LoRA(rank=3, alpha=3))}
CONFIGS = [
    Pi0Config(**SIZES, action_expert=EXPERT),
    Pi05Config(**SIZES, action_expert=EXPERT),
    Pi0FastConfig(**SIZES),
    Pi0FastConfig(**SIZES | JOINED),
]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=["pi0", "pi05", "pi0_fast", "pi0_fast, joined"])


def state_of(config):
    """Every element its own number, so that a wrong order shows."""
    torch.manual_seed(0)
    return {name: torch.randn_like(value) for name, value in VLA(config).state_dict().items()}


@every_config
def test_round_trip(config):
    state = state_of(config)
    tree = to_openpi_tree(state, config)
    assert {path: value.shape for path, value in tree.items()} == {p: a.shape for p, a in openpi_arrays(config).items()}
    back = from_openpi_tree(tree, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) and back[name].is_contiguous() for name, value in state.items())
    VLA(config).load_state_dict(back)


@every_config
def test_every_array_has_one_home(config):
    homes = [name for array in openpi_arrays(config).values() for layer in array.names for name in layer]
    assert sorted(homes) == sorted(VLA(config).state_dict())


def test_heads_and_layers_are_where_the_reference_has_them():
    config = CONFIGS[0]
    tree = to_openpi_tree(state := state_of(config), config)
    layer, head, size = 2, 3, config.vlm.head_dim
    q = state[f"gemma.blocks.{layer}.experts.vlm.q_proj.weight"][head * size : (head + 1) * size]
    np.testing.assert_array_equal(tree["PaliGemma/llm/layers/attn/q_einsum/w"][layer, head], q.T)
    v = state[f"gemma.blocks.{layer}.experts.action.v_proj.weight"][size:]
    np.testing.assert_array_equal(tree["PaliGemma/llm/layers/attn/kv_einsum_1/w"][layer, 1, 1], v.T)


def test_joined_projections_are_queries_keys_values():
    config = CONFIGS[3]
    tree = to_openpi_tree(state := state_of(config), config)
    layer, head, size = 2, 3, config.vlm.head_dim
    for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
        weight = state[f"gemma.blocks.{layer}.experts.vlm.{name}.weight"][head * size : (head + 1) * size]
        np.testing.assert_array_equal(tree["PaliGemma/llm/layers/attn/qkv_einsum/w"][layer, part, head], weight.T)
    assert not any("/q_einsum/" in path or "/kv_einsum/" in path for path in tree)


def test_the_error_lists_everything_that_does_not_match():
    config = CONFIGS[1]
    tree = to_openpi_tree(state_of(config), config)
    del tree["time_mlp_in/bias"]
    tree["extra/kernel"] = np.zeros(3)
    tree["action_in_proj/bias"] = np.zeros(7)
    with pytest.raises(WeightsMismatchError) as error:
        from_openpi_tree(tree, config)
    assert error.value.found == (
        "missing ['time_mlp_in/bias']; unexpected ['extra/kernel']; "
        "mis-shaped ['action_in_proj/bias (7,) instead of (4,)']"
    )


def test_a_state_dict_of_another_policy_is_refused():
    with pytest.raises(WeightsMismatchError, match="state_in"):
        to_openpi_tree(state_of(CONFIGS[1]), CONFIGS[0])


def test_tensors_do_not_share_memory():
    config = CONFIGS[0]
    state = from_openpi_tree(to_openpi_tree(state_of(config), config), config)
    pointers = [value.untyped_storage().data_ptr() for value in state.values()]
    assert len(set(pointers)) == len(pointers)
