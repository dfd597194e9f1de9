"""Foreign checkpoints as our tensors: which layout it is, which architecture, and every tensor accounted for.

openpi-jax      …/params/ of openpi, released or from its training
openpi-torch    model.safetensors of openpi's converter
lerobot         model.safetensors of LeRobot's π0, π0.5, π0-FAST
paligemma       PaliGemma's safetensors (transformers), the language model alone
paligemma-npz   PaliGemma's .npz (big_vision), likewise
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from manipi.errors import CheckpointError, IntegrityError, WeightsMismatchError, shown
from manipi.model.config import ModelConfig
from manipi.weights.foreign_json import Fields
from manipi.weights.names import Array, openpi_arrays, require_match, unstack_layer
from manipi.weights.orbax import OrbaxStore
from manipi.weights.stores import FLOATS, NpzStore, SafetensorsStore, Store, require_plain
from manipi.weights.torch_names import PREFIXES, Prefixes, torch_arrays

ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""PEFT's files."""
Layout: TypeAlias = Literal["openpi-jax", "openpi-torch", "lerobot", "paligemma", "paligemma-npz"]


@dataclass
class Source:
    """Weights in a foreign layout. Only headers are read until a tensor is asked for."""

    path: Path
    layout: Layout
    store: Store
    prefixes: Prefixes | None = None
    """Of the PyTorch layouts."""

    @property
    def vlm_only(self) -> bool:
        return self.layout.startswith("paligemma")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.store.arrays.items()}

    def arrays(self, config: ModelConfig) -> dict[str, Array]:
        """What the layout has for this config, by the names in the store."""
        if self.prefixes is not None:
            tree = torch_arrays(config, self.prefixes)
            tree[self._embedding] = tree.pop(f"{self.prefixes.language}embed_tokens.weight")
            return tree
        tree = openpi_arrays(config)
        if self.layout == "openpi-jax":
            return tree
        vlm = {path: array for path, array in tree.items() if path.startswith("PaliGemma/") and "_1/" not in f"{path}/"}
        return {path.replace("PaliGemma/", "params/", 1): array for path, array in vlm.items()}

    def check(self, config: ModelConfig) -> None:
        """Compare names and shapes with the config's, and the two copies of a tied embedding with each other.

        Raises:
            CheckpointError: weights in a type that is none of weights, such as 8 bits.
            WeightsMismatchError: all names and shapes that differ, or two embeddings where there should be one.
        """
        found = dict(self.shapes)
        expected = {name: array.shape for name, array in self.arrays(config).items()}
        if self.layout == "paligemma":  # transformers pads the vocabulary to a multiple of 64
            rows, width = found.get(self._embedding, (0, 0))
            found[self._embedding] = (min(rows, config.vocab_size), width)
        require_match(expected, found, self.store.where, self.unused)
        infos = self.store.arrays
        require_plain(
            {name: infos[name].dtype for name in expected if infos[name].dtype not in FLOATS}, self.store.where
        )
        if self.prefixes is not None and self.prefixes.lm_head in self.unused:
            self._require_tied(self.prefixes.lm_head)

    def _require_tied(self, lm_head: str) -> None:
        if not torch.equal(self.store.read(self._embedding), self.store.read(lm_head)):
            raise WeightsMismatchError(
                expected="an output matrix that is the token embedding again, as in every π policy",
                found=f"other numbers in {lm_head} than in {self._embedding}",
                where=self.store.where,
                next="ask whoever trained it: one of the two would be lost",
            )

    @property
    def _embedding(self) -> str:
        """Where a PyTorch layout keeps the token embedding, which is saved under one of its two names, or both."""
        assert self.prefixes is not None
        name = f"{self.prefixes.language}embed_tokens.weight"
        return self.prefixes.lm_head if name not in self.shapes and self.prefixes.lm_head in self.shapes else name

    @property
    def unused(self) -> tuple[str, ...]:
        """Tensors of the layout that no computation reads: output matrices."""
        names = (self.prefixes.lm_head, self.prefixes.expert_lm_head) if self.prefixes else ()
        return tuple(name for name in names if name in self.shapes and name != self._embedding)

    def tensors(self, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """Our tensors by name, in their stored dtype, one layer in memory at a time.

        Raises:
            IntegrityError: NaN or infinity in a tensor, or a damaged file.
        """
        for path, array in self.arrays(config).items():
            for layer in range(len(array.names)):
                yield from self.layer(path, array, layer, config)

    def layer(self, path: str, array: Array, layer: int, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """Our tensors of one layer of one array. Raises as `tensors` does."""
        values = self.store.read(path, layer if len(array.names) > 1 else None)
        if self.layout == "paligemma" and path == self._embedding:
            values = values[: config.vocab_size]
        if not torch.isfinite(values).all():
            raise IntegrityError(
                expected="finite weights",
                found=f"NaN or infinity in {path}" + (f", layer {layer}" if len(array.names) > 1 else ""),
                where=self.store.where,
                next="take an earlier checkpoint; this run has diverged or the file is damaged",
            )
        yield from unstack_layer(array, layer, values)


class Reader:
    """Random access to a source's tensors by our names; the last layer read is kept."""

    def __init__(self, source: Source, config: ModelConfig):
        self._source, self._config, self._arrays = source, config, source.arrays(config)
        self._places = {
            name: (path, layer)
            for path, a in self._arrays.items()
            for layer, names in enumerate(a.names)
            for name in names
        }
        self._last: tuple[tuple[str, int], dict[str, Tensor]] | None = None

    def __call__(self, name: str) -> Tensor:
        place = self._places[name]
        if self._last is None or self._last[0] != place:
            self._last = (place, dict(self._source.layer(place[0], self._arrays[place[0]], place[1], self._config)))
        return self._last[1][name]


def open_source(path: Path) -> Source:
    """The layout is told by the files and the names in them.

    Raises:
        CheckpointError: nothing there, nothing known, or adapters of PEFT. IntegrityError: a damaged file.
    """
    _require_no_adapters(path)
    for folder in (path, path / "params"):
        if (folder / "_METADATA").is_file():
            return Source(path, "openpi-jax", OrbaxStore(folder))
    if path.suffix == ".npz":
        return Source(path, "paligemma-npz", NpzStore(path))
    if path.suffix == ".safetensors" or any(path.glob("model*.safetensors*")):
        store = SafetensorsStore(path)
        for layout, versions in PREFIXES.items():
            for prefixes in versions:
                if any(name.startswith(prefixes.vision) for name in store.arrays):
                    return Source(path, layout, store, prefixes)  # type: ignore[arg-type]
    raise CheckpointError(
        expected="params/_METADATA (openpi), model.safetensors (openpi, LeRobot, PaliGemma) or a .npz (PaliGemma)",
        found=f"{', '.join(sorted(p.name for p in path.iterdir())) or 'an empty folder'}" if path.is_dir() else "none",
        where=str(path),
        next="name the checkpoint's folder or file",
    )


def _require_no_adapters(path: Path) -> None:
    """PEFT's adapters, beside their base or alone, are a part of the policy that would be lost."""
    folder = path if path.is_dir() else path.parent
    if path.name not in ADAPTERS and path.is_file() and path.suffix != ".safetensors":
        return
    found = [name for name in ADAPTERS if (folder / name).is_file()]
    inner = sorted(one.parent.name for one in folder.glob("*/adapter_config.json")) if path.is_dir() else []
    if not found and not inner:
        return
    base = ""
    if (config := folder / ADAPTERS[0]).is_file():
        base = Fields.read(config).get("base_model_name_or_path", str, "")
    alone = not any(folder.glob("model*.safetensors*")) and not (folder / "params").is_dir()
    raise CheckpointError(
        expected="a policy's weights, all in one",
        found=f"PEFT's adapters {'alone' if alone else 'beside them'}: {', '.join(found or inner)}"
        + (f", for {shown(base)}" if base else ""),
        where=str(folder),
        next="put them into their base with PEFT's merge_and_unload() and save that"
        + ("" if alone else "; or remove them, if the base alone is meant"),
    )


def stream_weights(model: nn.Module, reader: Callable[[str], Tensor]) -> None:
    """Give each layer of a model on the meta device its weights when it runs, and take them back afterwards.

    The token embedding, which is used outside a layer's call, stays.
    """
    for prefix, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if "token_embedding" in names:
            module.token_embedding = nn.Parameter(reader(f"{prefix}.token_embedding"), requires_grad=False)
        elif names:
            module.register_forward_pre_hook(_Fill(prefix, names, reader))
            module.register_forward_hook(_Clear(names))


@dataclass(frozen=True)
class _Fill:
    prefix: str
    names: list[str]
    reader: Callable[[str], Tensor]

    def __call__(self, module: nn.Module, _: Any) -> None:
        for name in self.names:
            setattr(module, name, nn.Parameter(self.reader(f"{self.prefix}.{name}"), requires_grad=False))


@dataclass(frozen=True)
class _Clear:
    names: list[str]

    def __call__(self, module: nn.Module, *_: Any) -> None:
        for name in self.names:
            parameter = getattr(module, name)
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
