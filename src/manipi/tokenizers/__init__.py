"""Text and action tokenizers: everything between words, numbers and token ids. NumPy only; knows no model."""

from dataclasses import dataclass
from pathlib import Path

from manipi.errors import IntegrityError, unknown_name
from manipi.records import from_json, read_json, write_json
from manipi.tokenizers.actions import ActionTokenizer, BinningTokenizer
from manipi.tokenizers.dct import DctTokenizer
from manipi.tokenizers.fast import FastTokenizer
from manipi.tokenizers.fsq import FsqTokenizer
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
    "DctTokenizer",
    "FastTokenizer",
    "FsqTokenizer",
    "SentencePieceTokenizer",
    "TextTokenizer",
    "Tokenizers",
]
_ACTION_KINDS = {kind.kind: kind for kind in (FastTokenizer, BinningTokenizer, FsqTokenizer, DctTokenizer)}


@dataclass(frozen=True, kw_only=True)
class ActionReference:
    """Which action tokenizer the weights were trained with."""

    kind: str
    sha256: str


@dataclass(frozen=True)
class Tokenizers:
    """Those of one policy, as a checkpoint keeps them: text, and action codes where the model speaks in them.

    tokenizer/
    ├─ text.json          TokenizerReference, and beside it the model file where there is one
    ├─ action.json        ActionReference
    └─ action/            the action tokenizer's own files
    """

    text: TextTokenizer
    action: ActionTokenizer | None = None

    def save(self, folder: Path) -> None:
        """Write what `load` needs into an existing folder."""
        write_json(folder / "text.json", self.text.save(folder))
        if self.action is not None:
            (folder / "action").mkdir()
            self.action.save(folder / "action")
            write_json(folder / "action.json", ActionReference(kind=self.action.kind, sha256=self.action.sha256))

    @staticmethod
    def load(folder: Path) -> "Tokenizers":
        """Raises IntegrityError where a file is not the one that was saved, TokenizerError where one is missing."""
        reference = from_json(read_json(folder / "text.json"), (TokenizerReference,), str(folder / "text.json"))
        text, path = load_tokenizer(reference, folder), folder / "action.json"
        if not path.is_file():
            return Tokenizers(text)
        stated: ActionReference = from_json(read_json(path), (ActionReference,), str(path))
        if stated.kind not in _ACTION_KINDS:
            raise unknown_name("action tokenizer", stated.kind, _ACTION_KINDS, next="update manipi")
        action = _ACTION_KINDS[stated.kind].load(folder / "action")
        if action.sha256 != stated.sha256:
            raise IntegrityError(
                expected=f"the {stated.kind} tokenizer of sha256 {stated.sha256}",
                found=action.sha256,
                where=str(folder / "action"),
                next="restore the files from the checkpoint they came with; another tokenizer means other actions",
            )
        return Tokenizers(text, action)
