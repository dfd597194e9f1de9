"""What a run says about held-out episodes while it goes on, without changing it by a bit (`watch.measure`).

The weights are those that would be served now. Numbers go to `validation.jsonl`, one line each time, and in full to
`validation/STEP.json`; pictures are beside it. Which checkpoint is the best follows from them: `Run.best`.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from tqdm import tqdm

from manipi.model import VLA
from manipi.policy import Policy
from manipi.records import json_bytes
from manipi.storage import atomic_write
from manipi.train.data import TrainingData
from manipi.train.run.folder import Run, append_log, read_log
from manipi.train.watch.measure import HeldOutFrames, SetResult
from manipi.train.watch.validation_plot import plot_curves, plot_errors

IGNORED = 0.05
"""Prompts count as ignored where another one moves the chunks by less than this share of their error."""


class Validation:
    """The validations of a run.

    Args:
        show: print a line or two per validation.
    """

    def __init__(self, run: Run, data: TrainingData, *, show: bool):
        self._run, self._data, self._show = run, data, show
        self._held_out = [one for one in data.sets if len(one.held_out)]
        if show and run.config.validation.every:
            self._say_what_is_missing()

    def _say_what_is_missing(self) -> None:
        config = self._run.config
        if without := [one.source.dataset.name for one in self._data.sets if not len(one.held_out)]:
            tqdm.write(
                f"no validation on {', '.join(without)}: no episode is held out (--data.holdout 0.1: a tenth is)"
            )
        if self._held_out and math.lcm(config.validation.every, config.save_every) > config.steps:
            tqdm.write(
                "no step before the last is both validated and saved, and could be the best checkpoint: "
                "make --validation.every a multiple of --save-every and smaller than --steps"
            )

    def due(self, step: int) -> bool:
        """Whether there is one after so many steps."""
        every = self._run.config.validation.every
        return bool(every and self._held_out and (step % every == 0 or step == self._run.config.steps))

    def run(self, step: int, policy: Policy, raw: VLA) -> dict[str, float]:
        """Measure, write numbers and pictures, and say how it stands. Returns the numbers.

        Args:
            policy: the one that would be served.
            raw: with the weights that are being trained.
        """
        began, folder = time.perf_counter(), self._run.folder / "validation"
        results = [one.measure(policy, raw if self._run.config.validation.raw else None) for one in self._frames]
        numbers = summary(results)
        record = {"step": step, **numbers, "seconds": time.perf_counter() - began, "time": time.time()}
        atomic_write(folder / f"{step}.json", json_bytes({**record, "sets": results}))
        plot_errors(results, step, folder / f"{step}.png")
        append_log(self._run.validations, record)
        plot_curves(read_log(self._run.validations), self._run.read_metrics(), folder / "curves.png")
        if self._show:
            for line in (_sentence(record), *map(_about_prompts, results)):
                tqdm.write(line)
        return numbers

    @cached_property
    def _frames(self) -> list[HeldOutFrames]:
        """Read at the first validation, not before the first step."""
        stats = self._data.stats
        return [HeldOutFrames(o, stats[o.source.pipeline.robot.name], self._run.config) for o in self._held_out]


def summary(results: Sequence[SetResult]) -> dict[str, float]:
    """The numbers of a validation: means over its datasets, by their weights in the mixture, of those that have one."""

    def error(name: str) -> Callable[[SetResult], float]:
        return lambda r: r.errors[name].share_of_travel

    numbers: dict[str, Callable[[SetResult], float | None]] = {
        "loss": lambda r: r.loss,
        "train_loss": lambda r: r.train_loss,
        "raw_loss": lambda r: r.raw_loss,
        "token_accuracy": lambda r: r.token_accuracy,
        "action_error": error("policy"),
        "hold_error": error("holding position"),
        "mean_error": error("the mean action"),
        "blank_prompt": lambda r: r.probe.blank,
        "swapped_prompt": lambda r: r.probe.swapped,
        "other_noise": lambda r: r.probe.noise,
    }
    means = {name: _mean(results, number) for name, number in numbers.items()}
    return {name: mean for name, mean in means.items() if mean is not None}


def _mean(results: Sequence[SetResult], number: Callable[[SetResult], float | None]) -> float | None:
    found = [(value, r.weight) for r in results if (value := number(r)) is not None]
    return float(np.average([v for v, _ in found], weights=[w for _, w in found])) if found else None


def _sentence(record: dict[str, Any]) -> str:
    tokens = f", tokens right {record['token_accuracy']:.1%}" if "token_accuracy" in record else ""
    return (
        f"validation  step {record['step']}: loss {record['loss']:.4f} (training frames {record['train_loss']:.4f})"
        f"{tokens}, action error {record['action_error']:.2%} of the travel"
        f" (holding position {record['hold_error']:.2%}, the mean action {record['mean_error']:.2%})"
    )


def _about_prompts(result: SetResult) -> str:
    """Whether the policy listens."""
    probe, error, where = result.probe, result.errors["policy"].share_of_travel, f"prompts of {result.dataset}"
    if probe.swapped is None:
        return (
            f"{where}: one only, so that nothing shows whether it is read (without it actions move {probe.blank:.2%})"
        )
    verdict = "IGNORED so far, " if probe.swapped < IGNORED * error else ""
    moved = f"another one moves actions by {probe.swapped:.2%} of the travel, none by {probe.blank:.2%}"
    return f"{where}: {verdict}{moved}; their error is {error:.2%}"
