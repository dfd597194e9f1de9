import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manipi.errors import ConfigError, IntegrityError, TokenizerError, UnknownNameError
from manipi.tokenizers import ByteTokenizer, SentencePieceTokenizer
from manipi.tokenizers.text import codes_from_tokens, load_tokenizer, require_paligemma, tokens_from_codes


@given(st.text())
def test_byte_tokenizer_loses_no_text(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(3 <= id < tokenizer.NUM_TEXT_IDS for id in ids)


@given(st.lists(st.integers(-1, 300), min_size=1))
def test_byte_tokenizer_spends_one_token_per_bin(numbers):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(" ".join(map(str, numbers)))
    assert tokenizer.decode(ids) == " ".join(map(str, numbers))
    assert sum(id >= 259 for id in ids) == sum(abs(n) <= 255 for n in numbers)
    if all(0 <= n <= 255 for n in numbers):
        assert len(ids) == len(numbers)


def test_byte_tokenizer_spends_one_token_per_word_of_a_prompt():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("Task: push zebras onto, State: 0 128;\nAction: ")
    pieces = [tokenizer.decode([id]) for id in ids]
    assert pieces == ["Task: ", "push", *" zebras", " onto", ", State: ", "0", " 128", ";\nAction: "]


@pytest.mark.parametrize("text", ["007", "256", "a1", "1b", "_1", "12_", "٣", "1٣", "99999"])
def test_numbers_inside_words_stay_bytes(text):
    assert ByteTokenizer().encode(text) == [3 + byte for byte in text.encode()]


def test_byte_tokenizer_shows_control_and_code_ids():
    tokenizer = ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + 10)
    assert tokenizer.decode([2, *tokenizer.encode("go"), 1020, 1011, 1, 0]) == "go<code0><code9>"
    with pytest.raises(TokenizerError, match=r"(?s)ids from 0 to 1020.*found 1021"):
        tokenizer.decode([1021])
    with pytest.raises(ConfigError, match="at least 1011 ids"):
        ByteTokenizer(1010)


def test_codes_fill_the_vocabulary_from_its_end(small_sp_path):
    byte, pieces = ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + 10), SentencePieceTokenizer(small_sp_path)
    assert tokens_from_codes(byte, np.arange(10)).tolist() == list(range(1020, 1010, -1))
    assert tokens_from_codes(pieces, np.array([0, 867])).tolist() == [871, 4]
    for tokenizer in (byte, pieces):
        codes = np.arange(tokenizer.code_capacity)
        np.testing.assert_array_equal(codes_from_tokens(tokenizer, tokens_from_codes(tokenizer, codes)), codes)
        for bad in (-1, tokenizer.code_capacity):
            with pytest.raises(TokenizerError, match="room in the vocabulary"):
                tokens_from_codes(tokenizer, np.array([0, bad]))


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_save_and_load(kind, tmp_path, small_sp_path):
    tokenizer = ByteTokenizer(1100) if kind == "byte" else SentencePieceTokenizer(small_sp_path, reserved_ids=100)
    reference = tokenizer.save(tmp_path)
    for again in (load_tokenizer(reference, tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert again.reference == reference
        assert again.reserved_ids == tokenizer.reserved_ids
        assert again.encode("pick up 12 cups") == tokenizer.encode("pick up 12 cups")


def test_load_refuses_another_tokenizer(tmp_path, small_sp_path):
    reference = SentencePieceTokenizer(small_sp_path).save(tmp_path)
    with pytest.raises(IntegrityError):
        load_tokenizer(dataclasses.replace(reference, vocab_size=1001), tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(small_sp_path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=reference.sha256):
        load_tokenizer(reference, tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(IntegrityError, match="no such file"):
        load_tokenizer(reference, tmp_path)
    byte = ByteTokenizer(1100).reference
    with pytest.raises(IntegrityError):
        load_tokenizer(dataclasses.replace(byte, vocab_size=1101), tmp_path)
    with pytest.raises(UnknownNameError, match="did you mean byte"):
        load_tokenizer(dataclasses.replace(byte, kind="bytes"), tmp_path)


@pytest.mark.parametrize("content", [None, b"no model"])
def test_sentencepiece_names_what_is_missing(content, tmp_path):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"(?s)a SentencePiece model file.*tokenizer.model.*paligemma_tokenizer"):
        SentencePieceTokenizer(path)


def test_the_digest_of_the_pieces_is_that_of_the_vocabulary(small_sp_path, tmp_path):
    original, model = SentencePieceTokenizer(small_sp_path), small_sp_path.read_bytes()

    def altered(data: bytes) -> SentencePieceTokenizer:
        (tmp_path / "altered.model").write_bytes(data)
        return SentencePieceTokenizer(tmp_path / "altered.model")

    # An extension field, which says nothing about the pieces.
    noted = altered(model + b"\xc0\x0c\x01")
    assert noted.reference.sha256 != original.reference.sha256
    assert noted.pieces_sha256 == original.pieces_sha256
    swapped = model.replace(b"<loc0001>", b"<loc....>").replace(b"<loc0002>", b"<loc0001>")
    assert altered(swapped.replace(b"<loc....>", b"<loc0002>")).pieces_sha256 != original.pieces_sha256


def test_only_paligemmas_vocabulary_is_paligemmas(paligemma, small_sp_path):
    require_paligemma(paligemma)
    others = {
        "sentencepiece tokenizer of 1,000 ids": SentencePieceTokenizer(small_sp_path),
        "byte tokenizer of 257,152 ids": ByteTokenizer(257_152),
    }
    for found, other in others.items():
        message = (
            rf"(?s)PaliGemma's tokenizer, 257,152 pieces.*found a {found}.*gs://big_vision/paligemma_tokenizer.model"
        )
        with pytest.raises(TokenizerError, match=message):
            require_paligemma(other)


def test_importing_the_tokenizers_imports_no_torch():
    code = "import sys, manipi.tokenizers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
