"""Token ids, masks and action codes of the reference implementation, exactly: every case in every file."""

import hashlib
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from golden import ABSENT, SHARED, find, name_of, read_arrays, read_json

from manipi.errors import TokenizerError
from manipi.tokenizers import FastTokenizer, SentencePieceTokenizer
from manipi.tokenizers.actions import bin_indices
from manipi.tokenizers.prompts import extract_codes, fast_postfix, fast_prefix, padded, pi05_tokens
from manipi.tokenizers.text import codes_from_tokens, tokens_from_codes

FILES = find("tokenizer/*.json")
SECTIONS = {"tokenizer", "provenance", "cases", "tokenize", "code_to_token", "extract"}

pytestmark = pytest.mark.skipif(not FILES, reason=ABSENT)
every_prompts = pytest.mark.parametrize("file", find("tokenizer/prompts_*.json"), ids=name_of)
every_sequences = pytest.mark.parametrize("file", find("tokenizer/fast_sequences_*.json"), ids=name_of)
every_universal = pytest.mark.parametrize("file", find("tokenizer/fast_universal*.json"), ids=name_of)
every_bins = pytest.mark.parametrize("file", find("tokenizer/state_bins*.npz"), ids=name_of)


@cache
def tokenizer_of(file: Path) -> SentencePieceTokenizer:
    """The model beside the file, or the shared one that has the vocabulary which the file states."""
    stated = read_json(file)["tokenizer"]
    paths = [file.parent / stated["file"]] if stated["file"] else sorted(SHARED.glob("tokenizers/**/*.model"))
    fitting = [t for t in map(SentencePieceTokenizer, paths) if t.vocab_size == stated["vocab_size"]]
    if not fitting and not stated["file"]:
        pytest.skip(f"no tokenizer of {stated['vocab_size']} pieces under {SHARED}/tokenizers; set MANIPI_SHARED")
    tokenizer = fitting[0]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (stated["bos"], stated["eos"], stated["pad"])
    return tokenizer


def differences(found, expected) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    return float("inf") if found.shape != expected.shape else float((found != expected).sum())


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_the_file_is_read(file):
    assert re.match("prompts_|fast_sequences_|fast_universal", file.name), f"unread golden file {file.name}"
    unread = read_json(file).keys() - SECTIONS
    assert not unread, f"unread golden keys: {sorted(unread)}"


@every_prompts
def test_prompts(file, measure):
    tokenizer = tokenizer_of(file)
    for case in read_json(file)["cases"]:
        state = None if case["state"] is None else np.array(case["state"], case["state_dtype"])
        tokens = pi05_tokens(tokenizer, case["prompt"], state, minus_one_below=True)
        found = padded(tokenizer, tokens, case["max_len"], truncate=True)
        measure("prompt tokens", differences(found.tokens, case["tokens"]), 0)
        measure("prompt masks", differences(found.valid, np.arange(case["max_len"]) < case["num_valid"]), 0)


@every_sequences
def test_fast_sequences(file, measure):
    tokenizer = tokenizer_of(file)
    for case in read_json(file)["tokenize"]:
        state = np.array(case["state"], case["state_dtype"])
        prefix = fast_prefix(tokenizer, case["prompt"], state, lower_case=True, minus_one_below=True)
        postfix = [] if case["action_codes"] is None else fast_postfix(tokenizer, case["action_codes"])
        found = padded(tokenizer, prefix, case["max_len"], postfix=postfix, truncate=True)
        measure("FAST prompt tokens", differences(found.tokens, case["tokens"]), 0)
        for ours, theirs in (("valid", "token_mask"), ("causal", "ar_mask"), ("loss", "loss_mask")):
            measure("FAST prompt masks", differences(getattr(found, ours), case[theirs]), 0)


@every_sequences
def test_code_to_token(file, measure):
    tokenizer, cases = tokenizer_of(file), read_json(file)["code_to_token"]
    codes, ids = (np.array([case[name] for case in cases]) for name in ("code", "token_id"))
    measure("action codes to tokens", differences(tokens_from_codes(tokenizer, codes), ids), 0)
    measure("tokens to action codes", differences(codes_from_tokens(tokenizer, ids), codes), 0)


@every_sequences
def test_extraction(file, measure):
    tokenizer = tokenizer_of(file)
    for case in read_json(file)["extract"]:
        ids, expected = case["model_output_tokens"], case["codes_passed_to_codec"]
        if expected is None:
            for reference_text in (False, True):
                with pytest.raises(TokenizerError, match="Action: "):
                    extract_codes(tokenizer, ids, reference_text=reference_text)
            continue
        measure("extracted codes", differences(extract_codes(tokenizer, ids, reference_text=True), expected), 0)
        found = extract_codes(tokenizer, ids)
        if max(found, default=0) < 1024:  # the reference's way through text loses none of these
            measure("extracted codes, without text", differences(found, expected), 0)


@every_bins
def test_state_bins(file, measure):
    cases = read_arrays(file)
    assert cases.keys() == {"state", "bin"}
    measure("state bins", differences(bin_indices(cases["state"], minus_one_below=True), cases["bin"]), 0)
    measure("state bins without -1", differences(bin_indices(cases["state"]), np.maximum(cases["bin"], 0)), 0)


@every_universal
def test_universal_fast_tokenizer(file, measure):
    recorded, arrays = read_json(file), read_arrays(file.with_suffix(".npz"))
    stated = set(re.findall("[0-9a-f]{64}", recorded["provenance"]))
    paths = sorted(SHARED.glob("tokenizers/*/tokenizer.json"))
    folders = [path.parent for path in paths if hashlib.sha256(path.read_bytes()).hexdigest() in stated]
    if not folders:
        pytest.skip(f"no tokenizer.json of the stated hash under {SHARED / 'tokenizers'}; set MANIPI_SHARED")
    fast = FastTokenizer.load(folders[0])
    for case in recorded["cases"]:
        shape = case["time_horizon"], case["action_dim"]
        if "decodes_to" in case:
            assert case["decodes_to"] == "all zeros"  # where ours refuses
            with pytest.raises(TokenizerError, match=f"{shape[0]} x {shape[1]}"):
                fast.decode(case["codes"], *shape)
            continue
        actions, decoded = arrays.pop(f"{case['case']}/actions"), arrays.pop(f"{case['case']}/decoded")
        measure("FAST codes", differences(fast.encode(actions), case["codes"]), 0)
        measure("FAST actions", float(np.abs(fast.decode(case["codes"], *shape) - decoded).max()), 1e-6)
    assert not arrays, f"unread golden keys: {sorted(arrays)}"
