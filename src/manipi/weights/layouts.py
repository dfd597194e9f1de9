"""Foreign checkpoints and tokenizers opened, every tensor accounted for.

openpi-jax      …/params/ of openpi, released or from its training
openpi-torch    model.safetensors of openpi's converter
lerobot         model.safetensors of LeRobot's π0, π0.5, π0-FAST
paligemma       PaliGemma's safetensors (transformers), the language model alone
paligemma-npz   PaliGemma's .npz (big_vision), likewise

Of tokenizers, which here are saved as they are published:

SentencePiece   a .model file
FAST            tokenizer.json  processor_config.json
DCT             dct.json
FSQ             fsq.json  fsq.safetensors
FSQ             STEP/params/ (Orbax)  STEP/config/metadata (JSON)    as gs://openpi-assets/tokenizers/droid_fsq_tokenizer
"""

import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from manipi.errors import CheckpointError, IntegrityError, TokenizerError, WeightsMismatchError, shown
from manipi.model.config import ModelConfig
from manipi.remote.fetch import fetch
from manipi.tokenizers import (
    ActionTokenizer,
    BinningTokenizer,
    ByteTokenizer,
    DctTokenizer,
    FastTokenizer,
    FsqTokenizer,
    SentencePieceTokenizer,
    TextTokenizer,
)
from manipi.tokenizers.dct import DCT_FILE
from manipi.tokenizers.fsq import FSQ_CONFIG_FILE
from manipi.weights.names import (
    OPENPI_JAX,
    PALIGEMMA_NPZ,
    TORCH_LAYOUTS,
    Array,
    Layout,
    arrays,
    infer_config,
    require_match,
    unstack_layer,
)
from manipi.weights.stores import FLOATS, ArrayStore, Fields, NpzStore, OrbaxStore, SafetensorsStore, require_plain

ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""PEFT's files."""


class ForeignWeights:
    """Weights in a foreign layout. Only headers are read until a tensor is asked for."""

    def __init__(self, path: Path, layout: Layout, store: ArrayStore):
        self.path, self.store = path, store
        self.shapes = {name: info.shape for name, info in store.arrays.items()}
        unused = [name for name in (layout.lm_head, layout.expert_lm_head) if name in self.shapes]
        # A PyTorch layout's token embedding is saved under one of its two names, or both.
        if layout.lm_head in unused and layout.embedding not in self.shapes:
            unused.remove(layout.lm_head)
            layout = layout.with_embedding(layout.lm_head)
        self.layout = layout
        self.unused = tuple(unused)
        """Tensors of the layout that no computation reads: output matrices."""

    def config(self, like: ModelConfig | None = None) -> ModelConfig:
        """The config of the weights. See `names.infer_config`."""
        return infer_config(self.shapes, self.layout, like, self.store.where)

    def arrays(self, config: ModelConfig) -> dict[str, Array]:
        """What the layout has for this config, by the names in the store."""
        return arrays(config, self.layout)

    def check(self, config: ModelConfig) -> None:
        """Compare names and shapes with the config's, and the two copies of a tied embedding with each other.

        Raises:
            CheckpointError: weights in a type that is none of weights, such as 8 bits.
            WeightsMismatchError: all names and shapes that differ, or two embeddings where there should be one.
        """
        layout, infos, where = self.layout, self.store.arrays, self.store.where
        found, expected = dict(self.shapes), {name: array.shape for name, array in self.arrays(config).items()}
        if layout.name == "paligemma" and layout.embedding in found:  # transformers pads it to a multiple of 64
            rows, *width = found[layout.embedding]
            found[layout.embedding] = (min(rows, config.vocab_size), *width)
        require_match(expected, found, where, self.unused)
        require_plain({name: infos[name].dtype for name in expected if infos[name].dtype not in FLOATS}, where)
        read, tied = self.store.read, layout.lm_head in self.unused
        if tied and not torch.equal(read(layout.embedding), read(layout.lm_head)):
            raise WeightsMismatchError(
                expected="an output matrix that is the token embedding again, as in every π policy",
                found=f"other numbers in {layout.lm_head} than in {layout.embedding}",
                where=where,
                next="ask whoever trained it: one of the two would be lost",
            )

    def tensors(self, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """Our tensors by name, in their stored dtype, one layer in memory at a time. Raises as `reader` does."""
        read = self.reader(config)
        for array in self.arrays(config).values():
            for name in chain.from_iterable(array.names):
                yield name, read(name)

    def reader(self, config: ModelConfig) -> Callable[[str], Tensor]:
        """Reads any of our tensors by its name, in its stored dtype, and keeps the last layer read.

        Raises:
            IntegrityError: NaN or infinity in a tensor, or a damaged file.
        """
        places = {
            name: (path, array, layer)
            for path, array in self.arrays(config).items()
            for layer, names in enumerate(array.names)
            for name in names
        }
        last: dict[str, Tensor] = {}

        def read(name: str) -> Tensor:
            if name in last:
                return last[name]
            last.clear()
            path, array, layer = places[name]
            stacked = len(array.names) > 1
            values = self.store.read(path, layer if stacked else None)
            if self.layout.name == "paligemma" and path == self.layout.embedding:
                values = values[: config.vocab_size]
            if not torch.isfinite(values).all():
                raise IntegrityError(
                    expected="finite weights",
                    found=f"NaN or infinity in {path}" + (f", layer {layer}" if stacked else ""),
                    where=self.store.where,
                    next="take an earlier checkpoint; this run has diverged or the file is damaged",
                )
            last.update(unstack_layer(array, layer, values))
            return last[name]

        return read


def open_weights(path: Path) -> ForeignWeights:
    """The layout is told by the files and the names in them.

    Raises:
        CheckpointError: nothing there, nothing known, or adapters of PEFT. IntegrityError: a damaged file.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or path.name in ADAPTERS or path.suffix == ".safetensors":
        # PEFT's adapters, beside their base or alone, are a part of the policy that would be lost.
        found = [name for name in ADAPTERS if (folder / name).is_file()]
        inner = sorted(one.parent.name for one in folder.glob("*/adapter_config.json")) if path.is_dir() else []
        if found or inner:
            config = folder / ADAPTERS[0]
            base = Fields.read(config).get("base_model_name_or_path", str, "") if config.is_file() else ""
            alone = not any(folder.glob("model*.safetensors*")) and not (folder / "params").is_dir()
            raise CheckpointError(
                expected="a policy's weights, all in one",
                found=f"PEFT's adapters {'alone' if alone else 'beside them'}: {', '.join(found or inner)}"
                + (f", for {shown(base)}" if base else ""),
                where=str(folder),
                next="put them into their base with PEFT's merge_and_unload() and save that"
                + ("" if alone else "; or remove them, if the base alone is meant"),
            )
    for params in (path, path / "params"):
        if (params / "_METADATA").is_file():
            return ForeignWeights(path, OPENPI_JAX, OrbaxStore(params))
    if path.suffix == ".npz":
        return ForeignWeights(path, PALIGEMMA_NPZ, NpzStore(path))
    if path.suffix == ".safetensors" or any(path.glob("model*.safetensors*")):
        store = SafetensorsStore(path)
        for layout in TORCH_LAYOUTS:
            if any(name.startswith(f"{layout.prefixes['vlm']}vision_tower.") for name in store.arrays):
                return ForeignWeights(path, layout, store)
    raise CheckpointError(
        expected="params/_METADATA (openpi), model.safetensors (openpi, LeRobot, PaliGemma) or a .npz (PaliGemma)",
        found=f"{', '.join(sorted(p.name for p in path.iterdir())) or 'an empty folder'}" if path.is_dir() else "none",
        where=str(path),
        next="name the checkpoint's folder or file",
    )


def open_action_tokenizer(source: str) -> ActionTokenizer:
    """`binning`, or the tokenizer in a folder or behind a URL, recognised by its files.

    Raises:
        TokenizerError: no such tokenizer there, or a broken one.
        WeightsMismatchError: an FSQ tokenizer whose tensors do not fit its config.
    """
    if source == "binning":
        return BinningTokenizer()
    folder = fetch(source) if "://" in source else Path(source)
    if (folder / DCT_FILE).is_file():
        return DctTokenizer.load(folder)
    if (folder / FSQ_CONFIG_FILE).is_file():
        return FsqTokenizer.load(folder)
    steps = sorted(folder.glob("[0-9]*/params"))
    if not steps:
        return FastTokenizer.load(folder)
    folder = steps[-1].parent
    try:
        config = json.loads((folder / "config" / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise TokenizerError(
            expected="an FSQ tokenizer: params/ and config/metadata",
            found=str(error),
            where=str(folder),
            next="download the folder again",
        ) from error
    return FsqTokenizer.from_tree(OrbaxStore(steps[-1]).tree(), config)


def open_text_tokenizer(source: str, action: ActionTokenizer | None) -> TextTokenizer:
    """`byte`, with room for the action codes, or the SentencePiece model in a file or behind a URL.

    Raises:
        TokenizerError: no such file or no such model in it.
        FetchError: it cannot be had.
    """
    if source == "byte":
        return ByteTokenizer(ByteTokenizer.NUM_TEXT_IDS + (action.vocab_size if action is not None else 0))
    return SentencePieceTokenizer(fetch(source) if "://" in source else source)
