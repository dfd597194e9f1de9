"""The names and axes of our tensors in the files of others: one table, for reading and for writing.

openpi's JAX code stacks the layers of each expert on the first axis, keeps heads apart from features and stores
matrices as [in, out]. Ours are [out, in], one per layer, as in PyTorch, where all grew out of transformers' PaliGemma:

    ours     gemma.blocks.{layer}.experts.action.q_proj.weight                              [N·H, D]
    JAX      PaliGemma/llm/layers/attn/q_einsum_1/w                                  [layer, N, D, H]
    PyTorch  paligemma_with_expert.gemma_expert.model.layers.{layer}.self_attn.q_proj.weight [N·H, D]

A row says the three names, the axes in JAX and their order in ours, where letters written together are flattened:
"NDH" and "NH D" for the one above. From a config's sizes the letters give every shape (`arrays`); from the shapes in a
file they give the config (`infer_config`).

    D width   L layers   M of the MLP   N heads   H numbers of a head   V vocabulary   A action dimensions
    Q heads of queries that have an array of their own, beside G heads of keys and values
    J heads of queries, keys and values in one array, which is so where there are equally many
    R, S ranks of the adapters of attention and MLP   E, F multiples of the width
    O width of the language model   P, K, C rows, columns and colours of a patch   T patches of a picture
"""

import dataclasses
import functools
import math
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manipi.errors import ConfigError, WeightsMismatchError
from manipi.model.config import (
    REFERENCE,
    Adapters,
    GemmaSize,
    LoRA,
    ModelConfig,
    Pi0Config,
    Pi0FastConfig,
    Pi05Config,
    VisionSize,
)

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


class Row(NamedTuple):
    """Tensors of ours that hold the values of one array in JAX; several with `|` between them are stacked there."""

    ours: str
    jax: str
    torch: str
    """Empty where PyTorch has none."""
    axes: str
    """In JAX, behind those of layers and of the parts that `ours` names: a letter each."""
    order: str
    torch_axes: str = ""
    """Where PyTorch's are not ours."""


class Part(NamedTuple):
    """Rows whose names begin alike and whose letters mean the same."""

    scope: str
    """Whose letters: `vision`, `vlm`, `action` or `head`."""
    ours: str
    """`{layer}`: one of ours and of PyTorch's per layer, which JAX stacks."""
    jax: str
    torch: str
    """`{vlm}` and such stand for what begins the names in one layout: `Layout.prefixes`."""
    rows: tuple[Row, ...]
    kinds: tuple[type[ModelConfig], ...] = (Pi0Config, Pi05Config, Pi0FastConfig)
    """Of policies that have it."""


def _linear(ours: str, jax: str, torch: str, axes: str, order: str, torch_axes: str = "") -> tuple[Row, Row]:
    """A matrix and its bias, which has the axes that stand first in ours."""
    out = order.split()[0]
    weight = Row(f"{ours}.weight", f"{jax}/kernel", f"{torch}.weight", axes, order, torch_axes)
    return weight, Row(f"{ours}.bias", f"{jax}/bias", f"{torch}.bias", out, out)


def _layer_norm(ours: str, jax: str, torch: str) -> tuple[Row, Row]:
    weight = Row(f"{ours}.weight", f"{jax}/scale", f"{torch}.weight", "D", "D")
    return weight, Row(f"{ours}.bias", f"{jax}/bias", f"{torch}.bias", "D", "D")


VISION = (
    *_linear("patch_embedding", "embedding", "embeddings.patch_embedding", "PKCD", "D PKC", "DCPK"),
    Row("position_embedding", "pos_embedding", "embeddings.position_embedding.weight", "1TD", "1T D"),
    *_layer_norm("final_norm", "Transformer/encoder_norm", "post_layernorm"),
)
PROJECTOR = _linear("head", "head", "linear", "DO", "O D")
EMBEDDING = (Row("token_embedding", "input_embedding", "{embedding}", "VD", "V D"),)
_HEADS = "MultiHeadDotProductAttention_0"
VISION_BLOCK = (
    *_layer_norm("attention_norm", "LayerNorm_0", "layer_norm1"),
    *_linear("q_proj", f"{_HEADS}/query", "self_attn.q_proj", "DNH", "NH D"),
    *_linear("k_proj", f"{_HEADS}/key", "self_attn.k_proj", "DNH", "NH D"),
    *_linear("v_proj", f"{_HEADS}/value", "self_attn.v_proj", "DNH", "NH D"),
    *_linear("out_proj", f"{_HEADS}/out", "self_attn.out_proj", "NHD", "D NH"),
    *_layer_norm("mlp_norm", "LayerNorm_1", "layer_norm2"),
    *_linear("up_proj", "MlpBlock_0/Dense_0", "mlp.fc1", "DM", "M D"),
    *_linear("down_proj", "MlpBlock_0/Dense_1", "mlp.fc2", "MD", "D M"),
)
# `{e}` is empty for the first expert and `_1` for the second. Beside the matrices are the updates of
# `manipi.model.layers`, for which PyTorch has no place.
ATTENTION = (
    Row("q_proj.weight", "q_einsum{e}/w", "q_proj.weight", "QDH", "QH D"),
    Row("k_proj.weight|v_proj.weight", "kv_einsum{e}/w", "k_proj.weight|v_proj.weight", "GDH", "GH D"),
    Row(_QKV := "q_proj.weight|k_proj.weight|v_proj.weight", "qkv_einsum{e}/w", _QKV, "JDH", "JH D"),
    Row("out_proj.weight", "attn_vec_einsum{e}/w", "o_proj.weight", "NHD", "D NH"),
    Row("q_proj.lora_a", "q_einsum{e}/lora_a", "", "QDR", "QR D"),
    Row("q_proj.lora_b", "q_einsum{e}/lora_b", "", "QRH", "Q H R"),
    Row("k_proj.lora_a|v_proj.lora_a", "kv_einsum{e}/lora_a", "", "GDR", "GR D"),
    Row("k_proj.lora_b|v_proj.lora_b", "kv_einsum{e}/lora_b", "", "GRH", "G H R"),
    Row("q_proj.lora_a|k_proj.lora_a|v_proj.lora_a", "qkv_einsum{e}/lora_a", "", "JDR", "JR D"),
    Row("q_proj.lora_b|k_proj.lora_b|v_proj.lora_b", "qkv_einsum{e}/lora_b", "", "JRH", "J H R"),
    Row("out_proj.lora_a", "attn_vec_einsum{e}/lora_a", "", "NHR", "R NH"),
    Row("out_proj.lora_b", "attn_vec_einsum{e}/lora_b", "", "NRD", "N D R"),
)
MLP = (
    Row("gate_proj.weight|up_proj.weight", "gating_einsum", "gate_proj.weight|up_proj.weight", "DM", "M D"),
    Row("down_proj.weight", "linear", "down_proj.weight", "MD", "D M"),
    Row("gate_proj.lora_a|up_proj.lora_a", "gating_einsum_lora_a", "", "DS", "S D"),
    Row("gate_proj.lora_b|up_proj.lora_b", "gating_einsum_lora_b", "", "SM", "1 M S"),
    Row("down_proj.lora_a", "linear_lora_a", "", "MS", "S M"),
    Row("down_proj.lora_b", "linear_lora_b", "", "SD", "1 D S"),
)
NORMS = (
    Row("attention_norm.scale", "pre_attention_norm{e}/scale", "input_layernorm.weight", "D", "D"),
    Row("mlp_norm.scale", "pre_ffw_norm{e}/scale", "post_attention_layernorm.weight", "D", "D"),
)
FINAL_NORM = (Row("scale", "scale", "weight", "D", "D"),)
ADAPTIVE_NORMS = (
    *_linear("attention_norm.modulation", "pre_attention_norm{e}/Dense_0", "input_layernorm.dense", "DE", "E D"),
    *_linear("mlp_norm.modulation", "pre_ffw_norm{e}/Dense_0", "post_attention_layernorm.dense", "DE", "E D"),
)
ADAPTIVE_FINAL_NORM = _linear("modulation", "Dense_0", "dense", "DE", "E D")
HEAD = (
    *_linear("action_in", "action_in_proj", "action_in_proj", "AD", "D A"),
    *_linear("action_out", "action_out_proj", "action_out_proj", "DA", "A D"),
)
PI0_HEAD = (
    *_linear("state_in", "state_proj", "state_proj", "AD", "D A"),
    *_linear("time_mlp_in", "action_time_mlp_in", "action_time_mlp_in", "ED", "D E"),
    *_linear("time_mlp_out", "action_time_mlp_out", "action_time_mlp_out", "DF", "F D"),
)
PI05_HEAD = (
    *_linear("time_mlp_in", "time_mlp_in", "time_mlp_in", "DF", "F D"),
    *_linear("time_mlp_out", "time_mlp_out", "time_mlp_out", "DF", "F D"),
)


def _expert(name: str, torch: str, plain: tuple[Any, ...], adaptive: tuple[Any, ...]) -> tuple[Part, ...]:
    """One expert's parts. `plain`, `adaptive`: policies whose norms have a scale, or one that the time gives."""
    ours, jax, theirs = f"gemma.blocks.{{layer}}.experts.{name}.", "{root}llm/layers/", f"{torch}layers.{{layer}}."
    final = (name, f"gemma.final_norms.{name}.", "{root}llm/final_norm{e}/", f"{torch}norm.")
    return (
        Part(name, ours, f"{jax}attn/", f"{theirs}self_attn.", ATTENTION, plain + adaptive),
        Part(name, f"{ours}mlp.", f"{jax}mlp{{e}}/", f"{theirs}mlp.", MLP, plain + adaptive),
        Part(name, ours, jax, theirs, NORMS, plain),
        Part(name, ours, jax, theirs, ADAPTIVE_NORMS, adaptive),
        Part(*final, FINAL_NORM, plain),
        Part(*final, ADAPTIVE_FINAL_NORM, adaptive),
    )


_TOWER = "{vlm}vision_tower.vision_model."
_BLOCKS = ("{root}img/Transformer/encoderblock/", f"{_TOWER}encoder.layers.{{layer}}.")
PARTS = (
    Part("vision", "vision.", "{root}img/", _TOWER, VISION),
    Part("vision", "vision.", "{root}img/", "{vlm}multi_modal_projector.", PROJECTOR),
    Part("vision", "vision.blocks.{layer}.", *_BLOCKS, VISION_BLOCK),
    Part("vlm", "gemma.", "{root}llm/embedder/", "", EMBEDDING),
    *_expert("vlm", "{language}", (Pi0Config, Pi05Config, Pi0FastConfig), ()),
    *_expert("action", "{expert}", (Pi0Config,), (Pi05Config,)),
    Part("head", "head.", "", "{head}", HEAD, (Pi0Config, Pi05Config)),
    Part("head", "head.", "", "{head}", PI0_HEAD, (Pi0Config,)),
    Part("head", "head.", "", "{head}", PI05_HEAD, (Pi05Config,)),
)


class Layout(NamedTuple):
    """What differs between files that use one column of the table."""

    name: str
    prefixes: Mapping[str, str]
    """What stands for `{root}`, `{vlm}` … in the names. JAX's have a root; those without `head` are no policies."""
    lm_head: str = ""
    """The output matrix of the vocabulary, which is the token embedding again."""
    expert_lm_head: str = ""
    """The action expert's output matrix, which nothing uses."""

    @property
    def is_jax(self) -> bool:
        return "root" in self.prefixes

    @property
    def vlm_only(self) -> bool:
        """Whether it is a PaliGemma's, the vision-language model alone."""
        return "head" not in self.prefixes

    @property
    def embedding(self) -> str:
        """The token embedding of a PyTorch layout."""
        return self.prefixes["embedding"]

    def with_embedding(self, name: str) -> "Layout":
        """The layout of a file that has the token embedding under that name: as its output matrix."""
        return self._replace(prefixes={**self.prefixes, "embedding": name})


def _paligemma(name: str, vlm: str, language: str, lm_head: str) -> Layout:
    prefixes = {"vlm": vlm, "language": language, "embedding": f"{language}embed_tokens.weight"}
    return Layout(name, prefixes, lm_head)


def _policy(name: str, root: str) -> Layout:
    vlm, expert = f"{root}paligemma_with_expert.paligemma.", f"{root}paligemma_with_expert.gemma_expert."
    alone = _paligemma(name, f"{vlm}model.", f"{vlm}model.language_model.", f"{vlm}lm_head.weight")
    prefixes = {**alone.prefixes, "expert": f"{expert}model.", "head": root}
    return alone._replace(prefixes=prefixes, expert_lm_head=f"{expert}lm_head.weight")


OPENPI_JAX = Layout("openpi-jax", {"root": "PaliGemma/", "head": ""})
PALIGEMMA_NPZ = Layout("paligemma-npz", {"root": "params/"})
OPENPI_TORCH = _policy("openpi-torch", "")
LEROBOT = _policy("lerobot", "model.")
TORCH_LAYOUTS = (
    OPENPI_TORCH,
    LEROBOT,
    # transformers before and since 4.52.
    _paligemma("paligemma", "", "language_model.model.", "language_model.lm_head.weight"),
    _paligemma("paligemma", "model.", "model.language_model.", "lm_head.weight"),
)


class Array(NamedTuple):
    """One array of a layout, resolved for a config."""

    names: tuple[tuple[str, ...], ...]
    """Our tensors, [layer][part]: one layer where nothing is stacked, several parts where a pair or triple is."""
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    """Sizes of one layer and part in the layout."""
    permutation: tuple[int, ...]
    """From the layout's axes to the order of ours."""
    our_shape: tuple[int, ...]

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Of one layer in the layout; the parts, where there are several, stand first."""
        return (() if len(self.names[0]) == 1 else (len(self.names[0]),)) + self.axes


def arrays(config: ModelConfig, layout: Layout) -> dict[str, Array]:
    """Every array that the layout has for this config, by its name there; of a PaliGemma the language model alone."""
    tree: dict[str, Array] = {}
    for part, row, theirs, groups in _rows(layout, type(config)):
        sizes = _sizes(config, part.scope)
        if not sizes.keys() >= set(row.axes):
            continue
        layers = range(sizes["L"] if "{layer}" in part.ours else 1)
        ours = tuple(tuple(part.ours.format(layer=i) + name for name in row.ours.split("|")) for i in layers)
        our_shape = tuple(math.prod(sizes[axis] for axis in group) for group in row.order.split())
        shape = tuple(math.prod(sizes[axis] for axis in group) for group in groups)
        letters = row.axes if layout.is_jax else row.torch_axes
        # An axis that only ours have is of size 1.
        permutation = tuple(letters.index(axis) for axis in row.order if axis in letters) or tuple(range(len(shape)))
        if layout.is_jax:
            tree[theirs[0]] = Array(ours, shape, shape[-len(letters) :], permutation, our_shape)
            continue
        for layer, names in enumerate(ours):
            for name, template in zip(names, theirs, strict=True):
                tree[template.format(layer=layer)] = Array(((name,),), shape, shape, permutation, our_shape)
    return tree


openpi_arrays = functools.partial(arrays, layout=OPENPI_JAX)
"""Every array that openpi's JAX code has for a config, by tree path."""


def _rows(layout: Layout, kind: type[ModelConfig]) -> Iterator[tuple[Part, Row, list[str], list[str]]]:
    """What the layout may have for a policy of that kind: with the names there, and the letters of each axis.

    `{layer}` stays in the names.
    """
    for part in PARTS:
        if kind in part.kinds and (part.scope in ("vision", "vlm") or not layout.vlm_only):
            filled = {"layer": "{layer}", "e": "_1" if part.scope == "action" else "", **layout.prefixes}
            for row in part.rows:
                names, axes = [part.torch + name for name in row.torch.split("|")], list(row.torch_axes)
                if layout.is_jax:
                    names, parts = [part.jax + row.jax], row.ours.count("|") + 1
                    axes = ["L"] * ("{layer}" in part.ours) + [str(parts)] * (parts > 1) + list(row.axes)
                if layout.is_jax or row.torch:
                    yield part, row, [name.format(**filled) for name in names], axes or row.order.split()


def _sizes(config: ModelConfig, scope: str) -> dict[str, int]:
    """What the letters of a scope stand for; without those that the config has no use for."""
    v, vlm = config.vision, config.vlm
    if scope == "vision":
        sizes = {"D": v.width, "L": v.depth, "N": v.num_heads, "H": v.width // v.num_heads, "M": v.mlp_dim}
        return sizes | {"O": vlm.width, "P": v.patch_size, "K": v.patch_size, "C": 3, "1": 1, "T": v.num_tokens}
    size, adapters = vlm, config.vlm_adapters
    if scope != "vlm":
        assert not isinstance(config, Pi0FastConfig)
        size, adapters = config.action_expert, config.action_adapters
    if scope == "head":
        return {"A": config.action_dim, "D": size.width, "E": 2 * size.width, "F": size.width}
    sizes = {"D": size.width, "L": size.depth, "M": size.mlp_dim, "H": size.head_dim, "N": size.num_heads}
    sizes |= {"E": 3 * size.width, "V": config.vocab_size, "1": 1, "2": 2, "3": 3}
    joint = size.num_heads == size.num_kv_heads
    sizes |= {"J": size.num_heads} if joint else {"Q": size.num_heads, "G": size.num_kv_heads}
    ranks = {"R": adapters.attention, "S": adapters.feed_forward}
    return sizes | {letter: lora.rank for letter, lora in ranks.items() if lora is not None}


def infer_config(
    shapes: Shapes, layout: Layout = OPENPI_JAX, like: ModelConfig | None = None, where: str = "the weights"
) -> ModelConfig:
    """The config behind the shapes of a file's tensors.

    They tell the kind of policy, all widths and depths, the adapters' ranks and the action dimensions. They do not tell
    the action horizon, the token budget, the cameras, an adapter's alpha (alpha = rank where nothing else is known, as
    in openpi), nor, in PyTorch, how many heads share a matrix.

    Args:
        like: what the shapes do not tell; None: the released policies' settings. A PaliGemma has the kind of `like`.

    Raises:
        WeightsMismatchError: a tensor is missing that is needed to tell, or the kind is not that of `like`.
        ConfigError: heads of another size than those of `like`.
    """
    kind: type[ModelConfig] = Pi0FastConfig
    if layout.vlm_only and like is not None:
        kind = type(like)
    elif any(name.startswith(f"{layout.prefixes.get('head')}action_in_proj") for name in shapes):
        pi0 = any(name.startswith(f"{layout.prefixes['head']}state_proj") for name in shapes)
        kind = Pi0Config if pi0 else Pi05Config
    if like is not None and not isinstance(like, kind):
        raise WeightsMismatchError(
            expected=f"the weights of a {type(like).__name__}",
            found=f"those of a {kind.__name__}",
            where=where,
            next="name a recipe or robot of that kind of policy (manipi recipes)",
        )
    base = like if like is not None else kind(compat=REFERENCE)

    solved = functools.partial(_solve, kind=kind, shapes=shapes, layout=layout, where=where)

    def expert(scope: str, like: GemmaSize, adapters: Adapters) -> tuple[dict[str, int], GemmaSize, Adapters]:
        found = solved(scope, "DLMNH" if layout.is_jax else "DLMNHG", {"H": like.head_dim})
        heads = {"num_heads": found["N"], "num_kv_heads": found.get("G", found["N"]), "head_dim": found["H"]}
        size = GemmaSize(width=found["D"], depth=found["L"], mlp_dim=found["M"], **heads)
        ranks = {"attention": found.get("R"), "feed_forward": found.get("S")}
        loras = {name: LoRA(rank=rank, alpha=float(rank)) for name, rank in ranks.items() if rank}
        same = {name: had for name in loras if (had := getattr(adapters, name)) and had.rank == loras[name].rank}
        return found, size, Adapters(**loras | same)

    v = solved("vision", "DLMNPT", {"N": base.vision.num_heads})
    sizes = {"width": v["D"], "depth": v["L"], "mlp_dim": v["M"], "num_heads": v["N"]}
    vision = VisionSize(**sizes, patch_size=v["P"], image_size=math.isqrt(v["T"]) * v["P"])
    found, vlm, adapters = expert("vlm", base.vlm, base.vlm_adapters)
    # transformers pads the vocabulary of PaliGemma.
    rows = min(found["V"], base.vocab_size) if layout.name == "paligemma" else found["V"]
    fields: dict[str, Any] = {"vision": vision, "vocab_size": rows, "vlm": vlm, "vlm_adapters": adapters}
    if not layout.vlm_only and not isinstance(base, Pi0FastConfig):
        _, size, adapters = expert("action", base.action_expert, base.action_adapters)
        fields |= {"action_dim": solved("head", "A", {})["A"], "action_expert": size, "action_adapters": adapters}
    return dataclasses.replace(base, **fields)


def _solve(
    scope: str, needed: str, known: dict[str, int], kind: type[ModelConfig], shapes: Shapes, layout: Layout, where: str
) -> dict[str, int]:
    """The sizes of a scope's letters, from the shapes of the arrays that are there.

    Args:
        needed: letters that must come out.
        known: sizes of others, by which axes that stand for several letters can be divided; JAX has none such.

    Raises:
        WeightsMismatchError: the arrays that would tell are missing. ConfigError: they do not fit what is known.
    """
    sizes = {"1": 1, "2": 2, "3": 3} | ({} if layout.is_jax else known)
    telling: dict[str, tuple[str, list[str]]] = {}
    for part, _, theirs, axes in _rows(layout, kind):
        if part.scope != scope:
            continue
        before, layered, _ = theirs[0].partition("{layer}")
        if layered and "L" not in sizes:
            numbers = [name.removeprefix(before).split(".")[0] for name in shapes if name.startswith(before)]
            sizes["L"] = 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)
        name = theirs[0].format(layer=0)
        telling.update({letter: (name, axes) for letter in "".join(axes) if letter not in telling})
        shape = shapes.get(name, ())
        if len(shape) == len(axes) and all(shape):
            for group, size in zip(axes, shape, strict=True):
                unknown, divisor = [a for a in group if a not in sizes], math.prod(sizes.get(a, 1) for a in group)
                if len(unknown) == 1 and size % divisor == 0:
                    sizes[unknown[0]] = size // divisor
    for letter in needed:
        if letter not in sizes:
            name, axes = telling[letter]
            shape = shapes.get(name, ())
            if len(shape) == len(axes) and all(shape):
                raise ConfigError(
                    expected=f"heads of {sizes['H']} dimensions, as in the named recipe or the released policies",
                    found=f"{name} of shape {shape}",
                    where=where,
                    next="name a recipe with this policy's head_dim: --recipe; or fetch the file again",
                )
            raise WeightsMismatchError(
                expected="the tensors that tell the architecture",
                found=f"{name} of shape {shape} instead of {len(axes)} axes" if shape else f"missing [{name!r}]",
                where=where,
                next="copy or fetch the checkpoint again; it is not complete",
            )
    return sizes


def unstack_layer(array: Array, layer: int, values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Our tensors from one layer of an array."""
    for name, part in zip(array.names[layer], values.reshape(len(array.names[layer]), *array.axes), strict=True):
        # A copy of its own, so that no two tensors share memory.
        ours = part.permute(array.permutation).clone(memory_format=torch.contiguous_format)
        yield name, ours.reshape(array.our_shape)


def stack_layer(array: Array, layer: int, state: Mapping[str, Tensor]) -> Tensor:
    """One layer of an array [(parts,) *axes] from our tensors, in their dtype."""
    ordered = [array.axes[axis] for axis in array.permutation]
    inverse = np.argsort(array.permutation).tolist()
    parts = [state[name].reshape(ordered).permute(inverse) for name in array.names[layer]]
    return torch.stack(parts).reshape(array.layer_shape)


def require_match(expected: Shapes, found: Shapes, where: str, unused: Container[str] = ()) -> None:
    """Every array accounted for.

    Raises:
        WeightsMismatchError: names that are missing, unexpected (and not `unused`) or mis-shaped; it lists all of them.
    """
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(name for name in found.keys() - expected.keys() if name not in unused)
    shapes = [f"{k} {found[k]} instead of {expected[k]}" for k in expected if k in found and found[k] != expected[k]]
    if missing or unexpected or shapes:
        raise WeightsMismatchError(
            expected=f"{len(expected)} arrays with the names and shapes of the config",
            found=f"missing {missing}; unexpected {unexpected}; mis-shaped {shapes}",
            where=where,
            next="check that the config has the type and sizes of the checkpoint, and that the copy is complete",
        )
