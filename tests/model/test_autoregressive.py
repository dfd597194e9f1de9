from dataclasses import replace

import numpy as np
import pytest
import torch

from manipi.errors import ConfigError
from manipi.model.autoregressive import last_valid, prompt_output
from manipi.model.config import Compat, FixedCodes

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


CODES = FixedCodes(first_id=13, places=12, per_place=4)
"""Ids 13 to 60, of which 13, 17, … are neutral."""


@pytest.fixture
def coded(batch):
    """Behind a prompt of three a word that is forced, then three codes; the last row has one code less."""
    tokens = batch.tokens.clone()
    tokens[:, :4] = tokens[:, :4] % 13
    tokens[:, 4:] = torch.tensor([[14, 18, 24], [16, 20, 23], [15, 19, 22]])
    valid = torch.arange(L) < torch.tensor([7, 7, 6])[:, None]
    return replace(batch, tokens=tokens, token_valid=valid, token_loss=batch.token_causal & valid)


@pytest.mark.parametrize("softness", [0.0, 0.7])
def test_a_code_is_compared_with_those_of_its_place(model, coded, softness):
    model.config = replace(model.config, codes=replace(CODES, softness=softness))
    loss = model(coded)
    out = prompt_output(model.gemma, model.embed_prefix(coded), L)
    for row, codes in enumerate([[14, 18, 24], [16, 20, 23], [15, 19]]):
        expected, hits = [], []
        for place, code in enumerate(codes):
            legal = torch.arange(14 + 4 * place, 17 + 4 * place)
            logits = model.gemma.logits(out[row, 3 + place])[legal]
            target = torch.exp(-0.5 * ((legal - code) / softness) ** 2) if softness else (legal == code).float()
            target /= target.sum()
            expected.append((torch.xlogy(target, target) - target * logits.log_softmax(0)).sum())
            hits.append(float(legal[logits.argmax()] == code))
        torch.testing.assert_close(loss.per_sample[row], torch.stack(expected).mean())
        assert float(loss.accuracy) >= np.mean(hits) / B - 1e-6
    torch.testing.assert_close(loss.loss, loss.per_sample.mean())


def test_other_ids_are_not_moved_by_codes(model, coded):
    """The forced word is not learned, and of the table only the places' rows and those that were read get gradients."""
    model.config = replace(model.config, codes=CODES)
    model(coded).loss.backward()
    moved = model.gemma.token_embedding.grad.abs().sum(1) > 0
    read = set(coded.tokens[coded.token_valid].tolist())
    assert set(moved.nonzero().flatten().tolist()) <= read | {i for i in range(13, 25) if (i - 13) % 4}
    assert not moved[[13, 17, 21]].any()


def test_hidden_codes_are_learned_from_the_prompt_alone(model, coded):
    model.config = replace(model.config, codes=CODES)
    hidden = torch.tensor([True, False, True])
    shown, other = model(coded), coded.tokens.clone()
    before = model(replace(coded, hidden=hidden)).per_sample
    torch.testing.assert_close(before[1], shown.per_sample[1])
    assert not torch.isclose(before, shown.per_sample)[[0, 2]].any()
    assert torch.equal(model(replace(coded, hidden=torch.zeros_like(hidden))).per_sample, shown.per_sample)
    # Where the first code is hidden, the loss of the later ones does not depend on it.
    other[:, 4] = 15 + (other[:, 4] == 15)
    last = replace(coded, token_loss=coded.token_loss & (torch.arange(L) > 4), hidden=hidden)
    one, another = model(last).per_sample, model(replace(last, tokens=other)).per_sample
    torch.testing.assert_close(one[hidden], another[hidden])
    assert not torch.isclose(one, another)[~hidden].any()


@pytest.mark.parametrize("wrong", [{"per_place": 1}, {"softness": -1.0}, {"hidden": 1.5}, {"places": 0}])
def test_codes_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match="FixedCodes"):
        replace(CODES, **wrong)


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
