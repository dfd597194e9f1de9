"""Normalisation of state and actions, z-score or quantile, with the reference's epsilon.

zscore      (x - mean) / (std + 1e-6)
quantile    (x - q01) / (q99 - q01 + 1e-6) * 2 - 1        q01 -> -1, q99 -> 1
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from manipi.errors import NormStatsError, shown
from manipi.model.config import NormMode
from manipi.records import fingerprint, from_json, json_bytes, read_json, to_json
from manipi.robots.robot import Robot
from manipi.storage import atomic_write
from manipi.types import FieldStats, NormStats, Sample

EPSILON = 1e-6


@dataclass(frozen=True)
class Normalize:
    """State and actions to the range that the model is trained in, and actions back.

    Raises NormStatsError where the mode is quantile and the statistics were imported without quantiles.
    """

    stats: NormStats
    mode: NormMode

    def __post_init__(self) -> None:
        fields = (self.stats.state, self.stats.actions)
        if self.mode == "quantile" and not all(np.isfinite([*f.q01, *f.q99]).all() for f in fields):
            raise NormStatsError(
                expected="q01 and q99 for quantile normalisation",
                found="statistics without them",
                where="norm stats",
                next="use norm_mode='zscore', or compute them: manipi stats TARGET",
            )

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


def contract(robot: Robot, action_horizon: int) -> str:
    """Fingerprint of what norm stats depend on, apart from the data."""
    return fingerprint([robot.contract(), action_horizon])


def save_norm_stats(stats: NormStats, path: Path) -> None:
    """openpi's file layout (a top key `norm_stats`), with our provenance beside it under `manipi`."""
    fields = {"state": _plain(stats.state), "actions": _plain(stats.actions)}
    atomic_write(path, json_bytes({"norm_stats": fields, "manipi": stats}))


def load_norm_stats(path: Path) -> NormStats:
    """Raises NormStatsError where the file holds no statistics written by `save_norm_stats`."""
    data = _read_object(path)
    if not isinstance(data.get("manipi"), dict):
        raise NormStatsError(
            expected="norm stats with their provenance (top key 'manipi')",
            found=f"top keys {shown(sorted(data))}" if data else "no such file, or nothing in it",
            where=str(path),
            next="compute them: manipi stats TARGET",
        )
    # Files of before statistics knew their rows lack these.
    return from_json({"rows": "", **data["manipi"]}, (NormStats, FieldStats), str(path))


def _plain(field: FieldStats) -> dict[str, list[float] | None]:
    vectors = {name: getattr(field, name) for name in ("mean", "std", "q01", "q99")}
    return {name: to_json(x) if np.isfinite(x).all() else None for name, x in vectors.items()}


def read_openpi_stats(path: Path, robot: Robot, action_horizon: int) -> NormStats:
    """The statistics of an openpi checkpoint, `assets/<asset id>/norm_stats.json`, for this robot; ours as they are.

    Raises:
        NormStatsError: no such file, not openpi's layout, or as `stats_from_fields` says.
    """
    data = _read_object(path)
    if "manipi" in data:
        return load_norm_stats(path)
    found = data.get("norm_stats")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), dict) for name in ("state", "actions")):
        keys = shown(sorted(found) if isinstance(found, dict) else sorted(data))
        raise _unusable(
            "a key 'norm_stats' with 'state' and 'actions'", f"keys {keys}" if data else "no such file", str(path)
        )
    return stats_from_fields(found, robot, action_horizon, str(path))


def stats_from_fields(found: dict[str, dict], robot: Robot, action_horizon: int, where: str) -> NormStats:
    """Statistics that another project computed: `mean`, `std`, `q01` and `q99` of `state` and `actions`.

    openpi pads them to the model's width: they are cut to the robot's. Without extremes, `min` and `max` are the
    quantiles, or three deviations from the mean; absent quantiles are NaN, which `Normalize` refuses. It is not
    known behind which conversions they were computed: that the robot's are the same is for the caller to see to.

    Raises:
        NormStatsError: fewer dimensions than the robot has, or impossible numbers.
    """
    return NormStats(
        state=_read_field(found["state"], robot.state_size, f"{where}, state"),
        actions=_read_field(found["actions"], robot.model_action_size, f"{where}, actions"),
        num_frames=0,
        contract=contract(robot, action_horizon),
        data="",
    )


def _read_object(path: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    data = read_json(path) if path.is_file() else {}
    if not isinstance(data, dict):
        raise _unusable("an object with the key 'norm_stats'", shown(data), str(path))
    return data


def _read_field(recorded: dict, size: int, where: str) -> FieldStats:
    def read(name: str) -> np.ndarray:
        values = recorded.get(name)
        if values is None and name in ("q01", "q99"):
            return np.full(size, np.nan)
        try:
            vector = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError):
            vector = np.zeros(0)
        if vector.ndim != 1 or len(vector) < size or not np.isfinite(vector[:size]).all():
            raise _unusable(f"{name!r} with at least {size} finite numbers", shown(values), where)
        return vector[:size]

    mean, std, q01, q99 = map(read, ("mean", "std", "q01", "q99"))
    if (std < 0).any() or (q99 < q01).any() or (size and not std.any()):
        raise _unusable(
            "deviations above 0, and q01 below q99", f"std {shown(std)}, q01 {shown(q01)}, q99 {shown(q99)}", where
        )
    low, high = np.where(np.isnan(q01), mean - 3 * std, q01), np.where(np.isnan(q99), mean + 3 * std, q99)
    return FieldStats(mean, std, q01, q99, low, high)


def _unusable(expected: str, found: str, where: str) -> NormStatsError:
    return NormStatsError(
        expected=expected,
        found=found,
        where=where,
        next="name the statistics of this robot, or compute them: manipi stats",
    )
