"""FSQ: action chunks as a fixed number of codes, by a small attention network (a baseline of Pertsch et al. 2025).

    actions [H, A]  ──proj──▶  [H, D]  ──encoder: T queries attend──▶  [T, D]  ──down, tanh, round──▶  T codes
    actions [H, A]  ◀──mean, × scale──  [H, D]  ◀──decoder: H queries attend──  [T, D]  ◀──up──  two digits per code

Finite scalar quantisation (Mentzer et al. 2023) rounds instead of searching a codebook. The network is inference only,
float32, and repeats the reference number by number; tensors have the reference's names, as the released tokenizer of
DROID stores them. Shape letters: H action horizon, A action dimensions, T codes per chunk, D width, N attention heads,
K head width, Q queries, S what they attend to, E dimensions of the state.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Float32
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from manipi.errors import TokenizerError, WeightsMismatchError
from manipi.tokenizers.actions import ActionTokenizer, require_finite

FSQ_CONFIG_FILE, _WEIGHTS_FILE = "fsq.json", "fsq.safetensors"
_CODEBOOK_SIZES = tuple(2**bits for bits in (8, 10, 12, 14, 16))
_HEAD_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class FsqConfig:
    """Sizes of the network, under the names of the released tokenizer's config."""

    embed_dim: int
    data_dim: int
    data_horizon: int
    num_tokens: int
    """Codes per chunk."""
    num_layers: int
    """Of the encoder, and of the decoder."""
    target_codebook_size: int
    causal: bool = False
    mlp_ratio: float = 2.0
    bound: float | None = None
    """Actions are clipped to ± this before encoding."""
    use_state_conditioning: bool = False
    """Whether encoder and decoder also see a state."""

    def __post_init__(self) -> None:
        heads = self.embed_dim // _HEAD_WIDTH
        if self.target_codebook_size not in _CODEBOOK_SIZES or heads == 0 or self.embed_dim % heads:
            raise TokenizerError(
                expected=f"a codebook of {_CODEBOOK_SIZES} codes, and heads of at least {_HEAD_WIDTH} dimensions",
                found=f"target_codebook_size {self.target_codebook_size}, embed_dim {self.embed_dim}",
                where="FSQ config",
                next="use the config that the tokenizer was trained with",
            )

    @property
    def digit_bins(self) -> int:
        """Values of each of the two digits of a code."""
        return math.isqrt(self.target_codebook_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class FsqTokenizer(ActionTokenizer):
    """An FSQ codec. Build it with `from_tree`, which checks every tensor; `sha256` says whether two are the same."""

    kind: ClassVar[str] = "FSQ"
    config: FsqConfig
    arrays: Mapping[str, Float32[np.ndarray, "..."]] = field(repr=False)
    """By path in the parameter tree, such as `encoder/CrossAttentionLayer_0/Dense_0/kernel`."""

    @staticmethod
    def from_tree(arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> "FsqTokenizer":
        """The tokenizer of a parameter tree, flattened with "/", and of the config stored beside it.

        Raises:
            TokenizerError: the config has other fields, or values that cannot be.
            WeightsMismatchError: tensors are missing, unexpected, mis-shaped or not finite; it lists them all.
        """
        try:
            sizes = FsqConfig(**config)
        except TypeError as error:
            raise TokenizerError(
                expected=f"an FSQ config: {', '.join(f.name for f in dataclasses.fields(FsqConfig))}",
                found=str(error),
                where="FSQ config",
                next="use the config that lies beside the tokenizer's tensors",
            ) from error
        state = np.shape(arrays.get("encoder/state_proj/kernel", ()))
        shapes = tensor_shapes(sizes, state[0] if state else 0)
        problems = [f"missing {name}" for name in sorted(shapes.keys() - arrays.keys())]
        problems += [f"unexpected {name}" for name in sorted(arrays.keys() - shapes.keys())]
        for name in sorted(shapes.keys() & arrays.keys()):
            if np.shape(arrays[name]) != shapes[name]:
                problems.append(f"{name} of shape {np.shape(arrays[name])} instead of {shapes[name]}")
            elif not np.isfinite(np.asarray(arrays[name], np.float32)).all():
                problems.append(f"{name} with numbers that are not finite")
        if problems:
            raise WeightsMismatchError(
                expected=f"the {len(shapes)} tensors of an FSQ tokenizer of this config",
                found="; ".join(problems),
                where="FSQ tokenizer",
                next="use tensors and config of the same checkpoint",
            )
        as_float32 = {name: np.asarray(arrays[name], np.float32) for name in sorted(arrays)}
        return FsqTokenizer(config=sizes, arrays=as_float32)

    @property
    def vocab_size(self) -> int:
        # The reference's property of this name multiplies other bins, and is below its own largest code.
        return self.config.target_codebook_size

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.config), sort_keys=True).encode())
        for name, array in self.arrays.items():
            digest.update(f"{name} {array.shape}".encode() + array.tobytes())
        return digest.hexdigest()

    def num_units(self, horizon: int, action_dim: int) -> int:
        """Raises TokenizerError for any other chunk shape than the one of the training."""
        if (horizon, action_dim) != (self.config.data_horizon, self.config.data_dim):
            raise TokenizerError(
                expected=f"chunks of {self.config.data_horizon} x {self.config.data_dim} numbers",
                found=f"{horizon} x {action_dim}",
                where="FSQ tokenizer",
                next="set the model's action_horizon to the tokenizer's, or use another action tokenizer",
            )
        return self.config.num_tokens

    def encode(self, actions_HA: Float[np.ndarray, "H A"], state_E: Float[np.ndarray, "E"] | None = None) -> list[int]:
        """A chunk of normalised actions to `num_tokens` codes.

        Args:
            state_E: for tokenizers with state conditioning only.

        Raises:
            TokenizerError: another shape, a number that is not finite, or a state missing or superfluous.
        """
        if np.ndim(actions_HA) != 2:
            raise ValueError(f"actions [H, A], not {np.shape(actions_HA)}")
        self.num_units(*np.shape(actions_HA))
        require_finite(actions_HA, what="actions for the FSQ tokenizer [time, dimension]")
        x_HA, bound = np.asarray(actions_HA, np.float32), self.config.bound
        if bound is not None:
            x_HA = x_HA.clip(-bound, bound)
        x_TD = self._attend("encoder", self._dense(x_HA, "proj"), state_E)
        z_T2 = np.tanh(self._dense(x_TD, "codebook/proj_down"))
        digits_T2 = np.rint((z_T2 + 1) * (self.config.digit_bins - 1) / 2).astype(np.int64)
        return (digits_T2 @ [1, self.config.digit_bins]).tolist()

    def decode(
        self, codes: Sequence[int], horizon: int, action_dim: int, state_E: Float[np.ndarray, "E"] | None = None
    ) -> Float32[np.ndarray, "H A"]:
        """Codes to a chunk of normalised actions; `state_E` as in `encode`.

        Raises:
            TokenizerError: not exactly `num_tokens` codes, one that does not exist, another shape, or a wrong state.
        """
        wanted, codes_T = self.num_units(horizon, action_dim), np.asarray(codes, np.int64)
        if codes_T.size != wanted or np.any((codes_T < 0) | (codes_T >= self.vocab_size)):
            raise TokenizerError(
                expected=f"{wanted} codes from 0 to {self.vocab_size - 1}",
                found=f"{codes_T.size} codes" + (f" from {codes_T.min()} to {codes_T.max()}" if codes_T.size else ""),
                where="FSQ decoding of an action chunk",
                next="decode with CodeConstraint, and check the FSQ tokenizer's hash",
            )
        bins = self.config.digit_bins
        digits_T2 = np.stack([codes_T % bins, codes_T // bins], axis=-1).astype(np.float32)
        x_TD = self._dense(digits_T2 / np.float32(bins - 1) * 2 - 1, "codebook/proj_up")
        return self._dense(self._attend("decoder", x_TD, state_E), "proj_mean") * self.arrays["out_scale"]

    def _attend(
        self, name: str, y_SD: Float32[np.ndarray, "S D"], state_E: Float[np.ndarray, "E"] | None
    ) -> Float32[np.ndarray, "Q D"]:
        """Learned queries that look at `y_SD`, and at the state as one more row of it."""
        if (state_E is not None) != self.config.use_state_conditioning:
            raise TokenizerError(
                expected="a state" if state_E is None else "no state: the network has no place for it",
                found="none" if state_E is None else f"one of {np.size(state_E)} dimensions",
                where=f"FSQ tokenizer with use_state_conditioning={self.config.use_state_conditioning}",
                next="pass the state exactly where the tokenizer was trained with one",
            )
        if state_E is not None:
            state_1D = self._dense(np.asarray(state_E, np.float32)[None], f"{name}/state_proj")
            y_SD = np.concatenate([y_SD, state_1D])
        y_SD = y_SD + self.arrays[f"{name}/y_pos_enc"]
        x_QD = self.arrays[f"{name}/q_embed"]
        for layer in range(self.config.num_layers):
            x_QD = self._layer(f"{name}/CrossAttentionLayer_{layer}", x_QD, y_SD)
        return x_QD

    def _layer(
        self, name: str, x_QD: Float32[np.ndarray, "Q D"], y_SD: Float32[np.ndarray, "S D"]
    ) -> Float32[np.ndarray, "Q D"]:
        num_q, num_s = len(x_QD), len(y_SD)
        self_QQ, cross_QS = np.ones((num_q, num_q), bool), np.ones((num_q, num_s), bool)
        if self.config.causal:
            self_QQ = np.tril(self_QQ)
            # The reference means to compare positions, but compares the first feature of what stands there.
            steps_Q, steps_S = x_QD[:, 0] // max(num_s // num_q, 1), y_SD[:, 0] // max(num_q // num_s, 1)
            cross_QS = steps_Q[:, None] >= steps_S
        normed_QD = self._norm(x_QD, f"{name}/LayerNorm_0")
        x_QD = x_QD + self._attention(f"{name}/MultiHeadDotProductAttention_0", normed_QD, normed_QD, self_QQ)
        normed_QD = self._norm(x_QD, f"{name}/LayerNorm_1")
        x_QD = x_QD + self._attention(f"{name}/MultiHeadDotProductAttention_1", normed_QD, y_SD, cross_QS)
        hidden = self._dense(self._norm(x_QD, f"{name}/LayerNorm_2"), f"{name}/Dense_0")
        value, gate = np.split(self._dense(hidden, f"{name}/GeGLU_0/Dense_0"), 2, axis=-1)
        return x_QD + self._dense(value * _gelu(gate), f"{name}/Dense_1")

    def _attention(
        self,
        name: str,
        x_QD: Float32[np.ndarray, "Q D"],
        y_SD: Float32[np.ndarray, "S D"],
        mask_QS: Bool[np.ndarray, "Q S"],
    ) -> Float32[np.ndarray, "Q D"]:
        q_QNK, k_SNK, v_SNK = (self._dense(x, f"{name}/{part}") for x, part in
                               ((x_QD, "query"), (y_SD, "key"), (y_SD, "value")))  # fmt: skip
        logits_NQS = np.einsum("qnk,snk->nqs", q_QNK / np.sqrt(np.float32(q_QNK.shape[-1])), k_SNK)
        # A row that may see nothing sees everything alike, because the lowest number is finite.
        logits_NQS = np.where(mask_QS, logits_NQS, np.finfo(np.float32).min)
        weights_NQS = np.exp(logits_NQS - logits_NQS.max(-1, keepdims=True))
        weights_NQS /= weights_NQS.sum(-1, keepdims=True)
        return self._dense(np.einsum("nqs,snk->qnk", weights_NQS, v_SNK), f"{name}/out", axes=2)

    def _dense(self, x: Float32[np.ndarray, "..."], name: str, axes: int = 1) -> Float32[np.ndarray, "..."]:
        return np.tensordot(x, self.arrays[f"{name}/kernel"], axes) + self.arrays[f"{name}/bias"]

    def _norm(self, x_QD: Float32[np.ndarray, "Q D"], name: str) -> Float32[np.ndarray, "Q D"]:
        mean_Q1 = x_QD.mean(-1, keepdims=True)
        variance_Q1 = np.maximum(np.square(x_QD).mean(-1, keepdims=True) - np.square(mean_Q1), 0)
        scale_QD = self.arrays[f"{name}/scale"] / np.sqrt(variance_Q1 + np.float32(1e-6))
        return (x_QD - mean_Q1) * scale_QD + self.arrays[f"{name}/bias"]

    def save(self, directory: str | Path) -> None:
        """Write config and tensors into an existing directory, for `load`."""
        (Path(directory) / FSQ_CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(self.config), indent=2))
        save_file(dict(self.arrays), Path(directory) / _WEIGHTS_FILE)

    @staticmethod
    def load(directory: str | Path) -> "FsqTokenizer":
        """Raises TokenizerError where a file is missing or broken, WeightsMismatchError as `from_tree` does."""
        try:
            config = json.loads((Path(directory) / FSQ_CONFIG_FILE).read_text())
            arrays = load_file(Path(directory) / _WEIGHTS_FILE)
        except (OSError, ValueError, SafetensorError) as error:
            raise TokenizerError(
                expected=f"an FSQ tokenizer: {FSQ_CONFIG_FILE} and {_WEIGHTS_FILE}",
                found=repr(error),
                where=str(directory),
                next="name the directory of an FSQ tokenizer that was saved",
            ) from error
        return FsqTokenizer.from_tree(arrays, config)


def _gelu(x: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """The tanh form."""
    return x * (0.5 * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + 0.044715 * x**3))))


def tensor_shapes(c: FsqConfig, state_dim: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the network by path; `state_dim` counts where a state is seen."""
    shapes: dict[str, tuple[int, ...]] = {"out_scale": ()}
    width, heads, hidden = c.embed_dim, c.embed_dim // _HEAD_WIDTH, int(c.embed_dim * c.mlp_ratio)

    def dense(name: str, *kernel: int, inputs: int = 1) -> None:
        shapes[f"{name}/kernel"], shapes[f"{name}/bias"] = kernel, kernel[inputs:]

    dense("proj", c.data_dim, width)
    dense("codebook/proj_down", width, 2)
    dense("codebook/proj_up", 2, width)
    dense("proj_mean", width, c.data_dim)
    for part, num_q, num_s in (("encoder", c.num_tokens, c.data_horizon), ("decoder", c.data_horizon, c.num_tokens)):
        shapes[f"{part}/q_embed"] = (num_q, width)
        shapes[f"{part}/y_pos_enc"] = (num_s + c.use_state_conditioning, width)
        if c.use_state_conditioning:
            dense(f"{part}/state_proj", state_dim, width)
        for layer in (f"{part}/CrossAttentionLayer_{i}" for i in range(c.num_layers)):
            for norm in (f"{layer}/LayerNorm_{i}" for i in range(3)):
                shapes[f"{norm}/scale"] = shapes[f"{norm}/bias"] = (width,)
            for attention in (f"{layer}/MultiHeadDotProductAttention_{i}" for i in range(2)):
                for projection in ("query", "key", "value"):
                    dense(f"{attention}/{projection}", width, heads, width // heads)
                dense(f"{attention}/out", heads, width // heads, width, inputs=2)
            dense(f"{layer}/Dense_0", width, hidden)
            dense(f"{layer}/GeGLU_0/Dense_0", hidden, 2 * hidden)
            dense(f"{layer}/Dense_1", hidden, width)
    return shapes
