"""Norm stats as a picture: how the values of each dimension are spread, and where q01 and q99 lie."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from manipi.data.norm_stats.sketch import NormStatsSketch, Sketch
from manipi.storage import atomic_write
from manipi.types import NormStats

BARS = 60
VALUES, EDGES, WIDENED, CONSTANT, INK = "#0b6e99", "#444444", "#d9622b", "#b9b9b9", "#222222"


def plot_stats(
    sketch: NormStatsSketch,
    stats: NormStats,
    names: tuple[Sequence[str], Sequence[str]],
    path: Path,
    *,
    raw: NormStats | None = None,
) -> None:
    """One histogram per dimension, on a linear axis a little wider than q01 to q99, as a PNG.

    Args:
        names: of the state's and of the actions' dimensions.
        raw: the statistics before a floor widened them; what differs is drawn in another colour.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    rows = [math.ceil(len(some) / 7) for some in names]
    figure = plt.figure(figsize=(14, 1.55 * sum(rows) + 0.6 * len(rows) + 0.5), dpi=110, layout="constrained")
    before = raw or stats
    fields = (
        ("state", sketch.state, stats.state, before.state),
        ("actions, as the model sees them", sketch.actions, stats.actions, before.actions),
    )
    panels = figure.subfigures(len(fields), 1, height_ratios=[r + 0.5 for r in rows], squeeze=False)[:, 0]
    for panel, (title, sketches, field, old), labels, count in zip(panels, fields, names, rows, strict=True):
        panel.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
        axes = panel.subplots(max(count, 1), 7, squeeze=False).ravel()
        for axis in axes[len(labels) :]:
            axis.axis("off")
        for d, (axis, one) in enumerate(zip(axes, sketches, strict=False)):
            widened = field.q01[d] != old.q01[d] or field.q99[d] != old.q99[d]
            _draw(axis, one, (float(field.q01[d]), float(field.q99[d])), WIDENED if widened else EDGES)
            axis.set_title(
                f"{d} · {_short(labels[d])}", fontsize=8, loc="left", color=WIDENED if widened else INK, pad=3
            )
    legend = [Line2D([], [], color=EDGES, linestyle="--", label="q01 and q99")]
    if raw is not None:
        legend.append(Line2D([], [], color=WIDENED, linestyle="--", label="widened to the floor"))
    figure.legend(handles=legend, loc="upper right", ncols=len(legend), fontsize=9, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    atomic_write(path, buffer.getvalue())


def _draw(axis, sketch: Sketch, edges: tuple[float, float], color: str) -> None:  # noqa: ANN001  matplotlib has no types
    q01, q99 = edges
    never_moves = sketch.low == sketch.high
    margin = 0.15 * (q99 - q01) or max(0.1 * abs(q01), 1e-3)
    low, high = q01 - margin, q99 + margin
    heights = _bars(sketch, low, high)
    lefts = np.linspace(low, high, BARS, endpoint=False)
    axis.bar(lefts, heights, (high - low) / BARS, align="edge", color=CONSTANT if never_moves else VALUES)
    for edge in edges:
        axis.axvline(edge, color=color, linewidth=1, linestyle="--")
    beyond = [f"◂ {sketch.low:.3g}"] * (sketch.low < low) + [f"{sketch.high:.3g} ▸"] * (sketch.high > high)
    axis.set_xlabel("   ".join(beyond), fontsize=6, color=EDGES, labelpad=1)
    axis.set(xlim=(low, high), ylim=(0, heights.max() * 1.12 or 1), yticks=[])
    axis.set_xticks([q01, q99] if q99 > q01 else [q01])
    axis.set_xticklabels([f"{x:.3g}" for x in axis.get_xticks()], fontsize=7)
    axis.tick_params(length=2, color=EDGES, pad=2)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _bars(sketch: Sketch, low: float, high: float) -> np.ndarray:
    """Counts in `BARS` equal parts of [low, high); a bin is spread over the parts that it covers."""
    width = 2.0**sketch.exponent
    edges = (sketch.first + np.arange(len(sketch.counts) + 1)) * width
    below = np.interp(np.linspace(low, high, BARS + 1), edges, np.concatenate([[0], np.cumsum(sketch.counts)]))
    return np.diff(below)


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:9]}…{name[-12:]}"
