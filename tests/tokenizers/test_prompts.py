import numpy as np
import pytest

from manipi.errors import TokenizerError
from manipi.tokenizers import BinningTokenizer, ByteTokenizer
from manipi.tokenizers.prompts import extract_codes, fast_postfix, fast_prefix, padded, pi05_tokens
from manipi.tokenizers.text import tokens_from_codes

BYTE = ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + 256)
STATE = np.array([-2.0, -1.0, 0.0, 1.0])


def text_of(prompt, where=None):
    return BYTE.decode(prompt.tokens[prompt.valid if where is None else where].tolist())


def pi0(text, max_len, **settings):
    return padded(BYTE, pi05_tokens(BYTE, text, None), max_len, **settings)


def pi05(text, max_len, minus_one_below=False, **settings):
    return padded(BYTE, pi05_tokens(BYTE, text, STATE, minus_one_below=minus_one_below), max_len, **settings)


def test_pi0_reads_the_cleaned_instruction_and_a_newline():
    prompt = pi0(" Pick_up\nthe  Cup ", 32)
    assert text_of(prompt) == "Pick up the  Cup\n"
    assert prompt.tokens[0] == BYTE.bos_id
    assert prompt.valid.tolist() == [True] * 13 + [False] * 19
    assert not prompt.tokens[13:].any()
    assert not prompt.causal.any()
    assert not prompt.loss.any()
    assert (prompt.tokens.dtype, prompt.valid.dtype) == (np.int64, np.bool_)


def test_pi05_reads_the_state_as_bins():
    assert text_of(pi05("Go_left", 64)) == "Task: Go left, State: 0 0 128 255;\nAction: "
    openpi = pi05("Go_left", 64, minus_one_below=True)
    assert text_of(openpi) == "Task: Go left, State: -1 0 128 255;\nAction: "


def test_fast_learns_the_postfix_and_only_it():
    actions = np.array([[-1.0, 0.0], [0.5, 1.0]])
    postfix = fast_postfix(BYTE, BinningTokenizer().encode(actions))
    prompt = padded(BYTE, fast_prefix(BYTE, " Go_left\nNOW", STATE), 64, postfix=postfix)
    assert text_of(prompt, prompt.valid & ~prompt.causal) == "Task: Go left\nNOW, State: 0 0 128 255;\n"
    assert text_of(prompt, prompt.causal) == "Action: <code0><code128><code192><code255>|"
    assert prompt.tokens[prompt.causal][-1] == BYTE.eos_id
    np.testing.assert_array_equal(prompt.loss, prompt.causal)
    inference = padded(BYTE, fast_prefix(BYTE, " Go_left\nNOW", STATE, lower_case=True), 64)
    assert text_of(inference) == "Task: go left\nnow, State: 0 0 128 255;\n"
    assert not inference.loss.any()


@pytest.mark.parametrize("make", [pi0, pi05])
def test_an_overlong_prompt_is_an_error_unless_truncated(make):
    needed = int(make("push", 99).valid.sum())
    assert make("push", needed).valid.all()
    with pytest.raises(TokenizerError) as error:
        make("push", needed - 1)
    assert f"at most {needed - 1} tokens" in str(error.value)
    assert f"found {needed} tokens" in str(error.value)
    assert f"raise max_token_len to at least {needed}" in str(error.value)
    cut = make("push", needed - 1, truncate=True)
    np.testing.assert_array_equal(cut.tokens, make("push", needed).tokens[:-1])


def test_what_a_prompt_cannot_hold_is_an_error():
    with pytest.raises(TokenizerError, match=r"(?s)nan at index \(1,\) \(1 of 2"):
        pi05_tokens(BYTE, "push", np.array([0.0, np.nan]))
    with pytest.raises(TokenizerError, match=r"(?s)room in the vocabulary.*found codes from 0 to 255"):
        fast_postfix(ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + 255), BinningTokenizer().encode([[-1.0, 1.0]]))


def test_extracting_codes():
    tokenizer = ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + 100)
    marker, end = tokenizer.encode("Action: "), tokenizer.encode("|")
    codes = [3, 99, 0, 3]
    ids = tokens_from_codes(tokenizer, np.array(codes)).tolist()
    assert extract_codes(tokenizer, [*marker, *ids, *end, tokenizer.eos_id, 0, 0]) == codes
    assert extract_codes(tokenizer, [*tokenizer.encode("so: "), *marker, *ids]) == codes
    assert extract_codes(tokenizer, [*marker, *ids, tokenizer.eos_id, 0]) == codes
    assert extract_codes(tokenizer, [*marker, *end]) == []
    with pytest.raises(TokenizerError, match=r"(?s)tokens of 'Action: '.*<code3>.*4 tokens that the model emitted"):
        extract_codes(tokenizer, ids)
