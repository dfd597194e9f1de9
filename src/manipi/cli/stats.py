"""`manipi stats`: norm stats of a recipe's training data, the dimensions to look at, and a FAST tokenizer for it."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from manipi.cli.arguments import NewFile, NewFolder, parse, table, write_result
from manipi.errors import ConfigError
from manipi.recipes.registry import load_recipe
from manipi.robots.robot import Robot
from manipi.train.config import TrainConfig

if TYPE_CHECKING:
    from manipi.data.dataset import Dataset
    from manipi.data.norm_stats import NormStatsSketch
    from manipi.tokenizers.fast import ReconstructionReport
    from manipi.types import FieldStats, NormStats

BARS = 60
VALUES, EDGES, WIDENED, CONSTANT, INK = "#0b6e99", "#444444", "#d9622b", "#b9b9b9", "#222222"
"""Colours of the picture: bars, lines, what a floor widened, bars of what never moves, and text."""


@dataclass(frozen=True, kw_only=True)
class _Stats:
    """Compute the norm stats of a recipe's training episodes, and name suspicious dimensions. No picture is read.

    manipi stats tabletop --out norm_stats.json

    manipi stats my_robot.py:my_recipe --plot stats.png

    manipi stats my_robot.py:my_recipe --min-range 0.01 actions[13]=0.05 --out norm_stats.json

    manipi stats my_robot.py:my_recipe --fit-fast fast_tokenizer
    """

    target: tyro.conf.Positional[str]
    """A recipe, or path/to/file.py:function."""
    out: NewFile | None = None
    """Save them here, in openpi's layout."""
    plot: NewFile | None = None
    """Draw a histogram of every dimension, with q01 and q99, into this PNG."""
    per_step: bool = False
    """Also take the actions at each step of the chunk apart (of a mixture's first dataset); in full in --json."""
    min_range: tuple[str, ...] = ()
    """Widen dimensions with q01 and q99 closer than this, in their own units: a number for all, NAME=NUMBER for one."""
    workers: int = 0
    """Threads; 0: one per processor. The result does not depend on it."""
    ray: bool = False
    """Work on the Ray cluster that this process belongs to, or on one started here."""
    sketch: NewFile | None = None
    """Save what statistics of several datasets or machines can be merged from (manipi.data.norm_stats)."""
    fit_fast: NewFolder | None = None
    """Fit FAST to the normalised chunks (of a mixture's first dataset), save it in this folder, say what it loses."""
    fast_scale: float = 10
    """Finer is more exact and costs more codes."""
    fast_codes: int = 1024
    """Most codes to learn."""
    json: NewFile | None = None
    """Write statistics, suspicious dimensions and the report on FAST to this file."""


def main(arguments: Sequence[str]) -> None:
    """Print the statistics."""
    args = parse(_Stats, arguments, "stats")

    import numpy as np

    from manipi.data import norm_stats
    from manipi.data.dataset import action_labels, state_labels
    from manipi.storage import atomic_directory
    from manipi.tokenizers import FastTokenizer
    from manipi.train.data import chunks_to_fit, open_demonstrations
    from manipi.transforms.normalize import save_norm_stats

    config, floors = load_recipe(args.target), _floors(args.min_range)
    robot, horizon = config.robot, config.model.action_horizon
    sets = [one for one in open_demonstrations(config) if one.robot.name == robot.name]
    workers = norm_stats.Workers(threads=args.workers, ray=args.ray)
    wanted = [(one.dataset, one.robot, one.rows) for one in sets]
    bins = args.plot is not None or args.sketch is not None
    sketch = norm_stats.sketch_norm_stats(wanted, horizon, workers=workers, bins=bins)
    raw = sketch.stats()
    stats = norm_stats.with_min_range(raw, floors)
    first = (sets[0].dataset, robot, horizon, sets[0].rows)
    per_step = norm_stats.per_step_stats(*first, workers=workers) if args.per_step else None
    limits = [note for one in sets for note in norm_stats.beyond_limits(one.dataset, robot, one.rows)]
    notes = [*norm_stats.suspicious_dimensions(raw), *limits]
    widened = norm_stats.widened_dimensions(raw, stats)
    labels = state_labels(robot, sets[0].dataset), action_labels(robot, sets[0].dataset)
    places = ", ".join(str(one.dataset.root) for one in sets)
    tables = stats_table(stats, robot, sets[0].dataset)
    print(f"{stats.num_frames:,} frames of training episodes in {places}\n\n{tables}\n")
    print("suspicious\n" + "\n".join(f"  {note}" for note in notes) if notes else "nothing suspicious")
    if widened:
        print("\nwidened\n" + "\n".join(f"  {note}" for note in widened))
    if per_step is not None:
        print(f"\nq01 to q99 at each step of the chunk\n\n{_per_step_table(per_step, labels[1])}")
    if args.out is not None:
        save_norm_stats(stats, args.out)
        print(f"\nsaved  {args.out}")
    if args.sketch is not None:
        sketch.save(args.sketch)
        print(f"\nsaved  {args.sketch}")
    if args.plot is not None:
        _plot(sketch, stats, labels, args.plot, raw=raw if floors else None)
        print(f"\nsaved  {args.plot}")
    report = None
    if args.fit_fast is not None:
        import numpy as np

        chunks = np.concatenate(chunks_to_fit(config, sets, {robot.name: stats}))
        tokenizer = FastTokenizer.fit(chunks, scale=args.fast_scale, vocab_size=args.fast_codes)
        report = tokenizer.reconstruction_report(chunks)
        with atomic_directory(args.fit_fast) as folder:
            tokenizer.save(folder)
        print(f"\nFAST with {tokenizer.vocab_size:,} codes, on {len(chunks):,} chunks\n")
        print(f"{_report_table(report, stats, config, labels[1])}\n\nsaved  {args.fit_fast}")
    answer = {"stats": stats, "suspicious": notes, "widened": widened, "per_step": per_step, "fast": report}
    write_result(answer, args.json)


def _floors(texts: Sequence[str]) -> dict[str, float]:
    """["0.01", "actions[13]=0.05"] -> {"": 0.01, "actions[13]": 0.05}."""
    floors = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            floors[name] = float(number)
        except ValueError as error:
            raise ConfigError(
                expected="a number, or NAME=NUMBER as in actions[13]=0.05",
                found=repr(text),
                where="--min-range",
                next="manipi stats TARGET  # lists the names",
            ) from error
    return floors


def _per_step_table(field: "FieldStats", labels: Sequence[str]) -> str:
    """At most six steps of the chunk, evenly spread; the first and the last among them."""
    import numpy as np

    steps = sorted(set(np.linspace(0, len(field.q01) - 1, 6).round().astype(int).tolist()))
    rows = [
        (f"actions[{d}]", name, *(f"{field.q01[h, d]:.4g} … {field.q99[h, d]:.4g}" for h in steps))
        for d, name in enumerate(labels)
    ]
    return table(rows, ("dimension", "name", *(f"step {h}" for h in steps)))


def stats_table(stats: "NormStats", robot: Robot, dataset: "Dataset | None" = None) -> str:
    """One row per dimension, as the model sees it; with the dataset's names where there is one."""
    import numpy as np

    from manipi.data.dataset import action_labels, state_labels

    rows = []
    for kind, field in (("state", stats.state), ("actions", stats.actions)):
        names = (state_labels if kind == "state" else action_labels)(robot, dataset)
        # Adding zero makes a plain 0 of -0.
        columns_6d = np.stack([field.mean, field.std, field.q01, field.q99, field.min, field.max]) + 0.0
        rows += [(f"{kind}[{d}]", name, *columns_6d[:, d].tolist()) for d, name in enumerate(names)]
    return table(rows, ("dimension", "name", "mean", "std", "q01", "q99", "min", "max"))


def _report_table(
    report: "ReconstructionReport", stats: "NormStats", config: TrainConfig, labels: Sequence[str]
) -> str:
    """What the round trip through codes costs each dimension, normalised and in the units of its action group."""
    import numpy as np

    from manipi.transforms.normalize import unnormalize

    # Normalisation is linear: a normalised 1 is worth the same everywhere.
    zero_one_2A = np.stack([np.zeros_like(report.max_error), np.ones_like(report.max_error)])
    worth_A = np.diff(unnormalize(zero_one_2A, stats.actions, config.norm_mode), axis=0)[0]
    columns_4A = np.stack([e for error in (report.max_error, report.mean_error) for e in (error, error * worth_A)])
    rows = [(f"actions[{d}]", name, *columns_4A[:, d].tolist()) for d, name in enumerate(labels)]
    numbers, codes = config.model.action_horizon * config.robot.model_action_size, report.mean_codes
    errors = table(rows, ("dimension", "name", "max error", "in units", "mean error", "in units"))
    return (
        f"{errors}\n\n{codes:.1f} codes per chunk, at most {report.max_codes}; "
        f"{numbers / codes:.1f} times fewer than one for each of its {numbers} numbers"
    )


def _plot(
    sketch: "NormStatsSketch",
    stats: "NormStats",
    names: tuple[Sequence[str], Sequence[str]],
    path: Path,
    *,
    raw: "NormStats | None",
) -> None:
    """One histogram per dimension, on a linear axis a little wider than q01 to q99, as a PNG.

    Args:
        names: of the state's and of the actions' dimensions.
        raw: the statistics before a floor widened them; what differs is drawn in another colour.
    """
    import matplotlib
    import numpy as np

    from manipi.storage import atomic_write

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    rows, before, sketches = [math.ceil(len(some) / 7) for some in names], raw or stats, iter(sketch.sketches)
    figure = plt.figure(figsize=(14, 1.55 * sum(rows) + 1.7), dpi=110, layout="constrained")
    panels = figure.subfigures(2, 1, height_ratios=[r + 0.5 for r in rows], squeeze=False)[:, 0]
    titles, pairs = ("state", "actions, as the model sees them"), zip(*((s.state, s.actions) for s in (stats, before)))
    for panel, title, (field, old), labels, count in zip(panels, titles, pairs, names, rows, strict=True):
        panel.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
        axes = panel.subplots(max(count, 1), 7, squeeze=False).ravel()
        for axis in axes[len(labels) :]:
            axis.axis("off")
        for d, (axis, label) in enumerate(zip(axes, labels, strict=False)):
            one, q01, q99 = next(sketches), float(field.q01[d]), float(field.q99[d])
            edge, ink = (WIDENED, WIDENED) if (q01, q99) != (old.q01[d], old.q99[d]) else (EDGES, INK)
            margin = 0.15 * (q99 - q01) or max(0.1 * abs(q01), 1e-3)
            low, high = q01 - margin, q99 + margin
            # Counts in equal parts of [low, high); a bin is spread over the parts that it covers.
            parts, below = np.linspace(low, high, BARS + 1), np.append(0, np.cumsum(one.counts))
            heights = np.diff(np.interp(parts, one.edges, below))
            color = CONSTANT if one.low == one.high else VALUES
            axis.bar(parts[:-1], heights, (high - low) / BARS, align="edge", color=color)
            for x in (q01, q99):
                axis.axvline(x, color=edge, linewidth=1, linestyle="--")
            beyond = [f"◂ {one.low:.3g}"] * (one.low < low) + [f"{one.high:.3g} ▸"] * (one.high > high)
            axis.set_xlabel("   ".join(beyond), fontsize=6, color=EDGES, labelpad=1)
            axis.set(xlim=(low, high), ylim=(0, heights.max() * 1.12 or 1), yticks=[])
            ticks = [q01, q99] if q99 > q01 else [q01]
            axis.set_xticks(ticks, [f"{x:.3g}" for x in ticks], fontsize=7)
            axis.tick_params(length=2, color=EDGES, pad=2)
            axis.spines[["top", "right", "left"]].set_visible(False)
            short = label if len(label) <= 22 else f"{label[:9]}…{label[-12:]}"
            axis.set_title(f"{d} · {short}", fontsize=8, loc="left", color=ink, pad=3)
    legend = [Line2D([], [], color=EDGES, linestyle="--", label="q01 and q99")]
    if raw is not None:
        legend.append(Line2D([], [], color=WIDENED, linestyle="--", label="widened to the floor"))
    figure.legend(handles=legend, loc="upper right", ncols=len(legend), fontsize=9, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    atomic_write(path, buffer.getvalue())
