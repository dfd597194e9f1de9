"""Text and action tokenizers: everything between words, numbers and token ids. NumPy only; knows no model."""

from manipi.tokenizers.binning import BinningTokenizer
from manipi.tokenizers.bundle import Tokenizers
from manipi.tokenizers.constraint import CodeConstraint
from manipi.tokenizers.fast import FastTokenizer, extract_codes
from manipi.tokenizers.prompts import ActionTokenizer, TokenizedPrompt, fast_prompt, pi0_prompt, pi05_prompt
from manipi.tokenizers.text import (
    ByteTokenizer,
    SentencePieceTokenizer,
    TextTokenizer,
    TokenizerReference,
    load_tokenizer,
)

__all__ = [
    "ActionTokenizer",
    "BinningTokenizer",
    "ByteTokenizer",
    "CodeConstraint",
    "FastTokenizer",
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
]
