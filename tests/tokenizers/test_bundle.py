import json

import numpy as np
import pytest

from manipi.errors import IntegrityError, TokenizerError, UnknownNameError
from manipi.tokenizers import BinningTokenizer, ByteTokenizer, FastTokenizer, Tokenizers


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("name", ["fitted", "universal", "binning", "fsq", "dct", "none"])
def test_each_kind_comes_back(name, request, chunks, folder):
    none_or_binning = {"none": None, "binning": BinningTokenizer()}
    action = none_or_binning[name] if name in none_or_binning else request.getfixturevalue(name)
    Tokenizers(ByteTokenizer(1100), action).save(folder)
    again = Tokenizers.load(folder)
    assert again.text.reference == ByteTokenizer(1100).reference
    assert type(again.action) is type(action)
    if action is not None:
        assert (again.action.sha256, again.action.vocab_size) == (action.sha256, action.vocab_size)
        codes = action.encode(chunks[0])
        assert again.action.encode(chunks[0]) == codes
        np.testing.assert_array_equal(again.action.decode(codes, 16, 7), action.decode(codes, 16, 7))


def test_the_kinds_have_different_digests(fitted, universal, fsq, dct):
    assert len({tokenizer.sha256 for tokenizer in (fitted, universal, fsq, dct, BinningTokenizer())}) == 5


def test_another_action_tokenizer_is_refused(fitted, chunks, folder):
    Tokenizers(ByteTokenizer(1100), fitted).save(folder)
    FastTokenizer.fit(chunks[:50], vocab_size=512).save(folder / "action")
    with pytest.raises(IntegrityError, match=rf"(?s)FAST tokenizer of sha256 {fitted.sha256}\n.*other actions"):
        Tokenizers.load(folder)
    reference = json.loads((folder / "action.json").read_text())
    (folder / "action.json").write_text(json.dumps(reference | {"kind": "FSQ"}))
    with pytest.raises(TokenizerError, match="an FSQ tokenizer"):
        Tokenizers.load(folder)
    (folder / "action.json").write_text(json.dumps(reference | {"kind": "fast"}))
    with pytest.raises(UnknownNameError, match="DCT, FAST, FSQ, binning"):
        Tokenizers.load(folder)
