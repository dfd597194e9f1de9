"""Flow, action codes and text in one forward pass: what sees what, and which gradient goes where."""

from dataclasses import replace

import pytest
import torch

from manipi.errors import ConfigError
from manipi.model import VLA
from manipi.model.config import FixedCodes, JointConfig
from manipi.model.joint import TERMS
from manipi.train.step.state import trainable_parameters

B, K, H, A, CODES = 3, 2, 5, 6, 6
CLOSE = {"atol": 2e-6, "rtol": 1e-5}
FLOW, CODE, TEXT = range(3)


@pytest.fixture(params=["pi0", "pi05"])
def kind(request):
    return request.param


@pytest.fixture
def model(configs, build, kind):
    """Builds the same weights with any joint settings."""
    return lambda **settings: build(replace(configs[kind], joint=JointConfig(**settings)))


@pytest.fixture
def draws():
    torch.manual_seed(3)
    return torch.randn(B, K, H, A), torch.rand(B, K)


@pytest.fixture
def inputs(batch):
    """Row 0 has codes and text, row 1 codes alone, row 2 text alone and no actions, as questions have."""
    torch.manual_seed(5)
    length = torch.tensor([6, 4, 0])[:, None]
    text = torch.tensor([True, False, True])[:, None]
    return replace(
        batch,
        codes=torch.randint(2, 61, (B, CODES)),
        code_valid=torch.arange(CODES) < length,
        token_causal=batch.token_causal & text,
        token_loss=batch.token_loss & text,
        action_valid=torch.tensor([True, True, False])[:, None].expand(B, H).clone(),
    )


def gradients(model: VLA, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def acts(name: str) -> bool:
    return name.startswith("head.") or ".action" in name


@pytest.mark.parametrize("insulate", [False, True])
def test_with_everything_off_the_flow_loss_is_todays_bit_for_bit(model, configs, build, kind, inputs, draws, insulate):
    off = model(codes_weight=0, text_weight=0, insulate=insulate)
    plain = build(configs[kind])
    found, expected = off(inputs, *draws), plain(inputs, *draws)
    assert torch.equal(found.loss[FLOW], expected.loss)
    assert torch.equal(found.weight[FLOW], expected.weight)
    assert torch.equal(off.loss_weight(inputs, K)[FLOW], plain.loss_weight(inputs, K))
    if not insulate:
        mine, theirs = gradients(off, found.loss[FLOW]), gradients(plain, expected.loss)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_codes_and_flow_do_not_see_each_other(model, configs, build, kind, inputs, draws):
    joint = model()
    both = joint(inputs, *draws)
    torch.testing.assert_close(both.loss[FLOW], build(configs[kind])(inputs, *draws).loss, **CLOSE)
    other_codes = replace(inputs, codes=inputs.codes.flip(1))
    assert torch.equal(joint(other_codes, *draws).loss[FLOW], both.loss[FLOW])
    other_actions = replace(inputs, actions=inputs.actions + 1)
    assert torch.equal(joint(other_actions, draws[0] * 2, draws[1]).loss[CODE:], both.loss[CODE:])


def test_codes_are_causal_and_see_the_whole_prompt(model, inputs, draws):
    joint = model()

    before = per_code(joint, inputs, draws)
    for place in range(CODES - 1):
        codes = inputs.codes.clone()
        codes[0, place] = (codes[0, place] + 7) % 59 + 2
        moved = (per_code(joint, replace(inputs, codes=codes), draws)[0] - before[0]).abs() > 1e-6
        assert not moved[:place].any()  # what comes before does not see it
        assert moved[place + 1 :].all()  # what follows does; its own place has another target
    tokens = inputs.tokens.clone()
    tokens[0, 0] = (tokens[0, 0] + 7) % 59 + 2
    assert ((per_code(joint, replace(inputs, tokens=tokens), draws)[0] - before[0]).abs() > 1e-6).all()


def per_code(model: VLA, inputs, draws) -> torch.Tensor:
    """Cross-entropy of each code [B, N], from the difference that one more target makes to the sample's mean."""
    from manipi.model import joint

    seen = []

    def spy(gemma, out, targets, counts, codes=None):
        logits = gemma.logits(out)
        seen.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").detach())
        return per_sample(gemma, out, targets, counts, codes)

    per_sample, joint.per_sample = joint.per_sample, spy
    try:
        model(inputs, *draws)
    finally:
        joint.per_sample = per_sample
    return seen[0]


def test_each_term_is_a_mean_of_its_own(model, inputs, draws):
    joint = model()
    together = joint(inputs, *draws)
    assert together.weight.tolist() == [K * 2 * H * A, 2, 2]
    assert torch.equal(together.weight, joint.loss_weight(inputs, K))
    rows = [joint(inputs_of(inputs, row), draws[0][[row]], draws[1][[row]]) for row in range(B)]
    for term in range(3):
        counted = [row for row in rows if row.weight[term] > 0]
        mean = sum(row.loss[term] * row.weight[term] for row in counted) / sum(row.weight[term] for row in counted)
        torch.testing.assert_close(together.loss[term], mean, atol=1e-5, rtol=1e-4)
    # Row 2 has neither actions nor codes.
    assert rows[2].loss[FLOW] == 0
    assert rows[2].loss[CODE] == 0
    assert rows[2].loss[TEXT] > 0


def inputs_of(inputs, row: int):
    return replace(
        inputs, **{name: value[[row]] for name, value in inputs.tensors.items() if name != "action_dim_valid"}
    )


def test_a_sample_without_actions_gives_the_flow_no_gradient(model, inputs, draws):
    web = inputs_of(inputs, 2)
    joint = model()
    found = gradients(joint, joint(web, draws[0][[2]], draws[1][[2]]).loss.sum())
    assert not any(value.any() for name, value in found.items() if acts(name))
    assert found["gemma.token_embedding"].any()


def test_insulation_stops_the_flow_at_the_language_model_and_nothing_else(model, inputs, draws):
    insulated, open_ = model(), model(insulate=False)
    stopped = gradients(insulated, insulated(inputs, *draws).loss[FLOW])
    passed = gradients(open_, open_(inputs, *draws).loss[FLOW])
    assert not any(value.any() for name, value in stopped.items() if not acts(name))
    assert passed["vision.patch_embedding.weight"].any()
    assert all(torch.equal(stopped[name], passed[name]) for name in passed if acts(name))
    # The loss itself is the same, and codes teach the language model alone.
    assert torch.equal(insulated(inputs, *draws).loss, open_(inputs, *draws).loss)
    taught = gradients(insulated, insulated(inputs, *draws).loss[CODE])
    assert not any(value.any() for name, value in taught.items() if acts(name))


def test_codes_and_text_are_what_a_pi0_fast_of_the_same_weights_says(model, configs, build, inputs, draws):
    """π0-FAST has the prompt and the codes in one sequence; here they are trunk and branch."""
    joint, fast = model(), build(configs["pi0_fast"])
    fast.load_state_dict({name: value for name, value in joint.state_dict().items() if not acts(name)})
    rows = replace(inputs, token_valid=torch.ones_like(inputs.token_valid))
    length = rows.tokens.shape[1]
    apart = replace(
        rows,
        tokens=torch.cat([rows.tokens, rows.codes], dim=1),
        token_valid=torch.cat([rows.token_valid, rows.code_valid], dim=1),
        token_causal=torch.cat([rows.token_causal, torch.ones_like(rows.code_valid)], dim=1),
        token_loss=torch.cat([torch.zeros_like(rows.token_valid), rows.code_valid], dim=1),
        codes=None,
        code_valid=None,
    )
    object.__setattr__(fast.config, "max_token_len", length + CODES)
    expected = fast(apart).per_sample
    weights = JointConfig(flow_weight=0, text_weight=0)
    found = build(replace(joint.config, joint=weights))(rows, *draws).per_sample
    torch.testing.assert_close(found[:2], expected[:2], **CLOSE)


def test_hidden_codes_are_predicted_from_the_prompt_alone(model, inputs, draws):
    joint = model(codes=FixedCodes(first_id=4, places=CODES, per_place=6))
    codes = 4 + 6 * torch.arange(CODES) + torch.randint(1, 6, (B, CODES))
    other = codes.clone()
    other[:, 0] = 4 + (codes[:, 0] - 4) % 5 + 1  # another one at the first place

    def behind_the_first(codes, hidden):
        rows = replace(inputs, codes=codes, hidden=None if hidden is None else torch.full((B,), hidden))
        return per_code(joint, rows, draws)[0, 1:]

    assert torch.equal(behind_the_first(codes, False), behind_the_first(codes, None))
    assert not torch.allclose(behind_the_first(codes, False), behind_the_first(other, False))
    assert torch.equal(behind_the_first(codes, True), behind_the_first(other, True))


def test_what_is_trained_follows_from_what_is_written(model, configs, build, kind):
    last = "gemma.blocks.2.experts.vlm.q_proj.weight"
    assert last in trainable_parameters(model(), "full")
    assert last in trainable_parameters(model(codes_weight=0), "full")
    assert last not in trainable_parameters(model(codes_weight=0, text_weight=0), "full")
    assert last not in trainable_parameters(build(configs[kind]), "full")


@pytest.mark.parametrize("weights", [(0, 0, 0), (-1, 1, 1), (float("nan"), 1, 1)])
def test_weights_that_say_nothing_are_refused(weights):
    with pytest.raises(ConfigError):
        JointConfig(**{f"{name}_weight": value for name, value in zip(TERMS, weights, strict=True)})
