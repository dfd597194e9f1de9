from dataclasses import replace

import numpy as np
import pytest
import torch

from manipi.errors import ConfigError
from manipi.model.autoregressive import last_valid, prompt_output
from manipi.model.config import Compat

B, L, STEPS = 3, 7, 6


@pytest.fixture
def model(configs, build):
    # An id outside of the vocabulary: these tests decode to the end unless they set another one.
    return build(replace(configs["pi0_fast"], eos_token=999))


@pytest.fixture
def prompt(batch):
    """What decoding reads: the bidirectional part of the prompt, ragged."""
    valid = torch.arange(L) < torch.tensor([4, 3, 2])[:, None]
    return replace(batch, token_valid=valid, token_causal=None, token_loss=None)


def teacher_forced(model, prompt, ids):
    """The next-token choices when `ids` follow each prompt without a gap, one row at a time and without padding."""
    choices = []
    for row in range(B):
        n = int(prompt.token_valid[row].sum())
        tokens = torch.cat([prompt.tokens[row, :n], ids[row]])[None]
        inputs = replace(
            prompt,
            images=prompt.images[row : row + 1],
            image_valid=prompt.image_valid[row : row + 1],
            state=prompt.state[row : row + 1],
            actions=None,
            tokens=tokens,
            token_valid=torch.ones_like(tokens, dtype=torch.bool),
            token_causal=torch.arange(tokens.shape[1])[None] >= n,
        )
        out = model.gemma({"vlm": model.embed_prefix(inputs)})["vlm"][0, -tokens.shape[1] :]
        choices.append(model.gemma.logits(out[n - 1 : -1]).argmax(-1))
    return torch.stack(choices)


def test_decoding_equals_teacher_forcing(model, prompt):
    ids = model.decode_tokens(prompt, STEPS)
    assert len(ids.unique()) > 3
    assert torch.equal(ids, teacher_forced(model, prompt, ids))


def test_the_position_quirk_is_a_switch_and_changes_the_tokens(model, prompt):
    plain = model.decode_tokens(prompt, STEPS)
    model.config = replace(model.config, compat=Compat(fast_position_offset=True))
    shifted = model.decode_tokens(prompt, STEPS)
    assert torch.equal(plain[:, 0], shifted[:, 0])
    assert not torch.equal(plain, shifted)


def test_each_row_ends_at_its_own_eos(model, prompt):
    free = model.decode_tokens(prompt, STEPS)
    eos = int(free[0, 2])
    model.config = replace(model.config, eos_token=eos)
    ended = model.decode_tokens(prompt, STEPS)
    for row in range(B):
        hits = (free[row] == eos).nonzero()
        end = int(hits[0]) + 1 if len(hits) else STEPS
        assert torch.equal(ended[row, :end], free[row, :end])
        assert not ended[row, end:].any()
    model.config = replace(model.config, compat=Compat(fast_writes_past_eos=True))
    assert torch.equal(model.decode_tokens(prompt, STEPS), free)


def test_allowed_next_restricts_every_token(model, prompt):
    seen = []

    def only_even_then_odd(ids):
        seen.append(list(ids))
        return np.arange(len(ids) % 2, 61, 2)

    ids = model.decode_tokens(prompt, STEPS, only_even_then_odd)
    assert torch.equal(ids % 2, (torch.arange(STEPS) % 2).expand(B, STEPS))
    assert [len(one) for one in seen] == [step for step in range(STEPS) for _ in range(B)]
    assert seen[-B:] == ids[:, :-1].tolist()


def test_of_many_allowed_tokens_the_likeliest_is_chosen(model, prompt):
    free = model.decode_tokens(prompt, STEPS)
    assert torch.equal(model.decode_tokens(prompt, STEPS, lambda _: np.arange(61)), free)


def test_forced_tokens_go_together(model, prompt):
    """After three of them, which no token was to be chosen between, what is chosen is what it is one by one."""
    one_by_one = model.decode_tokens(
        prompt, STEPS, lambda ids: np.array([7, 8 + len(ids)]) if len(ids) < 3 else np.arange(61)
    )
    forced = one_by_one[0, :3].tolist()
    spans = []
    model.gemma.blocks[0].register_forward_hook(lambda _, inputs, __: spans.append(inputs[0]["vlm"].shape[1]))
    rows = prompt.split(B)[0]
    ids = model.decode_tokens(rows, STEPS, lambda ids: np.array([forced[len(ids)]]) if len(ids) < 3 else np.arange(61))
    assert spans[1:] == [3, 1, 1]
    assert torch.equal(ids[0], one_by_one[0])


def test_only_loss_tokens_count(model, batch):
    loss, right = model(batch), []
    for row in range(B):
        out = model.gemma({"vlm": model.embed_prefix(batch)})["vlm"][row, -L:-1]
        logits, targets, counts = model.gemma.logits(out), batch.tokens[row, 1:], batch.token_loss[row, 1:]
        nll = -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(loss.per_sample[row], nll[counts].mean())
        right.append((logits.argmax(-1) == targets)[counts].float().mean())
    torch.testing.assert_close(loss.loss, loss.per_sample.mean())
    torch.testing.assert_close(loss.accuracy, torch.stack(right).mean())


def test_accuracy_counts_the_likeliest_tokens(model, batch):
    last = torch.zeros_like(batch.token_loss)
    last[:, -1] = True
    # A causal token at the end is seen by none, so that another one there changes no prediction.
    batch = replace(
        batch, token_loss=last, token_valid=batch.token_valid | last, token_causal=batch.token_causal | last
    )
    likeliest_B = model.gemma.logits(prompt_output(model.gemma, model.embed_prefix(batch), L)[:, -1]).argmax(-1)
    for wrong in ([], [1], [0, 2]):
        tokens = batch.tokens.clone()
        tokens[:, -1] = likeliest_B
        tokens[wrong, -1] = (likeliest_B[wrong] + 1) % 61
        torch.testing.assert_close(model(replace(batch, tokens=tokens)).accuracy, torch.tensor(1 - len(wrong) / B))


def test_a_sample_without_loss_tokens_costs_nothing_and_breaks_nothing(model, batch):
    nothing = replace(batch, token_loss=torch.zeros_like(batch.token_loss))
    loss = model(nothing)
    assert not loss.per_sample.any()
    loss.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_causal_tokens_do_not_see_what_follows(model, batch):
    changed = batch.tokens.clone()
    changed[:, -1] = 2
    a, b = (model.embed_prefix(i) for i in (batch, replace(batch, tokens=changed)))
    a, b = (model.gemma({"vlm": span})["vlm"][0, :-1] for span in (a, b))
    assert torch.equal(a, b)


def test_padded_positions_differ_only_behind_a_missing_camera(model, batch):
    # A gap at the very start would move all positions alike, which rotary attention does not notice.
    batch = replace(batch, image_valid=torch.tensor([[True, True], [True, False], [True, True]]))
    plain = model(batch).per_sample
    model.config = replace(model.config, compat=Compat(fast_padded_positions=True))
    padded = model(batch).per_sample
    torch.testing.assert_close(padded[[0, 2]], plain[[0, 2]])
    assert not torch.isclose(padded[1], plain[1])


def test_last_valid_finds_the_last_token():
    valid = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]]).bool()
    assert last_valid(valid).tolist() == [1, 3, 0]


def test_actions_are_not_sampled_from_a_token_policy(model, batch):
    with pytest.raises(ConfigError, match="call decode_tokens instead"):
        model.sample(batch, torch.zeros(B, 5, 6))
