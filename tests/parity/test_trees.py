"""Names, shapes and numbers of the parameters at full size, the default settings, and what adapters freeze."""

from dataclasses import replace

import pytest
import torch
from golden import ABSENT, GOLDENS, KINDS, SHARED, find, name_of, read_json, require_frozen

from manipi.model import VLA
from manipi.model.config import ModelConfig
from manipi.weights.names import infer_config, openpi_arrays

pytestmark = pytest.mark.skipif(not GOLDENS, reason=ABSENT)


def config_of(shapes: dict[str, tuple[int, ...]], defaults: dict[str, int]) -> ModelConfig:
    """The config whose arrays these are, with adapters of the ranks that they show, and what arrays do not show."""
    config = infer_config(shapes)
    if "action_in_proj/kernel" in shapes:
        assert config.action_dim == defaults["action_dim"]
    return replace(config, **defaults)


@pytest.mark.parametrize("file", find("trees/*.json"), ids=name_of)
def test_trees(file, measure):
    tree = read_json(file)
    shapes = {name: tuple(array["shape"]) for name, array in tree["parameters"].items()}
    config = config_of(shapes, tree["defaults"])
    with torch.device("meta"):
        model = VLA(config)
    ours = {name: array.shape for name, array in openpi_arrays(config).items()}
    assert ours == shapes
    assert len(ours) == tree["num_arrays"]
    numbers = {array["dtype"] for array in tree["parameters"].values()}
    assert numbers == {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    require_frozen(config, tree["frozen_parameters_by_default_filter"])
    measure("parameters of the full size", abs(sum(p.numel() for p in model.parameters()) - tree["num_parameters"]), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_our_defaults_are_the_references(kind):
    """Of its plain configs, which the public set has under these names; other sets may have any."""
    file = SHARED / f"golden/trees/{kind}.json"
    if not file.exists():
        pytest.skip(f"{file} is absent; set MANIPI_SHARED")
    defaults = read_json(file)["defaults"]
    assert {key: getattr(KINDS[kind](), key) for key in defaults} == defaults
