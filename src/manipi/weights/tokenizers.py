"""Published tokenizers: SentencePiece models, FAST, and FSQ as the reference releases it or as it is saved here.

FAST    tokenizer.json  processor_config.json
FSQ     fsq.json  fsq.safetensors
FSQ     STEP/params/ (Orbax)  STEP/config/metadata (JSON)        as gs://openpi-assets/tokenizers/droid_fsq_tokenizer
"""

import json
from pathlib import Path

from manipi.errors import TokenizerError
from manipi.remote.fetch import fetch
from manipi.tokenizers import (
    ActionTokenizer,
    BinningTokenizer,
    ByteTokenizer,
    FastTokenizer,
    FsqTokenizer,
    SentencePieceTokenizer,
    TextTokenizer,
)
from manipi.tokenizers.fsq import FSQ_CONFIG_FILE
from manipi.weights.stores import OrbaxStore


def open_action_tokenizer(source: str) -> ActionTokenizer:
    """`binning`, or the tokenizer in a folder or behind a URL, recognised by its files.

    Raises:
        TokenizerError: no such tokenizer there, or a broken one.
        WeightsMismatchError: an FSQ tokenizer whose tensors do not fit its config.
    """
    if source == "binning":
        return BinningTokenizer()
    folder = fetch(source) if "://" in source else Path(source)
    if (folder / FSQ_CONFIG_FILE).is_file():
        return FsqTokenizer.load(folder)
    steps = sorted(folder.glob("[0-9]*/params"))
    return _released_fsq(steps[-1].parent) if steps else FastTokenizer.load(folder)


def open_text_tokenizer(source: str, action: ActionTokenizer | None) -> TextTokenizer:
    """`byte`, with room for the action codes, or the SentencePiece model in a file or behind a URL.

    Raises:
        TokenizerError: no such file or no such model in it.
        FetchError: it cannot be had.
    """
    if source == "byte":
        return ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + (action.vocab_size if action is not None else 0))
    return SentencePieceTokenizer(fetch(source) if "://" in source else source)


def _released_fsq(folder: Path) -> FsqTokenizer:
    try:
        config = json.loads((folder / "config" / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise TokenizerError(
            expected="an FSQ tokenizer: params/ and config/metadata",
            found=str(error),
            where=str(folder),
            next="download the folder again",
        ) from error
    return FsqTokenizer.from_tree(OrbaxStore(folder / "params").tree(), config)
