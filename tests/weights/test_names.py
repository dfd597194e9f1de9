from dataclasses import replace

import numpy as np
import pytest
import torch
from openpi_trees import from_openpi_tree, to_openpi_tree

from manipi.errors import ConfigError, WeightsMismatchError
from manipi.model import VLA
from manipi.model.config import Adapters, GemmaSize, LoRA, Pi0Config, Pi0FastConfig, Pi05Config, VisionSize
from manipi.weights.names import OPENPI_JAX, TORCH_LAYOUTS, arrays, infer_config, openpi_arrays

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


ADAPTERS = Adapters(attention=LoRA(rank=3, alpha=7.0, rank_stabilized=True), feed_forward=LoRA(rank=5, alpha=2.0))


def shapes_of(config, layout):
    return {name: array.shape for name, array in arrays(config, layout).items()}


@every_config
@pytest.mark.parametrize("layout", [OPENPI_JAX, *TORCH_LAYOUTS], ids=lambda layout: layout.name)
def test_the_shapes_of_a_file_give_the_config(config, layout):
    config = replace(config, action_horizon=7, max_token_len=9)
    if layout is OPENPI_JAX:
        config = replace(config, vlm_adapters=ADAPTERS)
    else:
        config = replace(config, vlm_adapters=Adapters())
    # What shapes do not tell comes from `like`, whose other sizes do not count.
    other = {"vision": replace(config.vision, width=16, depth=5, mlp_dim=3, image_size=12)}
    other["vlm"] = replace(config.vlm, width=16, mlp_dim=20)
    if not isinstance(config, Pi0FastConfig):
        other |= {"action_dim": 9, "action_expert": replace(EXPERT, width=16)}
    like = replace(config, **other)
    found = infer_config(shapes_of(config, layout), layout, like=like)
    if layout.vlm_only:
        assert (found.vision, found.vlm, found.vocab_size) == (config.vision, config.vlm, config.vocab_size)
    else:
        assert found == config


def test_an_adapter_of_unknown_alpha_is_scaled_by_one():
    found = infer_config(shapes_of(replace(CONFIGS[1], action_adapters=ADAPTERS), OPENPI_JAX))
    assert found.action_adapters == Adapters(attention=LoRA(rank=3, alpha=3.0), feed_forward=LoRA(rank=5, alpha=5.0))
    assert not found.vlm_adapters


def test_what_is_missing_to_tell_the_sizes_is_named():
    jax, torch_layout = shapes_of(CONFIGS[0], OPENPI_JAX), TORCH_LAYOUTS[0]
    del jax["PaliGemma/llm/layers/attn/attn_vec_einsum_1/w"]
    with pytest.raises(WeightsMismatchError, match=r"missing \['PaliGemma/llm/layers/attn/attn_vec_einsum_1/w'\]"):
        infer_config(jax)
    sixes = {name: replace(getattr(CONFIGS[0], name), head_dim=6) for name in ("vlm", "action_expert")}
    with pytest.raises(ConfigError, match="heads of 6 dimensions"):
        infer_config(shapes_of(CONFIGS[0], torch_layout), torch_layout, like=replace(CONFIGS[0], **sixes))
    flat = shapes_of(CONFIGS[0], OPENPI_JAX) | {"PaliGemma/img/embedding/kernel": (20,)}
    with pytest.raises(WeightsMismatchError, match=r"img/embedding/kernel of shape \(20,\) instead of 4 axes"):
        infer_config(flat)
