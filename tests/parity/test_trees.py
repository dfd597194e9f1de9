"""Names, shapes and numbers of the parameters at full size, the default settings, and what adapters freeze."""

from typing import Any

import pytest
import torch
from golden import ABSENT, GOLDENS, find, name_of, read_json, require_frozen

from manipi.checkpoints.openpi_names import openpi_arrays
from manipi.model import VLA
from manipi.model.config import REFERENCE, Adapters, LoRA, ModelConfig, Pi0Config, Pi0FastConfig, Pi05Config

pytestmark = pytest.mark.skipif(not GOLDENS, reason=ABSENT)

Shapes = dict[str, tuple[int, ...]]


def config_of(shapes: Shapes) -> ModelConfig:
    """Our released config of the kind whose arrays these are, with adapters of the ranks that they show."""
    if "action_in_proj/kernel" not in shapes:
        return Pi0FastConfig(vlm_adapters=adapters_of(shapes, ""), compat=REFERENCE)
    kind = Pi0Config if "state_proj/kernel" in shapes else Pi05Config
    fields: dict[str, Any] = {"vlm_adapters": adapters_of(shapes, ""), "action_adapters": adapters_of(shapes, "_1")}
    return kind(**fields, compat=REFERENCE)


def adapters_of(shapes: Shapes, suffix: str) -> Adapters:
    def lora(name: str) -> LoRA | None:
        shape = shapes.get(f"PaliGemma/llm/layers/{name}")
        return shape and LoRA(rank=shape[-1], alpha=shape[-1])

    attention, feed_forward = f"attn/attn_vec_einsum{suffix}/lora_a", f"mlp{suffix}/linear_lora_a"
    return Adapters(attention=lora(attention), feed_forward=lora(feed_forward))


@pytest.mark.parametrize("file", find("trees/*.json"), ids=name_of)
def test_trees(file, measure):
    tree = read_json(file)
    shapes = {name: tuple(array["shape"]) for name, array in tree["parameters"].items()}
    config = config_of(shapes)
    with torch.device("meta"):
        model = VLA(config)
    ours = {name: array.shape for name, array in openpi_arrays(config).items()}
    assert ours == shapes
    assert len(ours) == tree["num_arrays"]
    numbers = {array["dtype"] for array in tree["parameters"].values()}
    assert numbers == {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    assert {key: getattr(config, key) for key in tree["defaults"]} == tree["defaults"]
    require_frozen(config, tree["frozen_parameters_by_default_filter"])
    measure("parameters of the full size", abs(sum(p.numel() for p in model.parameters()) - tree["num_parameters"]), 0)
