import pytest
import torch
from torch import nn

from manipi.model.config import GemmaSize
from manipi.model.gemma import Conditioning, Expert, Gemma, KVCache, Span, rope, rotate

VLM = GemmaSize(width=32, depth=3, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8)
EXPERT = GemmaSize(width=24, depth=3, mlp_dim=40, num_heads=4, num_kv_heads=2, head_dim=8)
B, P, S = 3, 7, 5
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(params=[False, True], ids=["plain", "adaptive"])
def gemma(request):
    torch.manual_seed(0)
    model = Gemma({"vlm": Expert(size=VLM), "action": Expert(size=EXPERT, adaptive_norm=request.param)}, vocab_size=61)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def prefix():
    """Ragged on the right, and a hole in the middle: a missing camera."""
    torch.manual_seed(1)
    valid = torch.arange(P) < torch.tensor([7, 6, 5])[:, None]
    valid[0, 2:4] = False
    return Span(tokens_BTD=torch.randn(B, P, 32), valid_BT=valid, starts_block_BT=torch.zeros(B, P, dtype=torch.bool))


def suffix(branches=1, seed=2):
    torch.manual_seed(seed)
    starts = torch.zeros(B, branches * S, dtype=torch.bool)
    starts[:, ::S] = True
    return Span(
        tokens_BTD=torch.randn(B, branches * S, 24),
        valid_BT=torch.ones_like(starts),
        starts_block_BT=starts,
        cond=Conditioning(torch.randn(B, branches, 24), None),
        branch_BT=torch.arange(1, branches + 1).repeat_interleave(S).expand(B, -1),
    )


def replaced(span, **changes):
    return Span(**{**vars(span), **changes})


def test_a_cached_suffix_equals_the_joint_forward(gemma, prefix):
    joint = gemma({"vlm": prefix, "action": suffix()})["action"]
    cache = KVCache()
    gemma({"vlm": prefix}, cache, commit=True)
    for _ in range(2):  # running the suffix must not change the cache
        torch.testing.assert_close(gemma({"action": suffix()}, cache)["action"], joint, **CLOSE)


def test_one_token_at_a_time_equals_all_at_once(gemma, prefix):
    causal = replaced(prefix, starts_block_BT=torch.ones_like(prefix.valid_BT))
    at_once = gemma({"vlm": causal})["vlm"]
    cache, steps = KVCache(), []
    for t in range(P):
        piece = {k: v[:, t : t + 1] for k, v in vars(causal).items() if isinstance(v, torch.Tensor)}
        steps.append(gemma({"vlm": Span(**piece)}, cache, commit=True)["vlm"])
    valid = prefix.valid_BT
    torch.testing.assert_close(torch.cat(steps, dim=1)[valid], at_once[valid], **CLOSE)


def test_padding_does_not_leak(gemma, prefix):
    before = gemma({"vlm": prefix, "action": suffix()})
    noisy = replaced(prefix, tokens_BTD=torch.where(prefix.valid_BT[..., None], prefix.tokens_BTD, 1e3))
    after = gemma({"vlm": noisy, "action": suffix()})
    torch.testing.assert_close(after["action"], before["action"], atol=0, rtol=0)
    torch.testing.assert_close(after["vlm"][prefix.valid_BT], before["vlm"][prefix.valid_BT], atol=0, rtol=0)


def test_branches_equal_separate_forwards(gemma, prefix):
    both = suffix(branches=2)
    together = gemma({"vlm": prefix, "action": both})["action"]
    for i in range(2):
        own = slice(i * S, (i + 1) * S)
        alone = Span(
            tokens_BTD=both.tokens_BTD[:, own],
            valid_BT=both.valid_BT[:, own],
            starts_block_BT=both.starts_block_BT[:, own],
            cond=Conditioning(both.cond.rows_BCD[:, i : i + 1], None),
        )
        torch.testing.assert_close(together[:, own], gemma({"vlm": prefix, "action": alone})["action"], **CLOSE)


def test_conditioning_per_token_equals_conditioning_per_branch(gemma, prefix):
    both = suffix(branches=2)
    per_token = replaced(both, cond=Conditioning(both.cond.rows_BCD.repeat_interleave(S, dim=1), None))
    a, b = (gemma({"vlm": prefix, "action": s})["action"] for s in (both, per_token))
    torch.testing.assert_close(a, b, **CLOSE)


def test_insulation_stops_the_gradient_and_changes_nothing_else(gemma, prefix):
    grads, results = [], []
    for insulate in (False, True):
        gemma.zero_grad()
        spans = {"vlm": prefix, "action": suffix()}
        result = gemma(spans, insulate=insulate)["action"]
        result.square().mean().backward()
        results.append(result.detach())
        grads.append({n: p.grad for n, p in gemma.named_parameters()})
    assert torch.equal(results[0], results[1])
    for name, grad in grads[1].items():
        if "action" in name:
            torch.testing.assert_close(grad, grads[0][name], **CLOSE)
        else:
            assert grad is None or not grad.any(), name
    assert any("vlm" in name and grad is not None and grad.any() for name, grad in grads[0].items())


def test_unwanted_outputs_change_nothing(gemma, prefix):
    spans = {"vlm": prefix, "action": suffix()}
    every, only = gemma(spans), gemma(spans, outputs=("action",))
    assert only.keys() == {"action"}
    assert torch.equal(only["action"], every["action"])


def test_rotary_logits_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def logit(q_position, k_position):
        at = lambda x, position: rotate(x, rope(torch.tensor([[position]]), 16))  # noqa: E731
        return (at(q, q_position) * at(k, k_position)).sum()

    torch.testing.assert_close(logit(3, 1), logit(503, 501), atol=1e-4, rtol=1e-4)
    assert not torch.isclose(logit(3, 1), logit(3, 2), atol=1e-3)


def test_rotation_matches_complex_multiplication():
    torch.manual_seed(0)
    x, position = torch.randn(1, 4, 2, 8), torch.tensor([[0, 1, 7, 300]])
    angle = position.double()[0, :, None, None] * 10_000.0 ** (-torch.arange(4).double() / 4)
    turned = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(
        rotate(x, rope(position, 8)).double(), torch.cat([turned.real, turned.imag], -1), **CLOSE
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("last", [1, 3, P])
def test_last_tokens_equal_those_of_all(gemma, prefix, last, causal):
    span = replaced(prefix, starts_block_BT=torch.full_like(prefix.valid_BT, causal))
    every, cache = gemma({"vlm": span})["vlm"], KVCache()
    some = gemma({"vlm": span}, cache, commit=True, last=last)["vlm"]
    torch.testing.assert_close(some, every[:, -last:], **CLOSE)
    assert all(keys.shape[2] == P for keys, _ in cache.layers.values())
