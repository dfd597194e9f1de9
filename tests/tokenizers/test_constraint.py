import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from manipi.errors import TokenizerError
from manipi.tokenizers import BinningTokenizer, ByteTokenizer, FastTokenizer, SentencePieceTokenizer
from manipi.tokenizers.prompts import CodeConstraint, extract_codes
from manipi.tokenizers.text import TextTokenizer, tokens_from_codes

HORIZON, DIM = 16, 7
ENOUGH = 300
FAST, ALL = ["fitted", "universal", "calvin"], ["fitted", "universal", "calvin", "binning", "fsq", "dct"]
every_action_tokenizer = pytest.mark.parametrize("pair", ALL, indirect=True)


@pytest.fixture(scope="module")
def binning() -> BinningTokenizer:
    return BinningTokenizer()


@pytest.fixture(scope="module", params=FAST)
def pair(request):
    action = request.getfixturevalue(request.param)
    return action, ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + action.vocab_size)


def greedy(constraint: CodeConstraint, logits_of_step, tokenizer: TextTokenizer, max_tokens=ENOUGH) -> list[int]:
    """As the model decodes: the most likely of the allowed tokens, until EOS or the last token."""
    ids: list[int] = []
    for step in range(max_tokens):
        mask = constraint.mask(ids)
        assert mask.shape == (tokenizer.vocab_size,)
        assert mask.any()
        ids.append(int(np.argmax(np.where(mask, logits_of_step(step), -np.inf))))
        if ids[-1] == tokenizer.eos_id:
            break
    return ids


def decoded(action, tokenizer, ids, shape=(HORIZON, DIM)) -> np.ndarray:
    return action.decode(extract_codes(tokenizer, ids), *shape)


@every_action_tokenizer
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.0, 1.0, 1e30]),
    special=st.sampled_from([np.nan, np.inf, -np.inf]),
    share=st.sampled_from([0.0, 0.01, 0.9]),
    pull=st.sampled_from([-1.0, 0.0, 1.0]),
)
def test_whatever_the_logits_a_chunk_comes_out_or_an_error(pair, seed, spread, special, share, pull):
    """Logits of any size, with NaN and infinities among them, that pull towards long codes or away from them."""
    action, tokenizer = pair
    rng = np.random.default_rng(seed)
    lengths = np.array([spelling.begins for spelling in action.spellings])
    codes = tokens_from_codes(tokenizer, np.arange(action.vocab_size))

    def logits(_) -> np.ndarray:
        values = rng.normal(size=tokenizer.vocab_size) * spread
        values[codes] += pull * lengths * spread * rng.integers(0, 9)
        return np.where(rng.random(values.shape) < share, special, values)

    constraint = CodeConstraint(action, tokenizer, HORIZON, DIM, ENOUGH)
    try:
        ids = greedy(constraint, logits, tokenizer)
        chunk = decoded(action, tokenizer, ids)
    except TokenizerError:
        # All allowed tokens were impossible, so that one was taken which is not allowed.
        assert special == -np.inf
        return
    assert (chunk.shape, chunk.dtype) == ((HORIZON, DIM), np.float32)
    assert np.isfinite(chunk).all()
    assert ids[-2:] == [*tokenizer.encode("|"), tokenizer.eos_id]


@pytest.mark.parametrize("favourite", ["longest", "shortest", "open", "end", "text"])
def test_stubborn_logits_always_give_a_chunk(pair, favourite):
    """A model that wants the same thing at every step gets it only where it fits."""
    fast, tokenizer = pair
    lengths = np.array([len(piece) for piece in fast.pieces])
    opens = np.array([piece[-1] >= 0xC0 for piece in fast.pieces])
    wish = {"longest": lengths, "shortest": -lengths, "open": opens * 1e3 - lengths}.get(favourite, 0 * lengths)
    logits = np.zeros(tokenizer.vocab_size)
    logits[tokens_from_codes(tokenizer, np.arange(fast.vocab_size))] = wish
    logits[[1, *tokenizer.encode("|")]] += 1e4 * (favourite == "end")
    logits[3 : ByteTokenizer.NUM_TEXT_IDS] += 1e4 * (favourite == "text")
    ids = greedy(CodeConstraint(fast, tokenizer, HORIZON, DIM, ENOUGH), lambda _: logits, tokenizer)
    assert decoded(fast, tokenizer, ids).shape == (HORIZON, DIM)


@pytest.mark.parametrize(("name", "num_codes"), [("binning", HORIZON * DIM), ("fsq", 5)])
def test_a_fixed_number_of_codes(name, num_codes, request):
    action = request.getfixturevalue(name)
    tokenizer = ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + action.vocab_size)
    end = np.zeros(tokenizer.vocab_size)
    end[[tokenizer.eos_id, *tokenizer.encode("|")]] = 1
    ids = greedy(CodeConstraint(action, tokenizer, HORIZON, DIM, ENOUGH), lambda _: end, tokenizer)
    assert len(extract_codes(tokenizer, ids)) == num_codes
    budget = len(ids)
    assert greedy(CodeConstraint(action, tokenizer, HORIZON, DIM, budget), lambda _: end, tokenizer, budget) == ids
    # Such codes never compress: what is too little is known before anything is decoded.
    with pytest.raises(TokenizerError, match=rf"within {budget - 1} tokens.*\n.*\n.*\n.*; {budget} tokens hold any"):
        CodeConstraint(action, tokenizer, HORIZON, DIM, budget - 1)


def test_each_place_has_codes_of_its_own(dct):
    """In their order, the neutral one never; and a code at another place is refused."""
    tokenizer = ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + dct.vocab_size)
    constraint, ids = CodeConstraint(dct, tokenizer, HORIZON, DIM, ENOUGH), tokenizer.encode("Action: ")
    for place in dct.places(HORIZON, DIM):
        allowed = constraint.allowed(ids)
        assert allowed.tolist() == tokens_from_codes(tokenizer, np.array(place)).tolist()
        assert len(place) == 63
        ids.append(int(allowed[7]))
    assert constraint.allowed(ids).tolist() == tokenizer.encode("|")
    marker, first, second = len(tokenizer.encode("Action: ")), *ids[-2:]
    for wrong in ([*ids[:marker], second], [*ids[:marker], ids[marker] - 56], [*ids[:-2], second, first]):
        with pytest.raises(TokenizerError, match="a code that fits"):
            constraint.allowed(wrong)


@every_action_tokenizer
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), max_tokens=st.integers(1, 140))
@example(seed=811, max_tokens=63)  # the last unit is open, and only its end is missing
def test_too_few_tokens_are_an_error_and_never_a_part_of_a_chunk(pair, seed, max_tokens):
    action, tokenizer = pair
    rng = np.random.default_rng(seed)
    codes_per_unit = 2 if any(spelling.opens for spelling in action.spellings) else 1
    always_enough = 3 + codes_per_unit * action.num_units(HORIZON, DIM)
    try:
        constraint = CodeConstraint(action, tokenizer, HORIZON, DIM, max_tokens)
        ids = greedy(constraint, lambda _: rng.random(tokenizer.vocab_size, dtype=np.float32), tokenizer, max_tokens)
    except TokenizerError as error:
        expected = f"within {max_tokens} tokens (max_token_len)", f"raise max_token_len; {always_enough} tokens"
        if max_tokens >= always_enough or any(words not in str(error) for words in expected):
            raise
        return
    assert ids[-1] == tokenizer.eos_id
    assert decoded(action, tokenizer, ids).shape == (HORIZON, DIM)


def test_whatever_the_codec_encodes_is_allowed(pair, chunks):
    fast, tokenizer = pair
    constraint = CodeConstraint(fast, tokenizer, HORIZON, DIM, ENOUGH)
    # The large chunk saturates at both ends, which takes the codec to characters that no merge covers.
    for chunk in (chunks[0], chunks[1] * 1e3):
        codes = tokens_from_codes(tokenizer, np.array(fast.encode(chunk))).tolist()
        ids = [*tokenizer.encode("Action: "), *codes, *tokenizer.encode("|"), tokenizer.eos_id, 0, 0]
        for step, id in enumerate(ids):
            assert constraint.mask(ids[:step])[id]


def test_the_forced_ends(pair):
    fast, tokenizer = pair
    constraint = CodeConstraint(fast, tokenizer, 1, 1, ENOUGH)
    marker = tokenizer.encode("Action: ")
    for step, id in enumerate(marker):
        assert constraint.allowed(marker[:step]).tolist() == [id]
    whole = next(code for code, piece in enumerate(fast.pieces) if len(piece) == 1 and piece[0] < 0x80)
    ids = [*marker, *tokens_from_codes(tokenizer, np.array([whole]))]
    for id in [*tokenizer.encode("|"), tokenizer.eos_id, tokenizer.pad_id, tokenizer.pad_id]:
        assert constraint.allowed(ids).tolist() == [id]
        ids.append(id)


def test_the_codes_that_fit_are_those_a_search_finds(fitted):
    """Against the definition: with n characters left, exactly the codes of at most n characters."""
    tokenizer = ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + fitted.vocab_size)
    constraint = CodeConstraint(fitted, tokenizer, 9, 1, ENOUGH)
    single = fitted.pieces.index(b"\x01")
    ids = tokenizer.encode("Action: ")
    for remaining in range(9, 0, -1):
        fitting = [code for code, piece in enumerate(fitted.pieces) if len(piece.decode()) <= remaining]
        found = tokenizer.vocab_size - 1 - np.flatnonzero(constraint.mask(ids))
        assert sorted(found.tolist()) == fitting
        ids.append(tokenizer.vocab_size - 1 - single)


def test_a_broken_sequence_is_an_error(fitted):
    tokenizer = ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + fitted.vocab_size)
    constraint = CodeConstraint(fitted, tokenizer, 1, 2, ENOUGH)
    marker = tokenizer.encode("Action: ")
    long = max(range(fitted.vocab_size), key=lambda code: len(fitted.pieces[code]))
    for bad in ([7], [*marker[:-1], 7]):
        with pytest.raises(TokenizerError, match=rf"(?s)the forced token.*token 7.*position {len(bad) - 1}"):
            constraint.mask(bad)
    for bad in (7, tokenizer.vocab_size - 1 - long):
        with pytest.raises(TokenizerError, match=rf"(?s)fits 2 more units.*token {bad}.*position {len(marker)}"):
            constraint.mask([*marker, bad, bad])
    last = tokenizer.vocab_size - 1 - fitted.pieces.index(b"\x01")
    with pytest.raises(TokenizerError, match=rf"(?s)forced token.*position {len(marker) + 2} "):
        constraint.mask([*marker, last, last, last])


def test_vocabularies_that_cannot_work(fitted, small_sp_path):
    with pytest.raises(TokenizerError, match="room in the vocabulary"):
        CodeConstraint(fitted, ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + 85), HORIZON, DIM, ENOUGH)
    # Among 1000 ids, 512 codes reach down to the one of "|".
    with pytest.raises(TokenizerError, match=r"'\|' and EOS are not also action codes"):
        CodeConstraint(fitted, SentencePieceTokenizer(small_sp_path), HORIZON, DIM, ENOUGH)


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), pull=st.sampled_from([-1, 0, 1]), max_tokens=st.integers(6, 90))
def test_paligemma_vocabulary(universal, paligemma, seed, pull, max_tokens):
    """The released π0-FAST's two tokenizers, with DROID's chunk, and with less room than it may need.

    In the worst case each of the 120 characters takes two codes, one for each byte.
    """
    shape, rng = (15, 8), np.random.default_rng(seed)
    lengths = pull * np.array([spelling.begins for spelling in universal.spellings])
    codes = tokens_from_codes(paligemma, np.arange(universal.vocab_size))

    def logits(step) -> np.ndarray:
        return np.roll(values, 1000 * step) + wish

    values, wish = rng.normal(size=paligemma.vocab_size), np.zeros(paligemma.vocab_size)
    wish[codes] = lengths
    ids = greedy(CodeConstraint(universal, paligemma, *shape, 245), logits, paligemma, 245)
    assert ids[:3] == [4022, 235292, 235248]
    assert ids[-2:] == [235371, 1]
    assert decoded(universal, paligemma, ids, shape).shape == shape
    try:
        constraint = CodeConstraint(universal, paligemma, *shape, max_tokens)
        ids = greedy(constraint, logits, paligemma, max_tokens)
    except TokenizerError as error:
        if "raise max_token_len; 245 tokens hold any chunk" not in error.next:
            raise
        return
    assert decoded(universal, paligemma, ids, shape).shape == shape


@pytest.mark.parametrize("symbols", ["aÃ", "¢"], ids=["nothing closes Ã", "nothing begins"])
def test_codes_that_cannot_complete_every_chunk(symbols):
    bpe = Tokenizer(models.BPE({symbol: code for code, symbol in enumerate(symbols)}, []))
    bpe.decoder = decoders.ByteLevel()
    fast = FastTokenizer(bpe_json=bpe.to_str(), scale=1, min_token=0)
    with pytest.raises(TokenizerError, match="codes for single characters, and for the end of a character"):
        CodeConstraint(fast, ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + 85), HORIZON, DIM, ENOUGH)
