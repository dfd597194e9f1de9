"""Token ids, masks and action codes of the reference implementation, exactly."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from manipi.errors import TokenizerError
from manipi.tokenizers import FastTokenizer, SentencePieceTokenizer, extract_codes, fast_prompt, pi05_prompt
from manipi.tokenizers.binning import bin_indices
from manipi.tokenizers.text import codes_from_tokens, tokens_from_codes

SHARED = Path(os.environ.get("MANIPI_SHARED", Path(__file__).parents[3] / "shared"))
MODELS = {
    "small_sp": "golden/tokenizer/small_sp.model",
    "paligemma": "tokenizers/paligemma_tokenizer.rebuilt.model",
}


def shared(relative: str) -> Path:
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{path} is absent; set MANIPI_SHARED to the shared data")
    return path


def golden(name: str) -> dict:
    return json.loads(shared(f"golden/tokenizer/{name}.json").read_text())


@pytest.fixture(scope="module", params=list(MODELS))
def model(request) -> tuple[str, SentencePieceTokenizer]:
    return request.param, SentencePieceTokenizer(shared(MODELS[request.param]))


@dataclass(frozen=True)
class RecordedCodes:
    """The reference's cases give action codes rather than actions."""

    codes: list[int]
    vocab_size: int = 2048

    def encode(self, actions_HA):
        return self.codes

    def decode(self, codes, horizon, action_dim):
        raise NotImplementedError


def test_prompts(model):
    name, tokenizer = model
    cases = golden(f"prompts_{name}")["cases"]
    assert len(cases) == 43
    for case in cases:
        state = None if case["state"] is None else np.array(case["state"], case["state_dtype"])
        limits = {"max_len": case["max_len"], "truncate": True}
        found = pi05_prompt(tokenizer, case["prompt"], state, minus_one_below=True, **limits)
        assert found.tokens.tolist() == case["tokens"], case["prompt"]
        assert found.valid.tolist() == [i < case["num_valid"] for i in range(case["max_len"])]


def test_fast_sequences(model):
    name, tokenizer = model
    cases = golden(f"fast_sequences_{name}")["tokenize"]
    assert len(cases) == 19
    for case in cases:
        state = np.array(case["state"], case["state_dtype"])
        actions = None if case["action_codes"] is None else np.zeros((1, 1))
        codec = RecordedCodes(case["action_codes"])
        switches = {"lower_case": True, "minus_one_below": True, "truncate": True}
        found = fast_prompt(tokenizer, codec, case["prompt"], state, actions, case["max_len"], **switches)
        assert found.tokens.tolist() == case["tokens"], case["prompt"]
        assert found.valid.astype(int).tolist() == case["token_mask"]
        assert found.causal.astype(int).tolist() == case["ar_mask"]
        assert found.loss.astype(int).tolist() == case["loss_mask"]


def test_code_to_token(model):
    name, tokenizer = model
    for case in golden(f"fast_sequences_{name}")["code_to_token"]:
        assert tokens_from_codes(tokenizer, np.array([case["code"]])).tolist() == [case["token_id"]]
        assert codes_from_tokens(tokenizer, np.array([case["token_id"]])).tolist() == [case["code"]]


def test_extraction(model):
    name, tokenizer = model
    for case in golden(f"fast_sequences_{name}")["extract"]:
        ids, expected = case["model_output_tokens"], case["codes_passed_to_codec"]
        if expected is None:
            for reference_text in (False, True):
                with pytest.raises(TokenizerError, match="Action: "):
                    extract_codes(tokenizer, ids, reference_text=reference_text)
            continue
        assert extract_codes(tokenizer, ids, reference_text=True) == expected, case["case"]
        # Working on ids differs exactly where the reference's way through text loses what the model emitted.
        assert (extract_codes(tokenizer, ids) == expected) is ("QUIRK" not in case["case"]), case["case"]


def test_state_bins():
    cases = np.load(shared("golden/tokenizer/state_bins.npz"))
    np.testing.assert_array_equal(bin_indices(cases["state"], minus_one_below=True), cases["bin"])
    np.testing.assert_array_equal(bin_indices(cases["state"]), np.maximum(cases["bin"], 0))


def test_universal_fast_tokenizer():
    fast = FastTokenizer.load(shared("tokenizers/fast"))
    arrays = np.load(shared("golden/tokenizer/fast_universal.npz"))
    for case in golden("fast_universal")["cases"]:
        name, shape = case["case"], (case["time_horizon"], case["action_dim"])
        if name.startswith("bad"):
            assert not fast.decode(case["codes"], *shape, reference_zeros=True).any()
            with pytest.raises(TokenizerError, match=f"{shape[0]} x {shape[1]}"):
                fast.decode(case["codes"], *shape)
            continue
        assert fast.encode(arrays[f"{name}/actions"]) == case["codes"], name
        np.testing.assert_allclose(fast.decode(case["codes"], *shape), arrays[f"{name}/decoded"], atol=1e-6)
