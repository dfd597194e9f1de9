"""Normalisation of state and actions, z-score or quantile, with the reference's epsilon.

zscore      (x - mean) / (std + 1e-6)
quantile    (x - q01) / (q99 - q01 + 1e-6) * 2 - 1        q01 -> -1, q99 -> 1
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from manipi.errors import NormStatsError
from manipi.records import from_json, json_bytes, read_json, to_json
from manipi.storage import atomic_write
from manipi.types import FieldStats, NormStats, Sample

NormMode: TypeAlias = Literal["zscore", "quantile"]
EPSILON = 1e-6


@dataclass(frozen=True)
class Normalize:
    """State and actions to the range that the model is trained in, and actions back."""

    stats: NormStats
    mode: NormMode

    def encode(self, sample: Sample) -> Sample:
        state = normalize(sample["state"], self.stats.state, self.mode)
        if "actions" not in sample:
            return {**sample, "state": state}
        return {**sample, "state": state, "actions": normalize(sample["actions"], self.stats.actions, self.mode)}

    def decode(self, actions_HA: np.ndarray, sample: Sample) -> np.ndarray:
        return unnormalize(actions_HA, self.stats.actions, self.mode)


def normalize(x: np.ndarray, stats: FieldStats, mode: NormMode) -> np.ndarray:
    """[..., dim] -> [..., dim] float32."""
    low, width = _offset_and_scale(stats, mode)
    scaled = (x - low) / width
    return (scaled * 2 - 1 if mode == "quantile" else scaled).astype(np.float32)


def unnormalize(x: np.ndarray, stats: FieldStats, mode: NormMode) -> np.ndarray:
    """The inverse of `normalize`."""
    low, width = _offset_and_scale(stats, mode)
    return (((x + 1) / 2 if mode == "quantile" else x) * width + low).astype(np.float32)


def _offset_and_scale(stats: FieldStats, mode: NormMode) -> tuple[np.ndarray, np.ndarray]:
    if mode == "zscore":
        return stats.mean, stats.std + EPSILON
    return stats.q01, stats.q99 - stats.q01 + EPSILON


def save_norm_stats(stats: NormStats, path: Path) -> None:
    """openpi's file layout (a top key `norm_stats`), with our provenance beside it under `manipi`."""
    fields = {"state": _plain(stats.state), "actions": _plain(stats.actions)}
    atomic_write(path, json_bytes({"norm_stats": fields, "manipi": stats}))


def load_norm_stats(path: Path) -> NormStats:
    """Raises NormStatsError where the file holds no statistics written by `save_norm_stats`."""
    data = read_json(path) if path.is_file() else {}
    if "manipi" not in data:
        raise NormStatsError(
            expected="norm stats with their provenance (top key 'manipi')",
            found=f"top keys {sorted(data)}" if data else "no such file",
            where=str(path),
            next="compute them: manipi stats TARGET",
        )
    return from_json(data["manipi"], (NormStats, FieldStats), str(path))


def _plain(field: FieldStats) -> dict[str, list[float]]:
    return {name: to_json(getattr(field, name)) for name in ("mean", "std", "q01", "q99")}
