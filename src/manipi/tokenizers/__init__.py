"""Text and action tokenizers: everything between words, numbers and token ids. NumPy only; knows no model."""

from manipi.tokenizers.actions import ActionTokenizer, BinningTokenizer
from manipi.tokenizers.bundle import Tokenizers
from manipi.tokenizers.fast import FastTokenizer
from manipi.tokenizers.fsq import FsqTokenizer
from manipi.tokenizers.prompts import (
    CodeConstraint,
    TokenizedPrompt,
    extract_codes,
    fast_prompt,
    pi0_prompt,
    pi05_prompt,
)
from manipi.tokenizers.text import (
    PALIGEMMA_PIECES_SHA256,
    PALIGEMMA_VOCABULARY,
    ByteTokenizer,
    SentencePieceTokenizer,
    TextTokenizer,
    TokenizerReference,
    load_tokenizer,
    require_paligemma,
)

__all__ = [
    "PALIGEMMA_PIECES_SHA256",
    "PALIGEMMA_VOCABULARY",
    "ActionTokenizer",
    "BinningTokenizer",
    "ByteTokenizer",
    "CodeConstraint",
    "FastTokenizer",
    "FsqTokenizer",
    "SentencePieceTokenizer",
    "TextTokenizer",
    "TokenizedPrompt",
    "TokenizerReference",
    "Tokenizers",
    "extract_codes",
    "fast_prompt",
    "load_tokenizer",
    "pi0_prompt",
    "pi05_prompt",
    "require_paligemma",
]
