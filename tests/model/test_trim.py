from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from manipi.model import VLA, ModelInput
from manipi.model.config import Compat, Pi0FastConfig
from manipi.model.inputs import PROMPT_MULTIPLE, kept

B, C, L, H, A = 3, 2, 7, 5, 6
NAMES = ["pi0", "pi05", "pi0_fast"]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PROMPT_LENGTHS = st.lists(st.integers(0, L), min_size=B, max_size=B)
IMAGE_VALID = st.lists(st.lists(st.booleans(), min_size=C, max_size=C), min_size=B, max_size=B)


@pytest.fixture(params=NAMES)
def models(request, configs, build) -> tuple[VLA, VLA]:
    """Trimmed and padded, with the same weights."""
    trimmed, padded = build(configs[request.param]), VLA(configs[request.param], trim=False)
    padded.load_state_dict(trimmed.state_dict())
    return trimmed, padded


def masked(batch: ModelInput, image_valid: list[list[bool]], prompt_lengths: list[int]) -> ModelInput:
    token_valid = torch.arange(L) < torch.tensor(prompt_lengths)[:, None]
    causal = torch.arange(L).expand(B, L) >= 3
    images = {"image_valid": torch.tensor(image_valid)}
    return replace(batch, **images, token_valid=token_valid, token_causal=causal, token_loss=causal & token_valid)


def loss_and_gradients(model: VLA, batch: ModelInput) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    torch.manual_seed(0)
    draws = () if isinstance(model.config, Pi0FastConfig) else (torch.randn(B, 2, H, A), torch.rand(B, 2))
    loss = model(batch, *draws)
    loss.loss.backward()
    return {"loss": loss.loss, "each": loss[1], **{name: p.grad for name, p in model.named_parameters()}}


def answer(model: VLA, batch: ModelInput) -> torch.Tensor:
    if isinstance(model.config, Pi0FastConfig):
        return model.decode_tokens(replace(batch, token_causal=None), 5)
    return model.sample(batch, torch.randn(B, H, A, generator=torch.Generator().manual_seed(2)), num_steps=2)


@EXAMPLES
@given(image_valid=IMAGE_VALID, prompt_lengths=PROMPT_LENGTHS)
def test_trimmed_equals_padded(models, batch, image_valid, prompt_lengths):
    inputs = masked(batch, image_valid, prompt_lengths)
    trimmed, padded = (loss_and_gradients(model, inputs) for model in models)
    for name, value in padded.items():
        assert (value is None) == (trimmed[name] is None), name
        if value is not None:
            torch.testing.assert_close(trimmed[name], value, atol=1e-4, rtol=1e-3, msg=name)
    # A row without any token to start from is read at a place that means nothing.
    if any(image_valid[row] == [False] * C and not prompt_lengths[row] for row in range(B)):
        return
    torch.testing.assert_close(*(answer(model, inputs) for model in models), **CLOSE)


@pytest.mark.parametrize("token_valid", [[1, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0]])
@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_prompts_may_have_holes(configs, build, batch, name, token_valid):
    model, inputs = build(configs[name]), replace(batch, token_valid=torch.tensor([token_valid] * B).bool())
    found = answer(model, inputs)
    model.trim = False
    torch.testing.assert_close(found, answer(model, inputs), **CLOSE)


def test_where_nothing_is_masked_every_bit_is_the_same(models, batch):
    inputs = masked(batch, [[True] * C] * B, [L] * B)
    trimmed, padded = (loss_and_gradients(model, inputs) for model in models)
    assert all(torch.equal(trimmed[n], v) for n, v in padded.items() if v is not None)
    assert torch.equal(*(answer(model, inputs) for model in models))


@pytest.mark.parametrize("lost", [0, 1])
def test_positions_of_the_padded_batch_survive(configs, build, batch, lost):
    config = replace(configs["pi0_fast"], compat=Compat(fast_padded_positions=True))
    model = build(config)
    valid = [[camera != lost for camera in range(C)]] * (B - 1) + [[camera == lost for camera in range(C)]]
    for image_valid in (valid, valid[:1] * B):
        inputs = masked(batch, image_valid, [7, 6, 5])
        trimmed = model(inputs).per_sample
        model.trim = False
        torch.testing.assert_close(trimmed, model(inputs).per_sample, **CLOSE)
        model.trim = True


def computed(model: VLA, batch: ModelInput) -> tuple[int, int]:
    """Pictures through the encoder, and prefix tokens through the language model."""
    sizes = {}
    hooks = [
        model.vision.patch_embedding.register_forward_hook(lambda _, inputs, __: sizes.update(pictures=len(inputs[0]))),
        model.gemma.blocks[0].register_forward_hook(lambda _, i, __: sizes.update(tokens=i[0]["vlm"].shape[1])),
    ]
    loss_and_gradients(model, batch)
    for hook in hooks:
        hook.remove()
    return sizes["pictures"], sizes["tokens"]


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_nothing_masked_by_all_rows_is_computed(configs, build, batch, name):
    model, patches = build(configs[name]), 4
    ragged = masked(batch, [[True, True], [False, True], [False, False]], [4, 5, 2])
    assert computed(model, ragged) == (3, 2 * patches + 5)
    one_camera = masked(batch, [[True, False]] * B, [4, 5, 2])
    assert computed(model, one_camera) == (3, patches + 5)
    model.trim = False
    assert computed(model, one_camera) == (B * C, C * patches + L)


def test_no_mask_is_made_where_everything_is_seen(configs, build, batch):
    model = build(configs["pi05"])
    noise, time = torch.randn(B, 1, H, A), torch.rand(B, 1)

    def masks(inputs: ModelInput) -> list[bool]:
        spans = {
            "vlm": model.embed_prefix(inputs, inputs.kept),
            "action": model.head.suffix(None, noise, time, model.dtype),
        }
        return [
            geometry.mask is not None
            for geometry in model.gemma.place(spans, None, {"vlm": 1, "action": H})[0].values()
        ]

    inputs = replace(batch, token_causal=None, image_valid=torch.tensor([[True, False]] * B))
    assert masks(replace(inputs, token_valid=torch.arange(L).expand(B, L) < 4)) == [False, False]
    assert masks(inputs) == [True, True]


def test_masks_are_read_before_they_leave_the_host_and_again_when_they_change(batch):
    arrays = {f.name: np.asarray(v) for f in fields(batch) if (v := getattr(batch, f.name)) is not None}
    moved = ModelInput.from_numpy(arrays, "meta")  # reading a mask there is an error
    assert moved.kept == batch.kept
    changed = replace(batch, image_valid=torch.zeros(B, C, dtype=torch.bool))
    assert changed.kept.cameras == ()
    assert not changed.kept.all_valid


def test_what_is_kept_goes_along_with_parts_and_changes_of_a_batch(batch):
    """On a device where masks cannot be read, as on a GPU that would be waited for."""
    here = masked(batch, [[True, False], [False, True], [False, False]], [4, 6, 1])
    there = here.to("meta")
    assert there.to("meta").kept == here.kept
    assert replace(there, delay=torch.zeros(B, device="meta"), images=there.images * 2).kept == here.kept
    assert [part.kept for part in there.split(B)] == [part.kept for part in here.split(B)]
    assert len({part.kept for part in there.split(B)}) == B
    again = replace(replace(there, state=there.state + 1).split(B)[1], actions=None).split(1)[0]
    assert again.kept == here.split(B)[1].kept
    with pytest.raises(NotImplementedError, match="meta"):
        _ = replace(there, token_valid=there.token_valid.clone()).kept


def test_only_copies_from_the_host_to_a_gpu_do_not_wait(batch):
    """What comes back without waiting is read before it is there."""
    waited = {}

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                way = args[0].device.type, torch.device(kwargs["device"]).type
                waited.setdefault(way, set()).add(not kwargs.get("non_blocking", False))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(allow_non_fake_inputs=True), Copies():
        there = batch.to("cuda:0")
        there.to("cpu")
        batch.to("meta")
    assert waited == {("cpu", "cuda"): {False}, ("cuda", "cpu"): {True}, ("cpu", "meta"): {True}}


def test_prompts_on_a_gpu_keep_a_round_number_of_tokens():
    images, tokens = torch.ones(2, 1, dtype=torch.bool), torch.arange(60).expand(2, 60) < 37
    assert kept(images, tokens, None, multiple=PROMPT_MULTIPLE).prompt_len == 48
    assert kept(images, tokens[:, :40], None, multiple=PROMPT_MULTIPLE).prompt_len == 40
    assert not kept(images, tokens, None, multiple=PROMPT_MULTIPLE).all_valid
