"""How much arithmetic a step needs, and how much the device could do in that time: their ratio is the MFU.

Model FLOPs (PaLM, Chowdhery et al. 2022, appendix B): two for each multiply-add of a matrix product, forward and
backward, on tokens that are real; nothing for what is computed a second time, for padding, or for masks.

    part      rows per sample                     matrix products on each row
    vision    real pictures × patches             forward 1
    vlm       real image and prompt tokens        gradient of the weights 1, where these are trained
    action    state and K × H noisy actions       gradient of the input 1, where anything before it is trained
    draws     K timesteps
    prompt    π0-FAST's last layer: prompt tokens
    vocab     loss tokens of π0-FAST

Attention adds 4 · width · queries · keys per layer, and twice that backward.
"""

import re
import time
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from manipi.data.feed.loader import Batch
from manipi.model import VLA
from manipi.model.config import Pi0Config, Pi0FastConfig
from manipi.model.layers import AdaptedLinear, Linear

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""FLOP/s of dense bfloat16 matrix products with float32 sums, by the name of the GPU: NVIDIA's data sheets."""

_UPSTREAM = {"vision": (), "vlm": ("vision",), "head": (), "action": ("head", "vlm")}
_READS_DATA = ("vision.patch_embedding", "head.action_in", "head.state_in")


class ModelFlops:
    """Walks through a model's matrices once; a batch then costs a few sums.

    Args:
        model: as it will be trained: what is frozen does not require gradients.
        noise_draws: K.
    """

    def __init__(self, model: VLA, noise_draws: int):
        self._config, self._draws = model.config, noise_draws
        self._flow = not isinstance(model.config, Pi0FastConfig)
        self._learns = dict.fromkeys(_UPSTREAM, False)
        self._per_row = Counter[str]()
        for name, module in model.named_modules():
            self._visit(name, module)
        if not self._flow:
            table = model.gemma.token_embedding
            self._per_row["vocab"] = 2 * table.numel() * (2 + table.requires_grad)

    def of_batch(self, batch: Batch) -> float:
        """Model FLOPs of one update on this batch."""
        rows = self._rows(batch)
        return float(sum(self._per_row[part] * count.sum() for part, count in rows.items()) + self._attention(rows))

    def _visit(self, name: str, module: nn.Module) -> None:
        part = _part(name)
        if isinstance(module, Linear):
            first = name in _READS_DATA or (name == "head.time_mlp_in" and not isinstance(self._config, Pi0Config))
            needed = not first and any(self._learns[p] for p in (part, *_UPSTREAM[part]))
            for size, trained in _matrices(module):
                self._per_row[self._rows_of(name, part)] += 2 * size * (1 + trained + needed)
        if part:
            self._learns[part] |= any(p.requires_grad for p in module.parameters(recurse=False))

    def _is_read_out(self, name: str) -> bool:
        """Whether it makes the language model's outputs: its last layer, but for what others read, keys and values."""
        last = f"gemma.blocks.{self._config.vlm.depth - 1}.experts.vlm."
        return name.startswith(last) and not name.endswith((".k_proj", ".v_proj"))

    def _rows_of(self, name: str, part: str) -> str:
        if self._is_read_out(name):
            return "nobody" if self._flow else "prompt"
        if name.endswith("modulation") or (name.startswith("head.time") and not isinstance(self._config, Pi0Config)):
            return "draws"
        if part == "head":
            return "state" if name.endswith("state_in") else "noisy"
        return part

    def _rows(self, batch: Batch) -> dict[str, np.ndarray]:
        """Per part the rows of each sample [B]."""
        pictures, prompt = batch["image_valid"].sum(1), batch["token_valid"].sum(1)
        image_tokens = pictures * self._config.vision.num_tokens
        if not self._flow:
            # The last slot predicts nothing and is left out.
            prompt = np.minimum(prompt, batch["token_valid"].shape[1] - 1)
            read = {"prompt": prompt, "vocab": batch["token_loss"][:, 1:].sum(1)}
            return {"vision": image_tokens, "vlm": image_tokens + prompt, **read}
        ones, noisy = np.ones_like(prompt), np.full_like(prompt, self._draws * self._config.action_horizon)
        state = ones * isinstance(self._config, Pi0Config)
        suffix = {"action": noisy + state, "noisy": noisy, "state": state, "draws": ones * self._draws}
        return {"vision": image_tokens, "vlm": image_tokens + prompt, **suffix}

    def _attention(self, rows: dict[str, np.ndarray]) -> float:
        vision, vlm = self._config.vision, self._config.vlm
        width, prefix = vlm.num_heads * vlm.head_dim, rows["vlm"].astype(float)
        passes = {part: 3 if self._learns[part] or self._learns["vision"] else 1 for part in ("vision", "vlm")}
        total = vision.depth * vision.width * passes["vision"] * (rows["vision"] * vision.num_tokens).sum()
        read_out = 0 if self._flow else rows["prompt"]
        total += width * passes["vlm"] * (((vlm.depth - 1) * prefix + read_out) * prefix).sum()
        if self._flow:
            total += vlm.depth * width * 3 * (rows["action"] * (prefix + rows["action"])).sum()
        return 4 * total


def _part(name: str) -> str:
    expert = re.search(r"gemma\.(?:blocks\.\d+\.experts|final_norms)\.(\w+)", name)
    if expert:
        return expert[1]
    top = name.partition(".")[0]
    return "vlm" if top == "gemma" else top


def _matrices(layer: Linear) -> Iterator[tuple[int, bool]]:
    """Multiply-adds per row of each matrix of a layer, and whether it is trained."""
    weight = getattr(layer, "weight", None)  # in 4 bits there is none
    yield layer.in_features * layer.out_features, weight is not None and weight.requires_grad
    if isinstance(layer, AdaptedLinear):
        yield layer.lora_a.numel(), layer.lora_a.requires_grad
        shared = 1 if layer.per_head else layer.num_heads
        yield layer.lora_b.numel() // shared, layer.lora_b.requires_grad


# The device ----------------------------------------------------------------------------------------------------------


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of matrix products: a GPU's by `PEAKS`, a processor's as measured here. None where it is not known."""
    if device.type == "cpu":
        return _measured_peak(dtype, torch.get_num_threads())
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return listed_peak(torch.cuda.get_device_name(device))


def listed_peak(name: str) -> float | None:
    """`NVIDIA A100-SXM4-80GB` is an A100; an A10G and a laptop's RTX 4090 are other chips."""
    found = [key for key in PEAKS if re.search(rf"\b{key}\b", name)] if "Laptop" not in name else []
    return PEAKS[max(found, key=len)] if found else None


@lru_cache
def _measured_peak(dtype: torch.dtype, num_threads: int) -> float:
    """The best of a few products of square matrices, in about a tenth of a second."""
    n, seconds = 512, []
    a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
    for _ in range(4):
        began = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)
