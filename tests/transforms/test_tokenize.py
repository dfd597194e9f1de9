"""What each switch changes in the encoded sample, and that it changes nothing else."""

import dataclasses

import numpy as np
import pytest

from manipi.errors import ConfigError, TokenizerError
from manipi.model.config import Compat, ModelConfig, Pi0Config, Pi0FastConfig, Pi05Config
from manipi.tokenizers import BinningTokenizer, ByteTokenizer, Tokenizers
from manipi.transforms.model_input import tokenize_step

TOKENIZERS = Tokenizers(ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + 256), BinningTokenizer())
MODELS = {
    "pi0": Pi0Config(action_horizon=2, max_token_len=40),
    "pi05": Pi05Config(action_horizon=2, max_token_len=40),
    "pi0_fast": Pi0FastConfig(action_horizon=2, max_token_len=40),
}
# Every quirk has its occasion here: capitals, and a state below -1.
SAMPLE = {
    "prompt": "Push THE cube",
    "state": np.array([-1.5, 0.0, 1.0], np.float32),
    "actions": np.array([[-1.0, 0.0], [0.5, 1.0]], np.float32),
    "image/base": np.zeros((4, 4, 3), np.uint8),
}
PROMPT_SWITCHES = ("fast_lower_case", "minus_one_state_bins", "truncated_prompts")
SWITCHES = [field.name for field in dataclasses.fields(Compat) if field.name != "fast_text_round_trip"]
every_model = pytest.mark.parametrize("kind", MODELS)


def step(model: ModelConfig, **switches: bool):
    return tokenize_step(dataclasses.replace(model, compat=Compat(**switches)), TOKENIZERS, action_size=2)


def text(sample) -> str:
    return TOKENIZERS.text.decode(sample["tokens"].tolist())


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_by_default_no_quirk():
    assert text(step(MODELS["pi0"]).encode(SAMPLE)) == "Push THE cube\n"
    assert text(step(MODELS["pi05"]).encode(SAMPLE)) == "Task: Push THE cube, State: 0 128 255;\nAction: "
    actions = "<code0><code128><code192><code255>|"
    assert text(step(MODELS["pi0_fast"]).encode(SAMPLE)) == f"Task: Push THE cube, State: 0 128 255;\nAction: {actions}"


@every_model
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_its_words_and_nothing_else(kind, switch):
    plain, quirky = (step(MODELS[kind], **on).encode(SAMPLE) for on in ({}, {switch: True}))
    replaced = {
        ("pi0_fast", "fast_lower_case"): ("Push THE cube", "push the cube"),
        ("pi0_fast", "minus_one_state_bins"): ("State: 0 ", "State: -1 "),
        ("pi05", "minus_one_state_bins"): ("State: 0 ", "State: -1 "),
    }
    if (kind, switch) not in replaced:
        assert same(plain, quirky)
        return
    assert text(quirky) == text(plain).replace(*replaced[kind, switch])
    others = [key for key in plain if not key.startswith("token")]
    assert same({key: plain[key] for key in others}, {key: quirky[key] for key in others})
    if kind == "pi0_fast":
        assert plain["token_loss"].sum() == quirky["token_loss"].sum()


@every_model
def test_overlong_prompts_are_cut_where_the_switch_says_so(kind):
    long = SAMPLE | {"prompt": "Push THE cube " * 9}
    with pytest.raises(TokenizerError, match="raise max_token_len"):
        step(MODELS[kind]).encode(long)
    others = [name for name in PROMPT_SWITCHES if name != "truncated_prompts"]
    with pytest.raises(TokenizerError, match="raise max_token_len"):
        step(MODELS[kind], **dict.fromkeys(others, True)).encode(long)
    cut = step(MODELS[kind], truncated_prompts=True).encode(long)
    roomy = step(dataclasses.replace(MODELS[kind], max_token_len=400)).encode(long)
    assert cut["token_valid"].all()
    assert not roomy["token_valid"].all()
    for key in cut:
        uncut = roomy[key][:40] if key.startswith("token") else roomy[key]
        np.testing.assert_array_equal(cut[key], uncut)


def test_extraction_goes_through_text_only_where_codes_can_be_read_from_it():
    plain = step(MODELS["pi0_fast"])
    encoded = plain.encode(SAMPLE)
    emitted = encoded["tokens"][encoded["token_loss"]]
    decoded = np.array([[-1, 0], [0.5, 1 - 1 / 128]], np.float32)
    np.testing.assert_array_equal(plain.decode(emitted, SAMPLE), decoded)
    with_others = step(MODELS["pi0_fast"], **dict.fromkeys(PROMPT_SWITCHES, True))
    np.testing.assert_array_equal(with_others.decode(emitted, SAMPLE), decoded)
    with pytest.raises(ConfigError, match=r"(?s)a SentencePiece tokenizer.*<code7>.*fast_text_round_trip"):
        step(MODELS["pi0_fast"], fast_text_round_trip=True)
    assert step(MODELS["pi05"], fast_text_round_trip=True)  # which has no codes


def test_what_cannot_be_decoded_is_refused_before_training():
    with pytest.raises(TokenizerError, match=r"within 6 tokens .*\n.*\n.*\n.*7 tokens hold any chunk"):
        step(dataclasses.replace(MODELS["pi0_fast"], max_token_len=6))
    step(dataclasses.replace(MODELS["pi0_fast"], max_token_len=7))
    with pytest.raises(ConfigError, match="an action tokenizer"):
        tokenize_step(MODELS["pi0_fast"], Tokenizers(TOKENIZERS.text), action_size=2)
