"""What a policy remembers: older pictures by attention over time, older states as tokens."""

from dataclasses import replace

import pytest
import torch

from manipi.errors import ConfigError
from manipi.model import VLA
from manipi.model.config import HistoryConfig, VisionSize
from manipi.model.inputs import blank_past
from manipi.model.siglip import SigLIP, Time
from manipi.train.step.state import trainable_parameters

B, K, H, A, PAST = 3, 2, 5, 6, 3
HISTORY = HistoryConfig(frames=PAST + 1, stride=2)
SOME = torch.tensor([[False, False, True], [False, True, True], [True, True, True]])


@pytest.fixture(params=["pi0", "pi05"])
def config(configs, request):
    return configs[request.param]


@pytest.fixture
def draws():
    torch.manual_seed(3)
    return torch.randn(B, K, H, A), torch.rand(B, K)


def remembering(batch, valid=SOME):
    torch.manual_seed(4)
    images = torch.randint(0, 256, (B, PAST, *batch.images.shape[1:]), dtype=torch.uint8)
    return replace(batch, past_images=images, past_states=torch.randn(B, PAST, A), past_valid=valid)


def alike(build, config, history):
    """Two models with the same weights, without and with a history."""
    plain, other = build(config), VLA(replace(config, history=history))
    found = other.load_state_dict(plain.state_dict(), strict=False)
    assert {name.partition(".")[0] for name in found.missing_keys} <= {"past_state"}
    assert not found.unexpected_keys
    return plain, other


def test_one_frame_is_todays_model_bit_for_bit(build, config, batch, draws):
    plain, one = alike(build, config, HistoryConfig(frames=1, stride=8))
    assert list(one.state_dict()) == list(plain.state_dict())
    losses = [model(batch, *draws).loss for model in (plain, one)]
    assert torch.equal(*losses)
    grads = [torch.autograd.grad(loss, model.head.parameters()) for loss, model in zip(losses, (plain, one))]
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert torch.equal(*(model.sample(batch, draws[0]) for model in (plain, one)))


def test_where_nothing_happened_yet_it_is_the_model_without_a_history(build, config, batch, draws):
    plain, other = alike(build, config, HISTORY)
    nothing = replace(batch, **blank_past(other.config, B, 2))
    torch.testing.assert_close(other(nothing, *draws).loss, plain(batch, *draws).loss, atol=2e-6, rtol=1e-5)


def test_a_masked_frame_changes_nothing_and_a_seen_one_does(build, config, batch, draws):
    model, inputs = build(replace(config, history=HISTORY)), remembering(batch)
    before = model(inputs, *draws).per_step
    for name in ("past_images", "past_states"):
        was = getattr(inputs, name)
        there = SOME.reshape(B, PAST, *[1] * (was.ndim - 2))
        other = 255 - was if name == "past_images" else was + 3
        assert torch.equal(before, model(replace(inputs, **{name: torch.where(there, was, other)}), *draws).per_step)
        moved = model(replace(inputs, **{name: torch.where(there, other, was)}), *draws).per_step
        assert (moved - before).flatten(1).abs().amax(1).min() > 1e-4  # in every row


def test_a_camera_that_is_not_there_has_no_past_either(build, config, batch, draws):
    model, inputs = build(replace(config, history=HISTORY)), remembering(batch)
    pictures = inputs.past_images.clone()
    pictures[1, :, 0] = 0  # the second row lacks its first camera
    assert torch.equal(model(inputs, *draws).per_step, model(replace(inputs, past_images=pictures), *draws).per_step)


def test_trimming_and_parts_change_nothing(build, config, batch, draws):
    config, inputs = replace(config, history=HISTORY), remembering(batch)
    whole, padded = build(config), VLA(config, trim=False)
    padded.load_state_dict(whole.state_dict())
    expected = whole(inputs, *draws).per_step
    torch.testing.assert_close(padded(inputs, *draws).per_step, expected, atol=2e-6, rtol=1e-4)
    rows = [whole(part, noise[None], time[None]).per_step for part, noise, time in zip(inputs.split(B), *draws)]
    torch.testing.assert_close(torch.cat(rows), expected, atol=2e-6, rtol=1e-4)


def test_the_projection_of_states_is_trained_whatever_else_is(build, config):
    model = build(replace(config, history=HISTORY))
    for trained in ("full", "expert_only", "vision_frozen"):
        assert "past_state.weight" in trainable_parameters(model, trained)


def test_a_model_that_remembers_needs_its_past(build, config, batch, draws):
    with pytest.raises(ConfigError, match="past_images"):
        build(replace(config, history=HISTORY))(batch, *draws)


@pytest.mark.parametrize(
    ("depth", "every", "temporal"), [(1, 4, {0}), (3, 4, {2}), (4, 2, {1, 3}), (27, 4, {*range(3, 27, 4)})]
)
def test_which_blocks_look_back(depth, every, temporal):
    size = VisionSize(width=4, depth=depth, mlp_dim=4, num_heads=1, patch_size=4, image_size=4)
    with torch.device("meta"):
        assert SigLIP(size, 8, every).temporal == temporal


def test_the_encoder_is_what_the_equations_say():
    """Frame by frame, patch by patch and head by head, in loops; with a block behind the last one that looks back."""
    torch.manual_seed(6)
    size = VisionSize(width=8, depth=3, mlp_dim=12, num_heads=2, patch_size=4, image_size=8)
    encoder, frames, valid = SigLIP(size, 8, every=2), torch.rand(4, 8, 8, 3) * 2 - 1, [False, True, True, True]
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    time = Time.of(torch.tensor([valid]), 8)
    assert not time.embedding_KD[-1].any()
    x = [encoder.patch_embedding(patches(frame)) + encoder.position_embedding for frame in frames]
    for index, block in enumerate(encoder.blocks):
        seen = [one + time.embedding_KD[i] * (index == 1) for i, one in enumerate(x)]
        q, k, v = zip(*([proj[0] for proj in block.qkv(block.attention_norm(one[None]))] for one in seen))  # [N, P, H]
        mixed = [value.clone() for value in v]
        for now in range(4) if index == 1 else ():
            for patch in range(4):
                for head in range(2):
                    past = [i for i in range(now + 1) if valid[i] or i == now]
                    logits = torch.stack([q[now][head, patch] @ k[i][head, patch] for i in past]) / 2  # √4
                    values = torch.stack([v[i][head, patch] for i in past])
                    mixed[now][head, patch] = logits.softmax(0) @ values
        for now in range(4):
            weights = (q[now] @ k[now].transpose(1, 2) / 2).softmax(-1)
            y = x[now] + block.out_proj((weights @ mixed[now]).transpose(0, 1).flatten(1))
            x[now] = y + block.down_proj(torch.nn.functional.gelu(block.up_proj(block.mlp_norm(y)), approximate="tanh"))
    expected = encoder.head(encoder.final_norm(x[-1]))
    found = encoder(frames[-1:], torch.float32, frames[None, :-1], torch.tensor([valid[:-1]]))
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


def patches(frame):
    return torch.stack([frame[y : y + 4, x : x + 4].flatten() for y in (0, 4) for x in (0, 4)])
