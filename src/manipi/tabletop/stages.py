"""The main job, on the embedded environment: demonstrations in, a policy that acts out.

    record ──► check ──► train ──► serve and drive ──► report
    LeRobot    norm      tiny      unseen scenes:      report.html
    v3.0       stats     model     trained, blind,     report.json
                                   wrong prompt

Every stage leaves its result in the folder and is skipped when it is there, so that a second run goes on where the
first one stopped, however that came about.
"""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import manipi
from manipi.data.open import open_dataset
from manipi.data.review.check import check_dataset
from manipi.errors import DatasetFormatError, TrainingError
from manipi.evaluate.report import DemoReport, write_report
from manipi.evaluate.rollout import (
    SuccessRate,
    Trial,
    Variant,
    load_trials,
    policy_server,
    run_trials,
    save_trials,
    success_rate,
)
from manipi.recipes.registry import load_recipe
from manipi.records import json_bytes, read_json, to_json
from manipi.storage import atomic_write
from manipi.tabletop.config import FIRST_TRAINING_SEED, RECIPES, DemoConfig
from manipi.tabletop.record import record
from manipi.train.config import TrainConfig
from manipi.train.loop import train
from manipi.train.run.folder import Run


class Demo:
    """One folder, one run of the stages.

    Raises:
        TrainingError: the folder holds a demonstration of another size.
    """

    def __init__(self, folder: Path, config: DemoConfig):
        self.folder, self.config = folder, config
        self.dataset, self.run_folder = folder / "dataset", folder / "run"
        recipe = load_recipe(RECIPES[config.model])
        data = replace(recipe.data, path=str(self.dataset))
        self.train_config: TrainConfig = replace(recipe, data=data, steps=config.steps or recipe.steps)
        self._claim()

    def run(self) -> DemoReport:
        """All stages; returns what `report.json` holds."""
        with self._timed("record"):
            self._record()
        with self._timed("check"):
            self._check()
        untrained = self._drive(self._untrained, untrained="plain")
        with self._timed("train"):
            checkpoint = self._train()
        trained = self._drive(lambda: checkpoint, trained="plain", blind="blind", wrong_prompt="wrong_prompt")
        trials = {"trained": trained["trained"], **untrained, **trained}
        report = self._report(trials)
        report.write_json(self.folder / "report.json")
        write_report(self.folder / "report.html", report)
        return report

    # ---- stages

    def _record(self) -> None:
        if not self.dataset.exists():
            size = self.train_config.model.vision.image_size
            record(self.dataset, episodes=self.config.episodes, first_seed=FIRST_TRAINING_SEED, image_size=size)

    def _check(self) -> None:
        done = self.folder / "check.json"
        if done.exists():
            return
        report = check_dataset(self.dataset, robot=self.train_config.robot)
        if errors := [finding for finding in report.findings if finding.severity == "error"]:
            raise DatasetFormatError(
                expected="demonstrations without errors",
                found=f"{len(errors)} errors, the first: {errors[0].what}",
                where=str(self.dataset),
                next=f"manipi check {self.dataset}",
            )
        atomic_write(done, json_bytes(report))

    def _train(self) -> Path:
        final = Run(self.run_folder, self.train_config).checkpoint(self.train_config.steps)
        return final if final.is_dir() else train(self.train_config, self.run_folder)

    def _untrained(self) -> Path:
        """The network before its first step, in a folder of its own: the run's checkpoints come and go."""
        config = replace(self.train_config, data=replace(self.train_config.data, cache="none"), async_save=False)
        return train(config, self.folder / "untrained", stop_at=0, show=False)

    def _drive(self, checkpoint: Callable[[], Path], **variants: Variant) -> dict[str, list[Trial]]:
        """The trials of each name, with one server for those that are not there yet."""
        paths = {name: self.folder / "trials" / f"{name}.npz" for name in variants}
        if missing := [name for name, path in paths.items() if not path.exists()]:
            with policy_server(checkpoint()) as port:
                for name in missing:
                    with self._timed(f"drive {name}"):
                        save_trials(paths[name], self._trials(port, name, variants[name]))
        return {name: load_trials(path) for name, path in paths.items()}

    def _trials(self, port: int, name: str, variant: Variant) -> list[Trial]:
        return run_trials(
            port,
            range(self.config.trials),
            environment="tabletop",
            image_size=self.train_config.model.vision.image_size,
            execute_steps=self.config.execute_steps,
            variant=variant,
            films=self.config.films if name == "trained" else 0,
            label=name.replace("_", " "),
        )

    def _report(self, trials: dict[str, list[Trial]]) -> DemoReport:
        round_trips = [ms for trial in trials["trained"] for ms in trial.infer_ms]
        p50, p95 = np.percentile(round_trips, (50, 95)).tolist()
        return DemoReport(
            success={name: rate_of(found) for name, found in trials.items()},
            seconds=self._seconds(),
            latency_ms={"p50": p50, "p95": p95},
            settings=self._settings(),
            trials=tuple(t for t in trials["trained"] if t.frames is not None),
            loss_png=self.run_folder / "loss.png",
        )

    def _settings(self) -> dict[str, Any]:
        dataset, run = open_dataset(self.dataset), Run(self.run_folder, self.train_config)
        newest = run.checkpoint(self.train_config.steps) / "model.safetensors"
        return {
            "demo": to_json(self.config),
            # With the dtype that it ran in, which the precision decides and not the recipe's model.
            "train": to_json(replace(self.train_config, model=self.train_config.policy_model)),
            "dataset": {"episodes": len(dataset.episodes), "frames": dataset.num_frames},
            "final_loss": run.read_metrics()[-1]["loss"],
            "weights_mb": newest.stat().st_size / 1e6,
            "versions": {"manipi": manipi.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }

    # ---- the folder's own state

    def _claim(self) -> None:
        stored, mine = self.folder / "demo.json", to_json(self.config)
        if stored.exists() and read_json(stored) != mine:
            raise TrainingError(
                expected=f"a demonstration with {mine}",
                found=f"one with {read_json(stored)}",
                where=str(self.folder),
                next="name another folder with --dir, or delete this one",
            )
        atomic_write(stored, json_bytes(mine))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Add the time that the block takes to the stage's, over all runs of this folder."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = self._seconds()
            seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - started
            atomic_write(self.folder / "seconds.json", json_bytes(seconds))

    def _seconds(self) -> dict[str, float]:
        path = self.folder / "seconds.json"
        return read_json(path) if path.exists() else {}


def rate_of(trials: list[Trial]) -> SuccessRate:
    """How many of the trials succeeded."""
    return success_rate(sum(t.success for t in trials), len(trials))
