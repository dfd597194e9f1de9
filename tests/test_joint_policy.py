"""Policies whose language model writes: trained, saved, loaded and asked, in each way."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.test_policy import observation

from manipi.candidates import Choice, candidate_noises
from manipi.errors import ConfigError, ObservationError, TokenizerError
from manipi.model.config import JointConfig
from manipi.policy import MAX_TEXT, Policy
from manipi.train.config import ValidationConfig
from manipi.train.loop import train
from manipi.train.run.folder import Run, read_log

KINDS = ("pi05", "pi0")


def with_joint(config, **settings):
    joint = JointConfig(**{"max_code_len": 48, **settings})
    return replace(config, model=replace(config.model, joint=joint, max_token_len=64))


@pytest.fixture(scope="module", params=KINDS)
def run(request, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint") / request.param
    train(with_joint(tiny(request.param, steps=4)), folder, show=False)
    return folder


@pytest.fixture
def policy(run) -> Policy:
    return Policy.load(run / "checkpoints/4", seed=3)


def test_every_term_is_logged_with_its_gradient(run):
    lines = [line for line in read_log(run / "metrics.jsonl") if "loss" in line]
    assert len(lines) == 4
    for line in lines:
        terms = {name: line[f"loss/{name}"] for name in ("flow", "codes", "text")}
        assert line["loss"] == pytest.approx(sum(terms.values()), rel=1e-5)
        assert terms["codes"] > 1  # nats; of text there is none in this dataset
        assert terms["text"] == 0
        # Insulated, the two train disjoint weights.
        assert line["grad_norm"] == pytest.approx(np.hypot(line["grad_norm/flow"], line["grad_norm/codes"]), rel=1e-4)


def test_a_resumed_run_equals_an_undisturbed_one(run, tiny, tmp_path):
    config = with_joint(tiny("pi05" if run.name == "pi05" else "pi0", steps=4))
    train(config, tmp_path / "run", show=False, stop_at=2)
    train(config, tmp_path / "run", show=False)
    one, two = ((folder / "checkpoints/4/model.safetensors").read_bytes() for folder in (run, tmp_path / "run"))
    assert one == two


def test_accumulation_and_recompute_make_the_same_gradients(tiny, tmp_path):
    config = with_joint(tiny("pi05", steps=1))
    logs = []
    for number, changes in enumerate(({}, {"accumulate": 2}, {"compute": replace(config.compute, recompute="full")})):
        train(replace(config, **changes), tmp_path / str(number), show=False)
        logs.append(read_log(tmp_path / str(number) / "metrics.jsonl")[-1])
    for name in ("loss/flow", "loss/codes", "grad_norm", "grad_norm/codes"):
        assert [log[name] for log in logs] == pytest.approx([logs[0][name]] * 3, rel=1e-4)


def test_validation_sums_the_terms_over_all_frames(tiny, tmp_path):
    config = with_joint(
        tiny("pi05", steps=1, validation=ValidationConfig(every=1, samples=8, batch_size=3)), text_weight=0.5
    )
    train(config, tmp_path, show=False)
    (line,) = read_log(tmp_path / "validation.jsonl")
    alone = replace(config, validation=ValidationConfig(every=1, samples=8, batch_size=8))
    train(alone, tmp_path / "whole", show=False)
    (whole,) = read_log(tmp_path / "whole/validation.jsonl")
    assert line["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert line["loss"] > 1  # nats of the codes are part of it


def test_it_acts_by_flow_and_by_tokens(policy):
    flow, tokens = ({**observation(), "manipi/mode": mode} for mode in ("flow", "tokens"))
    noise = policy.draw_noise()
    assert policy.metadata["modes"] == ["flow", "tokens"]
    by_flow, by_tokens = policy.infer(flow, noise)["actions"], policy.infer(tokens)["actions"]
    np.testing.assert_array_equal(by_flow, policy.infer(observation(), noise)["actions"])
    assert by_tokens.shape == by_flow.shape
    assert not np.array_equal(by_flow, by_tokens)
    mixed = policy.infer_batch([flow, tokens, flow], [noise, None, noise])
    for answer, expected in zip(mixed, (by_flow, by_tokens, by_flow), strict=True):
        np.testing.assert_allclose(answer["actions"], expected, atol=1e-5)
    drawn = [policy.infer({**tokens, "manipi/temperature": 5.0, "manipi/seed": s})["actions"] for s in (1, 1, 2)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_what_the_token_head_writes_may_be_a_candidate(policy):
    noise = policy.draw_noise()
    tokens = policy.infer({**observation(), "manipi/mode": "tokens"})["actions"]
    drawn = policy.infer(observation(), candidate_noises(noise, 3))["actions"]
    seen = []

    def mine(candidates):
        seen.append(candidates)
        return np.arange(3) == 2

    policy.set_candidates(Choice(n=3, selector="mine+token"), mine)
    answer = policy.infer(observation(), noise)
    assert (answer["candidates"]["chosen"], answer["candidates"]["selector"]) == (2, "mine+token")
    np.testing.assert_array_equal(answer["actions"], tokens)
    np.testing.assert_allclose(seen[0].actions[:2], drawn[:2], atol=1e-5)
    # Going on from a previous chunk, it begins with what is committed.
    left = {"manipi/prev_actions": drawn[1][1:], "manipi/delay": 2}
    goes_on = policy.infer({**observation(), **left}, noise)["actions"]
    np.testing.assert_allclose(goes_on[:2], seen[1].actions[0, :2], atol=1e-6)
    np.testing.assert_array_equal(goes_on[2:], tokens[2:])
    # The proposal is nearest to itself, and a gate that is shut asks for none.
    policy.choice = Choice()
    nearest = {**observation(), "manipi/candidates": 3, "manipi/selector": "token"}
    assert policy.infer(nearest, noise)["candidates"]["n"] == 3
    with pytest.raises(ObservationError, match="another selector beside the proposal"):
        policy.infer({**nearest, "manipi/selector": "token+token"}, noise)
    shut = policy.infer({**nearest, "manipi/selector": "limits+token", "manipi/gate": 1e9}, noise)
    assert shut["candidates"]["n"] == 1
    np.testing.assert_array_equal(shut["actions"], policy.infer(observation(), noise)["actions"])


def test_the_codes_are_those_that_teacher_forcing_finds_likeliest(policy):
    """Greedy decoding with the cache, against whole forward passes without one."""
    asked = policy.encode({**observation(), "manipi/mode": "tokens"})
    inputs, model = policy.model_input([asked]), policy.model
    ids = policy.run_model(inputs, None)[0]
    eos, allowed = policy.tokenizers.text.eos_id, policy._constraint.allowed
    row = ids[: ids.tolist().index(eos) + 1].tolist()
    prefix = model.embed_prefix(inputs)
    from manipi.model.joint import _with_codes

    codes = torch.tensor([row[:-1]])
    whole = _with_codes(model.gemma, prefix, codes, torch.ones_like(codes, dtype=torch.bool), 1)
    out = model.gemma({"vlm": whole})["vlm"][0]
    last = int(inputs.token_valid.sum()) + prefix.tokens_BTD.shape[1] - inputs.tokens.shape[1] - 1
    logits = model.gemma.logits(torch.cat([out[last : last + 1], out[prefix.tokens_BTD.shape[1] :]]))
    for place, token in enumerate(row):
        choices = allowed(row[:place])
        assert token == choices[int(logits[place][torch.from_numpy(choices)].argmax())]


def test_a_subtask_is_told_and_moves_the_actions(policy):
    noise = policy.draw_noise()
    plain = policy.infer(observation(), noise)
    told = policy.infer({**observation(), "manipi/subtask": "go_up"}, noise)
    assert "subtask" not in plain
    assert told["subtask"] == "go_up"
    assert not np.array_equal(plain["actions"], told["actions"])


def write_as(policy: Policy, monkeypatch, text: str) -> list[int]:
    """The model's next tokens spell `text`, whatever is asked; the rest of decoding is real."""
    ids = policy.tokenizers.text.encode(text)
    real, calls = type(policy.model).decode_tokens, []

    def decode(self, inputs, max_tokens=256, allowed=None, draws=None, eos_token=None):
        calls.append(max_tokens)
        forced = lambda row: np.array([ids[len(row)] if len(row) < len(ids) else 7])  # noqa: E731
        return real(self, inputs, max_tokens, forced, draws, eos_token)

    monkeypatch.setattr(type(policy.model), "decode_tokens", decode)
    return calls


def test_a_subtask_is_written_and_followed(policy, monkeypatch):
    noise = policy.draw_noise()
    told = policy.infer({**observation(), "manipi/subtask": "go up"}, noise)
    calls = write_as(policy, monkeypatch, "go up\nand more")
    written = policy.infer({**observation(), "manipi/write_subtask": True}, noise)
    assert written["subtask"] == "go up"
    assert calls[0] <= MAX_TEXT
    np.testing.assert_array_equal(written["actions"], told["actions"])


def test_a_text_that_never_ends_leaves_the_last_subtask(policy, monkeypatch):
    noise = policy.draw_noise()
    told = policy.infer({**observation(), "manipi/subtask": "go up"}, noise)
    calls = write_as(policy, monkeypatch, "on and on " * 40)
    asked = {**observation(), "manipi/write_subtask": True}
    with pytest.raises(TokenizerError, match="a text that ends within"):
        policy.infer(asked, noise)
    stays = policy.infer({**asked, "manipi/subtask": "go up"}, noise)
    assert stays["subtask"] == "go up"
    assert "a text that ends within" in stays["subtask_error"]
    assert max(calls) <= MAX_TEXT
    np.testing.assert_array_equal(stays["actions"], told["actions"])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("manipi/mode", "words", "flow or tokens"),
        ("manipi/mode", 3, "a text of at most 16"),
        ("manipi/subtask", np.zeros(3), "a text of at most"),
        ("manipi/write_subtask", "yes", "true or false"),
        ("manipi/temperature", 1.0, "token policies"),
    ],
)
def test_what_it_cannot_do_is_refused(policy, key, value, expected):
    with pytest.raises(ObservationError, match=expected):
        policy.infer({**observation(), key: value})


@pytest.mark.parametrize(
    ("settings", "key", "value", "expected"),
    [
        ({"codes_weight": 0.0}, "manipi/mode", "tokens", "trained with action codes"),
        ({"text_weight": 0.0}, "manipi/write_subtask", True, "trained on text"),
    ],
)
def test_a_checkpoint_without_that_head_says_so(tiny, tmp_path, settings, key, value, expected):
    train(with_joint(tiny("pi05", steps=1), **settings), tmp_path, show=False)
    with pytest.raises(ObservationError, match=expected):
        Policy.load(tmp_path / "checkpoints/1").infer({**observation(), key: value})


def test_codes_that_do_not_fit_are_found_before_step_0(tiny, tmp_path):
    config = with_joint(tiny("pi05", steps=1), max_code_len=6)
    with pytest.raises(
        ConfigError, match=r"(?s)at most 6 tokens.*--model.joint.max-code-len|raise max_token_len"
    ) as told:
        train(config, tmp_path, show=False)
    assert Run(tmp_path, config).steps() == []
    assert "toy" in str(told.value) or "dataset" in str(told.value)


def test_the_engine_answers_as_the_model_does(policy):
    noise, asked = policy.draw_noise(), {**observation(), "manipi/mode": "tokens"}
    flow, tokens = policy.infer(observation(), noise)["actions"], policy.infer(asked)["actions"]
    policy.fuse()
    np.testing.assert_allclose(policy.infer(observation(), noise)["actions"], flow, atol=1e-4)
    np.testing.assert_allclose(policy.infer(asked)["actions"], tokens, atol=1e-4)
