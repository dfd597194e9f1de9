"""The tokenizers of one policy, together: how a checkpoint keeps them."""

from dataclasses import dataclass
from pathlib import Path

from manipi.records import from_json, read_json, write_json
from manipi.tokenizers.fast import FastTokenizer
from manipi.tokenizers.text import TextTokenizer, TokenizerReference, load_tokenizer


@dataclass(frozen=True)
class Tokenizers:
    """Text for every model; FAST for the models that speak in action codes."""

    text: TextTokenizer
    fast: FastTokenizer | None = None

    def save(self, folder: Path) -> None:
        """Write what `load` needs into an existing folder."""
        write_json(folder / "text.json", self.text.save(folder))
        if self.fast is not None:
            (folder / "fast").mkdir()
            self.fast.save(folder / "fast")

    @staticmethod
    def load(folder: Path) -> "Tokenizers":
        """Raises IntegrityError where a file is missing or is not the one that was saved."""
        reference = from_json(read_json(folder / "text.json"), (TokenizerReference,), str(folder / "text.json"))
        fast = FastTokenizer.load(folder / "fast") if (folder / "fast").is_dir() else None
        return Tokenizers(load_tokenizer(reference, folder), fast)
