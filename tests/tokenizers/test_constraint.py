import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from manipi.errors import TokenizerError
from manipi.tokenizers import ByteTokenizer, CodeConstraint, FastTokenizer, SentencePieceTokenizer
from manipi.tokenizers.fast import extract_codes
from manipi.tokenizers.text import tokens_from_codes

HORIZON, DIM = 16, 7


@pytest.fixture(params=["fitted", "universal", "calvin"])
def pair(request) -> tuple[FastTokenizer, ByteTokenizer]:
    fast = request.getfixturevalue(request.param)
    return fast, ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + fast.vocab_size)


def greedy(constraint, logits_of_step, vocab_size, max_steps=300):
    ids: list[int] = []
    for step in range(max_steps):
        mask = constraint.mask(ids)
        assert mask.shape == (vocab_size,)
        assert mask.any()
        ids.append(int(np.argmax(np.where(mask, logits_of_step(step), -np.inf))))
        if ids[-1] == 1:
            break
    return ids


@pytest.mark.parametrize("seed", range(5))
def test_random_logits_always_give_a_chunk(pair, seed):
    fast, tokenizer = pair
    rng = np.random.default_rng(seed)
    constraint = CodeConstraint(fast, tokenizer, HORIZON, DIM)
    ids = greedy(constraint, lambda _: rng.normal(size=tokenizer.vocab_size), tokenizer.vocab_size)
    assert tokenizer.decode(ids).startswith("Action: <code")
    assert ids[-2:] == [*tokenizer.encode("|"), tokenizer.eos_id]
    assert fast.decode(extract_codes(tokenizer, ids), HORIZON, DIM).shape == (HORIZON, DIM)


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
    ids = greedy(CodeConstraint(fast, tokenizer, HORIZON, DIM), lambda _: logits, tokenizer.vocab_size)
    assert fast.decode(extract_codes(tokenizer, ids), HORIZON, DIM).shape == (HORIZON, DIM)


def test_whatever_the_codec_encodes_is_allowed(pair, chunks):
    fast, tokenizer = pair
    constraint = CodeConstraint(fast, tokenizer, HORIZON, DIM)
    # The large chunk saturates at both ends, which takes the codec to characters that no merge covers.
    for chunk in (chunks[0], chunks[1] * 1e3):
        codes = tokens_from_codes(tokenizer, np.array(fast.encode(chunk))).tolist()
        ids = [*tokenizer.encode("Action: "), *codes, *tokenizer.encode("|"), tokenizer.eos_id, 0, 0]
        for step, id in enumerate(ids):
            assert constraint.mask(ids[:step])[id]


def test_the_forced_ends(pair):
    fast, tokenizer = pair
    constraint = CodeConstraint(fast, tokenizer, 1, 1)
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
    constraint = CodeConstraint(fitted, tokenizer, 9, 1)
    single = fitted.pieces.index(b"\x01")
    ids = tokenizer.encode("Action: ")
    for remaining in range(9, 0, -1):
        fitting = [code for code, piece in enumerate(fitted.pieces) if len(piece.decode()) <= remaining]
        found = tokenizer.vocab_size - 1 - np.flatnonzero(constraint.mask(ids))
        assert sorted(found.tolist()) == fitting
        ids.append(tokenizer.vocab_size - 1 - single)


def test_a_broken_sequence_is_an_error(fitted):
    tokenizer = ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + fitted.vocab_size)
    constraint = CodeConstraint(fitted, tokenizer, 1, 2)
    marker = tokenizer.encode("Action: ")
    long = max(range(fitted.vocab_size), key=lambda code: len(fitted.pieces[code]))
    for bad in ([7], [*marker[:-1], 7]):
        with pytest.raises(TokenizerError, match=rf"(?s)the forced token.*token 7.*position {len(bad) - 1}"):
            constraint.mask(bad)
    for bad in (7, tokenizer.vocab_size - 1 - long):
        with pytest.raises(TokenizerError, match=rf"(?s)fits 2 more characters.*token {bad}.*position {len(marker)}"):
            constraint.mask([*marker, bad, bad])
    last = tokenizer.vocab_size - 1 - fitted.pieces.index(b"\x01")
    with pytest.raises(TokenizerError, match=rf"(?s)forced token.*position {len(marker) + 2} "):
        constraint.mask([*marker, last, last, last])


def test_vocabularies_that_cannot_work(fitted, small_sp_path):
    with pytest.raises(TokenizerError, match="room in the vocabulary"):
        CodeConstraint(fitted, ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + 85), HORIZON, DIM)
    # Among 1000 ids, 512 codes reach down to the one of "|".
    with pytest.raises(TokenizerError, match=r"'\|' and EOS are not also action codes"):
        CodeConstraint(fitted, SentencePieceTokenizer(small_sp_path), HORIZON, DIM)


def test_paligemma_vocabulary(universal, paligemma):
    rng = np.random.default_rng(0)
    constraint = CodeConstraint(universal, paligemma, HORIZON, DIM)
    ids = greedy(constraint, lambda _: rng.normal(size=257152), 257152)
    assert ids[:3] == [4022, 235292, 235248]
    assert universal.decode(extract_codes(paligemma, ids), HORIZON, DIM).shape == (HORIZON, DIM)


@pytest.mark.parametrize("symbols", ["aÃ", "¢"], ids=["nothing closes Ã", "nothing begins"])
def test_codes_that_cannot_complete_every_chunk(symbols):
    bpe = Tokenizer(models.BPE({symbol: code for code, symbol in enumerate(symbols)}, []))
    bpe.decoder = decoders.ByteLevel()
    fast = FastTokenizer(bpe_json=bpe.to_str(), scale=1, min_token=0)
    with pytest.raises(TokenizerError, match="codes for single characters, and for the end of a character"):
        CodeConstraint(fast, ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + 85), HORIZON, DIM)
