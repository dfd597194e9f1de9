"""FlexAttention and the bias are two forms of one rule. Queries that see nothing are left out: nobody reads them."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from manipi.model import attention, gemma
from manipi.model.attention import Layout, attend, attention_mask, flex_mask, joined, lay_out, mask_for

B, N, G, HEAD_DIM = 3, 4, 2, 16
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
ONE_THAT_RUNS_WITHOUT_A_COMPILER = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def prefix_and_suffix(name: str, num_prefix: int = 20) -> tuple[Layout, Layout]:
    """Ragged, with a hole; the suffix has two draws of five actions, or is causal (π0-FAST)."""
    torch.manual_seed(0)
    valid = torch.rand(B, num_prefix) < 0.8
    prefix = lay_out((), valid, torch.zeros_like(valid))
    if name == "pi0_fast":
        valid = torch.arange(10).expand(B, 10) < torch.tensor([10, 7, 3])[:, None]
        return prefix, lay_out((prefix,), valid, torch.ones_like(valid))
    starts = [1, *[0] * 4] * 2
    branch = [1] * 5 + [2] * 5
    if name == "pi0":
        starts, branch = [1, *starts], [0, *branch]
    starts_T, branch_T = torch.tensor(starts).bool(), torch.tensor(branch)
    t = len(starts)
    return prefix, lay_out((prefix,), torch.ones(B, t).bool(), starts_T.expand(B, t), branch_T.expand(B, t))


@pytest.mark.slow
@ONE_THAT_RUNS_WITHOUT_A_COMPILER
@torch.no_grad()
@pytest.mark.parametrize("name", ["pi0", "pi05", "pi0_fast"])
def test_flex_attention_equals_the_bias(name):
    prefix, suffix = prefix_and_suffix(name)
    for query, key in ((prefix, prefix), (suffix, joined((prefix, suffix)))):
        t, s = query.valid.shape[1], key.valid.shape[1]
        q, k, v = torch.randn(B, t, N, HEAD_DIM), torch.randn(B, G, s, HEAD_DIM), torch.randn(B, G, s, HEAD_DIM)
        seen = attention_mask(query, key).any(-1)
        bias = mask_for(query, key, torch.float32)
        assert isinstance(bias, torch.Tensor)
        by_flex, by_bias = (attend(q, k, v, mask) for mask in (flex_mask(query, key), bias))
        torch.testing.assert_close(by_flex[seen], by_bias[seen], **CLOSE)


@pytest.mark.slow
@ONE_THAT_RUNS_WITHOUT_A_COMPILER
@torch.no_grad()
def test_whole_models_agree_cache_and_branches_included(configs, build, batch, monkeypatch):
    model, made = build(configs["pi05"]), []

    def by_flex(query: Layout, key: Layout, _: torch.dtype) -> BlockMask:
        made.append(flex_mask(query, key))
        return made[-1]

    def answers() -> list[torch.Tensor]:
        torch.manual_seed(0)
        noise = torch.randn(B, 2, 5, 6)
        return [model(batch, noise, torch.rand(B, 2)).per_step, model.sample(batch, noise, num_steps=2)]

    by_bias = answers()
    monkeypatch.setattr(gemma, "mask_for", by_flex)
    for found, wanted in zip(answers(), by_bias, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
    assert made


def test_a_processor_never_uses_flex_attention(monkeypatch):
    monkeypatch.setattr(attention, "FLEX_QUERIES", 1)
    assert isinstance(mask_for(*prefix_and_suffix("pi05"), torch.float32), torch.Tensor)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_outputs_and_gradients_agree(dtype):
    first, second = prefix_and_suffix("pi05", num_prefix=300)
    layout = joined((first, second)).map(torch.Tensor.cuda)
    t = layout.valid.shape[1]
    shapes = ((B, t, 8, 256), (B, 1, t, 256), (B, 1, t, 256))
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes)
    seen, mask = attention_mask(layout, layout).any(-1), mask_for(layout, layout, dtype)
    if not isinstance(mask, BlockMask):
        pytest.skip("this GPU has too little shared memory for FlexAttention")
    zero = torch.zeros((), dtype=dtype, device="cuda")
    bias = torch.where(attention_mask(layout, layout), zero, attention.MASKED)[:, None]
    results = []
    for form in (mask, bias):
        out = attend(q, k, v, form)[seen]
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    for by_flex, by_bias in zip(*results, strict=True):
        torch.testing.assert_close(by_flex, by_bias, atol=0.05, rtol=0.05)
