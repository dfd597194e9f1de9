"""Validations as pictures: curves over the steps of a run, and the errors of one by dimension and step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from manipi.data.dimensions import label
from manipi.train.watch.measure import SetResult
from manipi.train.watch.progress import figure

POLICY, TRAINING = "#0b6e99", "#c46a1b"
SIMPLE = {"holding position": ("#c46a1b", "--"), "the mean action": ("#555555", ":")}


def plot_curves(validations: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses; action error beside the baselines; what prompts do. One panel each."""
    steps = [v["step"] for v in validations]
    with figure(path, figsize=(12, 3.6)) as drawing:
        loss, error, prompts = drawing.subplots(1, 3)
        loss.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], color="#cccccc", label="training batches")
        _curve(loss, steps, validations, "train_loss", TRAINING, "fixed training frames")
        _curve(loss, steps, validations, "loss", POLICY, "held-out frames")
        if "raw_loss" in validations[-1]:
            _curve(loss, steps, validations, "raw_loss", "#6b4c9a", "held-out, not averaged")
        loss.set(title="loss", yscale="log")
        _curve(error, steps, validations, "action_error", POLICY, "policy", 100)
        for key, name in (("hold_error", "holding position"), ("mean_error", "the mean action")):
            colour, style = SIMPLE[name]
            error.axhline(100 * validations[-1][key], color=colour, linestyle=style, label=name)
        error.set(title="error of sampled actions, held-out", ylabel="% of the travel", ylim=(0, None))
        for key, colour, name in (
            ("swapped_prompt", POLICY, "another frame's prompt"),
            ("blank_prompt", TRAINING, "no prompt"),
            ("other_noise", "#7a7a7a", "the same prompt, other noise"),
        ):
            if key in validations[-1]:
                _curve(prompts, steps, validations, key, colour, name, 100)
        prompts.set(title="how far other prompts move the actions", ylabel="% of the travel", ylim=(0, None))
        for axis in (loss, error, prompts):
            axis.set_xlabel("step")
            axis.grid(alpha=0.25)
            axis.legend(fontsize=8)


def _curve(
    axis: Any, steps: list[int], records: Sequence[Mapping], key: str, colour: str, name: str, scale: float = 1
) -> None:
    values = [scale * record.get(key, np.nan) for record in records]
    axis.plot(steps, values, color=colour, linewidth=1.5, marker="o", markersize=3.5, label=name)


def plot_errors(results: Sequence[SetResult], step: int, path: Path) -> None:
    """Per dataset: error by dimension and step of the chunk, and by dimension beside the baselines."""
    heights = [1.1 + 0.3 * len(result.dimensions) for result in results]
    with figure(path, figsize=(11, 0.5 + sum(heights))) as drawing:
        drawing.suptitle(f"error of sampled actions on held-out frames, step {step}", fontsize=11)
        axes = drawing.subplots(len(results), 2, squeeze=False, height_ratios=heights, width_ratios=(3, 2))
        for (left, right), result in zip(axes, results, strict=True):
            _heat_map(drawing, left, result)
            _beside_baselines(right, result)


def _heat_map(drawing: Any, axis: Any, result: SetResult) -> None:
    share_HA = result.errors["policy"].per_step_dimension / np.where(result.travel > 0, result.travel, np.nan)
    horizon, size = share_HA.shape
    image = axis.imshow(100 * share_HA.T, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axis.set_facecolor("#e6e6e6")  # of dimensions that never travel
    labels = [label(name, unit) for name, unit in zip(result.dimensions, result.units, strict=True)]
    axis.set_yticks(range(size), labels, fontsize=8)
    axis.set_title(f"{result.dataset}, {result.frames} frames", fontsize=9)
    axis.set_xlabel(f"step of the chunk, {1 / result.control_hz:.3g} s each", fontsize=8)
    axis.set_xlim(-0.5, horizon - 0.5)
    drawing.colorbar(image, ax=axis, pad=0.01).set_label("% of the travel", fontsize=8)


def _beside_baselines(axis: Any, result: SetResult) -> None:
    """A bar per dimension, with the error in the robot's own unit as a number."""
    places, travel = np.arange(len(result.dimensions)), np.where(result.travel > 0, result.travel, np.nan)
    shares = {name: 100 * error.per_dimension / travel for name, error in result.errors.items()}
    axis.barh(places, shares["policy"], height=0.62, color=POLICY, label="policy")
    for name, (colour, _) in SIMPLE.items():
        axis.plot(shares[name], places, "|", color=colour, markersize=11, markeredgewidth=2.5, label=name)
    widest = max(np.nanmax(share) for share in shares.values())
    # Numbers stand at the right, beyond every bar.
    for place, (mine, unit) in enumerate(zip(result.errors["policy"].per_dimension, result.units, strict=True)):
        axis.text(widest * 1.04, place, f"{mine:.3g} {unit}".strip(), va="center", fontsize=8)
    axis.set(xlim=(0, widest * 1.3), ylim=(len(places) - 0.5, -0.5), yticks=[])
    axis.set_xlabel("% of the travel; number: the policy's error", fontsize=8)
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
