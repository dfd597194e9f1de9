import json
import pickle

import numpy as np
import pytest
from scipy.fft import dct
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from manipi.errors import TokenizerError
from manipi.tokenizers import FastTokenizer
from manipi.tokenizers.fast import dct_matrix


@pytest.mark.parametrize("horizon", [1, 2, 7, 50])
def test_the_dct_is_scipys_and_orthonormal(horizon):
    matrix = dct_matrix(horizon)
    np.testing.assert_allclose(matrix, dct(np.eye(horizon), axis=0, norm="ortho"), atol=1e-14)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(horizon), atol=1e-13)


@pytest.mark.parametrize("name", ["fitted", "universal", "calvin"])
def test_the_round_trip_error_is_that_of_rounding(name, request, chunks):
    fast = request.getfixturevalue(name)
    for chunk in chunks[:50]:
        codes = fast.encode(chunk)
        assert fast.bpe.decode(codes).encode() == b"".join(fast.pieces[code] for code in codes)
        decoded = fast.decode(codes, *chunk.shape)
        assert (decoded.dtype, decoded.shape) == (np.float32, chunk.shape)
        # Each of the 16 coefficients of a dimension is off by at most 0.5 / scale, and the DCT keeps the norm.
        error = np.linalg.norm(decoded - chunk, axis=0)
        assert error.max() <= 0.5 / fast.scale * np.sqrt(len(chunk)) + 1e-6


@pytest.mark.parametrize("name", ["fitted", "universal", "calvin"])
def test_pieces_are_what_the_library_decodes(name, request):
    fast = request.getfixturevalue(name)
    for code, piece in enumerate(fast.pieces):
        assert piece.decode(errors="replace") == fast.bpe.decode([code], skip_special_tokens=False)


def test_published_settings(universal, calvin):
    assert (universal.vocab_size, universal.scale, universal.min_token) == (2048, 10, -354)
    assert (calvin.vocab_size, calvin.scale, calvin.min_token) == (1024, 50, -158)


def test_fitting_learns_to_compress_and_repeats_itself(fitted, chunks):
    assert fitted.vocab_size == 512
    assert FastTokenizer.fit(chunks, scale=10, vocab_size=512) == fitted
    assert FastTokenizer.fit(chunks[:100], scale=10, vocab_size=512).sha256 != fitted.sha256
    report = fitted.reconstruction_report(chunks)
    assert report.max_codes < 16 * 7
    assert report.mean_codes < 0.6 * 16 * 7
    errors = np.abs(chunks - np.stack([fitted.decode(fitted.encode(c), 16, 7) for c in chunks]))
    np.testing.assert_allclose(report.max_error, errors.max(axis=(0, 1)))
    np.testing.assert_allclose(report.mean_error, errors.mean(axis=(0, 1)))


@pytest.mark.parametrize("sign", [-1, 1])
def test_coefficients_beyond_the_alphabet_saturate(sign, fitted, universal):
    outlier = np.full((16, 7), sign * 1e4)
    for fast in (fitted, universal):
        ends = np.array([fast.min_token, fast.min_token + fast.num_characters - 1]) / fast.scale / np.sqrt(16)
        decoded = fast.decode(fast.encode(outlier), 16, 7)
        np.testing.assert_allclose(decoded, ends[(sign + 1) // 2], rtol=1e-5)


def test_fitting_names_what_is_wrong(chunks):
    with pytest.raises(TokenizerError, match=r"(?s)at most 20 distinct.*which are \d+.*scale 10.*raise vocab_size"):
        FastTokenizer.fit(chunks, vocab_size=20)
    with pytest.raises(TokenizerError, match="at most 2048 distinct"):
        FastTokenizer.fit(chunks, scale=1e6, vocab_size=100_000)
    with pytest.raises(TokenizerError, match=r"inf at index \(0, 0, 3\)"):
        FastTokenizer.fit(np.where(np.arange(7) == 3, np.inf, chunks))
    for empty in (np.zeros((0, 16, 7)), np.zeros((16, 7))):
        with pytest.raises(TokenizerError, match=r"\[N, H, A\]"):
            FastTokenizer.fit(empty)


def test_codes_that_are_no_chunk(fitted, universal, chunks):
    codes = fitted.encode(chunks[0])
    half = universal.pieces.index("\u0100".encode()[:1])
    cases = [(fitted, codes[:-1]), (fitted, codes * 2), (fitted, []), (fitted, [512]), (fitted, [-1])]
    for fast, bad in [*cases, (universal, [half])]:
        with pytest.raises(TokenizerError, match="16 x 7 = 112 characters"):
            fast.decode(bad, 16, 7)
    with pytest.raises(TokenizerError, match="half a character at byte 0 of 1"):
        universal.decode([half], 1, 1)
    with pytest.raises(TokenizerError, match="code 512, where the vocabulary has 512"):
        fitted.decode([512], 1, 1)


def test_a_vocabulary_with_a_gap_is_noticed():
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({s: code for code, s in enumerate(symbols) if s != symbols[-1]}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    # The last symbol stands for the byte 0xAD, which is the second one of the character U+00AD.
    fast = FastTokenizer(bpe_json=bpe.to_str(), scale=1, min_token=0)
    assert fast.decode(fast.encode(np.array([[0xAC]])), 1, 1) == 0xAC
    with pytest.raises(TokenizerError, match="fit a FAST tokenizer on this dataset"):
        fast.encode(np.array([[0xAD]]))


def test_save_and_load(fitted, tmp_path):
    fitted.save(tmp_path)
    again = FastTokenizer.load(tmp_path)
    assert (again, again.sha256) == (fitted, fitted.sha256)
    assert pickle.loads(pickle.dumps(fitted)) == fitted
    config = json.loads((tmp_path / "processor_config.json").read_text())
    assert (config["scale"], config["min_token"], config["vocab_size"]) == (10, fitted.min_token, 512)
    (tmp_path / "processor_config.json").write_text(json.dumps(config | {"scale": 11}))
    assert FastTokenizer.load(tmp_path).sha256 != fitted.sha256


@pytest.mark.parametrize("damage", ["no config", "no scale", "torn json", "not bpe", "nothing"])
def test_loading_names_what_is_missing(damage, fitted, tmp_path):
    fitted.save(tmp_path)
    config, bpe = tmp_path / "processor_config.json", tmp_path / "tokenizer.json"
    match damage:
        case "no config":
            config.unlink()
        case "no scale":
            config.write_text('{"min_token": 0}')
        case "torn json":
            bpe.write_text(fitted.bpe_json[:-9])
        case "not bpe":
            bpe.write_text('{"model": {"type": "Unigram"}}')
        case "nothing":
            tmp_path = tmp_path / "absent"
    with pytest.raises(TokenizerError, match=r"(?s)a FAST tokenizer: tokenizer.json.*where .*" + tmp_path.name):
        FastTokenizer.load(tmp_path)
