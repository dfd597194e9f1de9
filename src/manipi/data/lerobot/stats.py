"""The statistics that LeRobot v3.0 keeps with every episode and with the dataset. Training does not use them."""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from jaxtyping import UInt8

_PICTURES = 8
"""Pictures per episode that the image statistics look at."""
_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

EpisodeStats: TypeAlias = dict[str, np.ndarray]
"""min, max, mean, std, count and five quantiles: [d] of a vector, [3, 1, 1] of pictures, in 0…1."""


def vector_stats(columns: Mapping[str, np.ndarray]) -> dict[str, EpisodeStats]:
    """Exact statistics of every column [T, d] of one episode."""
    # All columns at once: NumPy's fixed cost per call is what counts at the length of an episode.
    values = np.concatenate([values.astype(np.float64) for values in columns.values()], axis=1)
    parts = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    parts |= dict(zip(_QUANTILES, np.quantile(values, list(_QUANTILES.values()), axis=0), strict=True))
    stats, start = {}, 0
    for key, column in columns.items():
        end = start + column.shape[1]
        stats[key] = {name: part[start:end] for name, part in parts.items()} | {"count": np.array([len(values)])}
        if column.dtype.kind != "f":
            stats[key] |= {name: stats[key][name].astype(np.int64) for name in ("min", "max")}
        start = end
    return stats


def chosen_pictures(length: int) -> list[int]:
    """The few frames of an episode whose pictures the image statistics look at."""
    return np.linspace(0, length - 1, min(length, _PICTURES)).astype(int).tolist()


def image_stats(chosen: UInt8[np.ndarray, "n h w 3"]) -> EpisodeStats:
    """From a histogram of a few pictures; exact for those."""
    levels = np.arange(256) / 255
    weights = np.stack([np.bincount(chosen[..., c].ravel(), minlength=256) for c in range(3)]) / chosen[..., 0].size
    mean = weights @ levels
    cumulative = weights.cumsum(axis=1)
    stats = {"min": levels[(weights > 0).argmax(1)], "max": levels[255 - (weights[:, ::-1] > 0).argmax(1)]}
    stats |= {"mean": mean, "std": np.sqrt(np.maximum(weights @ levels**2 - mean**2, 0))}
    stats |= {name: levels[(cumulative >= q).argmax(1)] for name, q in _QUANTILES.items()}
    return {name: value.reshape(3, 1, 1) for name, value in stats.items()} | {"count": np.array([len(chosen)])}


def merge(a: EpisodeStats, b: EpisodeStats) -> EpisodeStats:
    """Statistics of both together. Quantiles are averaged by count, as lerobot does, and so only indicative."""
    count = a["count"] + b["count"]
    share = b["count"] / count
    merged = {name: a[name] + (b[name] - a[name]) * share for name in ("mean", *_QUANTILES)}
    variance = a["std"] ** 2 * (1 - share) + b["std"] ** 2 * share + (b["mean"] - a["mean"]) ** 2 * share * (1 - share)
    merged |= {"min": np.minimum(a["min"], b["min"]), "max": np.maximum(a["max"], b["max"])}
    return merged | {"std": np.sqrt(variance), "count": count}
