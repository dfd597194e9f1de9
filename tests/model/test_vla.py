from dataclasses import replace

import numpy as np
import pytest
import torch

from manipi.errors import ConfigError
from manipi.model import VLA, ModelInput
from manipi.model.config import Pi0FastConfig

NAMES = ["pi0", "pi05", "pi0_fast"]


def loss_of(model, batch):
    if isinstance(model.config, Pi0FastConfig):
        return model(batch).loss
    torch.manual_seed(0)
    return model(batch, torch.randn(3, 5, 6), torch.rand(3)).loss


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_the_weights(configs, name):
    a, b, c = VLA(configs[name]), VLA(configs[name]), VLA(configs[name])
    c.init_weights(seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.gemma.token_embedding, c.gemma.token_embedding)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_made_without_memory_equals_one_made_with(configs, batch, name):
    with torch.device("meta"):
        empty = VLA(configs[name])
    assert all(p.is_meta for p in empty.parameters())
    model = empty.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    model.init_weights(seed=0)
    assert torch.equal(loss_of(model, batch), loss_of(VLA(configs[name]), batch))


@pytest.mark.parametrize("name", NAMES)
def test_first_losses_are_of_the_expected_size(configs, batch, name):
    loss = float(loss_of(VLA(configs[name]), batch).detach())
    # Velocity errors of order one; next-token loss near that of a uniform guess among 61 tokens.
    assert 1.0 < loss < 6.0 if name != "pi0_fast" else abs(loss - np.log(61)) < 2.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_bfloat16_compute_stays_close_and_keeps_the_parameters(configs, build, batch, name, parameters):
    exact = loss_of(build(configs[name]), batch)
    model = build(replace(configs[name], dtype="bfloat16")).to(parameters)
    loss = loss_of(model, batch)
    assert loss.dtype is torch.float32
    assert all(p.dtype is parameters for p in model.parameters())
    assert model.embed_prefix(batch).tokens_BTD.dtype is torch.bfloat16
    torch.testing.assert_close(loss, exact, atol=0, rtol=0.1)
    loss.backward()
    assert all(p.grad is None or p.grad.dtype is parameters for p in model.parameters())


def test_from_numpy_gives_the_dtypes_that_the_model_reads():
    batch = {
        "images": np.zeros((2, 1, 8, 8, 3), np.uint8),
        "image_valid": np.ones((2, 1), np.int32),
        "tokens": np.zeros((2, 7), np.int32),
        "token_valid": np.ones((2, 7), bool),
        "state": np.zeros((2, 6), np.float64),
    }
    inputs = ModelInput.from_numpy(batch)
    found = [getattr(inputs, name).dtype for name in batch]
    assert found == [torch.uint8, torch.bool, torch.long, torch.bool, torch.float32]
    assert inputs.batch_size == 2
    assert inputs.actions is None


def test_from_numpy_refuses_strange_and_missing_keys():
    with pytest.raises(ConfigError, match="did you mean image_valid"):
        ModelInput.from_numpy({"image_valids": np.ones((2, 1), bool)})
    with pytest.raises(ConfigError, match="no images, image_valid"):
        ModelInput.from_numpy({"tokens": np.zeros((2, 7))})


@pytest.mark.parametrize(
    ("name", "change"),
    [("images", lambda x: x[:, :1]), ("state", lambda x: x[:, :3]), ("token_valid", lambda x: x[:, 1:])],
)
def test_shapes_are_compared_with_the_config(configs, build, batch, name, change):
    model = build(configs["pi05"])
    with pytest.raises(ConfigError) as error:
        model.embed_prefix(replace(batch, **{name: change(getattr(batch, name))}))
    assert f"ModelInput.{name}" in error.value.where
