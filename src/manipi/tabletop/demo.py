"""The demo: demonstrations of a simulated arm in, a policy that acts out.

    record ──► check ──► train ──► serve and drive ──► report
    LeRobot    norm      tiny      unseen scenes:      report.html
    v3.0       stats     model     trained, blind,     report.json
                                   wrong prompt

Every stage leaves its result in the folder and is skipped when it is there, so that a second run goes on where the
first one stopped, however that came about.
"""

import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import manipi
from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.data.open import open_dataset
from manipi.data.review.check import check_dataset
from manipi.errors import DatasetFormatError, TrainingError, quoted
from manipi.evaluate.report import DemoReport, write_report
from manipi.evaluate.rollout import Trial, Variant, load_trials, policy_server, run_trials, save_trials, success_rate
from manipi.recipes.registry import load_recipe
from manipi.records import json_bytes, read_json, to_json
from manipi.robots.tabletop import TABLETOP
from manipi.storage import atomic_write
from manipi.tabletop.environment.expert import demonstrations
from manipi.tabletop.recipes import FIRST_TRAINING_SEED, RECIPES, DemoConfig
from manipi.train.loop import train
from manipi.train.run.folder import Run

BATCH = 50
"""Episodes that one process makes at a time."""


def run_demo(folder: Path, config: DemoConfig) -> DemoReport:
    """All stages; returns what `report.json` holds.

    Raises:
        TrainingError: the folder holds a demonstration of another size.
        DatasetFormatError: the demonstrations have errors.
    """
    mine, claimed = to_json(config), folder / "demo.json"
    if claimed.exists() and read_json(claimed) != mine:
        raise TrainingError(
            expected=f"a demonstration with {mine}",
            found=f"one with {read_json(claimed)}",
            where=str(folder),
            next="name another folder with --dir, or delete this one",
        )
    atomic_write(claimed, json_bytes(mine))
    recipe, dataset = load_recipe(RECIPES[config.model]), folder / "dataset"
    train_config = replace(recipe, data=replace(recipe.data, path=str(dataset)), steps=config.steps or recipe.steps)
    image_size, run = train_config.model.vision.image_size, Run(folder / "run", train_config)

    with _timed(folder, "record"):
        if not dataset.exists():
            record(dataset, episodes=config.episodes, first_seed=FIRST_TRAINING_SEED, image_size=image_size)
    with _timed(folder, "check"):
        if not (folder / "check.json").exists():
            found = check_dataset(dataset, robot=train_config.robot)
            if errors := [finding for finding in found.findings if finding.severity == "error"]:
                raise DatasetFormatError(
                    expected="demonstrations without errors",
                    found=f"{len(errors)} errors, the first: {errors[0].what}",
                    where=str(dataset),
                    next=f"manipi check {quoted(dataset)}",
                )
            atomic_write(folder / "check.json", json_bytes(found))

    def drive(checkpoint: Callable[[], Path], **variants: Variant) -> dict[str, list[Trial]]:
        """The trials of each name, with one server for those that are not there yet."""
        paths = {name: folder / "trials" / f"{name}.npz" for name in variants}
        if missing := [name for name, path in paths.items() if not path.exists()]:
            with policy_server(checkpoint()) as port:
                for name in missing:
                    with _timed(folder, f"drive {name}"):
                        trials = run_trials(
                            port,
                            range(config.trials),
                            environment="tabletop",
                            image_size=image_size,
                            execute_steps=config.execute_steps,
                            variant=variants[name],
                            films=config.films if name == "trained" else 0,
                            label=name.replace("_", " "),
                        )
                        save_trials(paths[name], trials)
        return {name: load_trials(path) for name, path in paths.items()}

    def untrained() -> Path:
        """The network before its first step, in a folder of its own: the run's checkpoints come and go."""
        before = replace(train_config, data=replace(train_config.data, cache="none"), async_save=False)
        return train(before, folder / "untrained", stop_at=0, show=False)

    driven = drive(untrained, untrained="plain")
    with _timed(folder, "train"):
        checkpoint = run.checkpoint(train_config.steps)
        if not checkpoint.is_dir():
            checkpoint = train(train_config, run.folder)
    driven = drive(lambda: checkpoint, trained="plain", blind="blind", wrong_prompt="wrong_prompt") | driven

    return _report(folder, config, run, driven)


def _report(folder: Path, config: DemoConfig, run: Run, driven: Mapping[str, list[Trial]]) -> DemoReport:
    """What came of it, written as `report.json` and `report.html`."""
    recorded, trained = open_dataset(folder / "dataset"), driven["trained"]
    p50, p95 = np.percentile([ms for trial in trained for ms in trial.infer_ms], (50, 95)).tolist()
    settings = {
        "demo": to_json(config),
        # With the dtype that it ran in, which the precision decides and not the recipe's model.
        "train": to_json(replace(run.config, model=run.config.policy_model)),
        "dataset": {"episodes": len(recorded.episodes), "frames": recorded.num_frames},
        "final_loss": run.read_metrics()[-1]["loss"],
        "weights_mb": (run.checkpoint(run.config.steps) / "model.safetensors").stat().st_size / 1e6,
        "versions": {"manipi": manipi.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    order = ("trained", "untrained", "blind", "wrong_prompt")
    report = DemoReport(
        success={name: success_rate(sum(t.success for t in driven[name]), len(driven[name])) for name in order},
        seconds=read_json(folder / "seconds.json"),
        latency_ms={"p50": p50, "p95": p95},
        settings=settings,
        trials=tuple(trial for trial in trained if trial.frames is not None),
        loss_png=run.folder / "loss.png",
    )
    report.write_json(folder / "report.json")
    write_report(folder / "report.html", report)
    return report


@contextmanager
def _timed(folder: Path, stage: str) -> Iterator[None]:
    """Add the time that the block takes to the stage's, over all runs of this folder."""
    started, path = time.monotonic(), folder / "seconds.json"
    try:
        yield
    finally:
        seconds = read_json(path) if path.exists() else {}
        atomic_write(path, json_bytes(seconds | {stage: seconds.get(stage, 0.0) + time.monotonic() - started}))


def record(target: Path, *, episodes: int, first_seed: int, image_size: int, workers: int = 2) -> None:
    """Write `episodes` successful demonstrations to `target` as LeRobot v3.0 with video, in the order of their seeds.

    Raises:
        StorageError: `target` exists, or the disk is full; nothing half-written is left.
    """
    seeds = range(first_seed, first_seed + episodes)
    picture = Feature(kind="image", shape=(image_size, image_size, 3), dtype="video")
    states = {s.key: Feature(kind="vector", shape=(s.size,), dtype="float32", names=s.names) for s in TABLETOP.state}
    names = TABLETOP.state[0].names
    action = Feature(kind="vector", shape=(TABLETOP.action_size,), dtype="float32", names=names)
    features = {**dict.fromkeys(TABLETOP.cameras.values(), picture), **states, TABLETOP.action_key: action}
    settings: dict[str, Any] = {"robot_type": TABLETOP.name, "pix_fmt": "yuv444p", "crf": 18}
    with (
        LeRobotWriter(target, fps=round(TABLETOP.control_hz), features=features, **settings) as writer,
        # A forked process would inherit the locks of the video writer's threads.
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool,
        tqdm(total=episodes, desc="record", unit="episode") as bar,
    ):
        batches = [seeds[i : i + BATCH] for i in range(0, episodes, BATCH)]
        for batch in pool.map(partial(_make, image_size), batches):
            for episode in batch:
                if episode["success"]:
                    writer.add_episode({key: episode[key] for key in writer.features}, task=episode["task"])
            bar.update(len(batch))


def _make(image_size: int, seeds: range) -> list[dict[str, Any]]:
    """What a worker process does."""
    return list(demonstrations(seeds, image_size=image_size))
