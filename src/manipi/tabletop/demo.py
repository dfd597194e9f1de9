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
from collections.abc import Callable, Iterator
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
from manipi.evaluate.compare import compare_results, read_side_of
from manipi.evaluate.evaluation import Evaluation, Settings
from manipi.evaluate.policies import open_policy
from manipi.evaluate.report import DemoReport, Film, write_report
from manipi.evaluate.statistics import ALPHA
from manipi.evaluate.suites import find_suite
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

    suite = find_suite("tabletop/reach")

    def drive(checkpoint: Callable[[], Path], **controls: str | None) -> None:
        """The trials of each name, with one server for all of them, unless they are there."""
        paths = {name: folder / "evaluations" / name for name in controls}
        if all((path / "result.json").exists() for path in paths.values()):
            return
        with open_policy(str(checkpoint())) as opened:
            for name, control in controls.items():
                settings = Settings(trials=config.trials, execute_steps=config.execute_steps, control=control)
                named = {"policy": name, "server": opened.server, "workers": 2}
                with (
                    _timed(folder, f"drive {name}"),
                    Evaluation(paths[name], suite, settings, opened.url, **named) as evaluation,
                ):
                    evaluation.run()
                    if name == "trained":
                        films = evaluation.films(config.films)
                        named_films = {str(index): film for index, film in films.items()}
                        np.savez_compressed(paths[name] / "films.npz", **named_films)  # type: ignore[arg-type]
                    evaluation.finish()

    def untrained() -> Path:
        """The network before its first step, in a folder of its own: the run's checkpoints come and go."""
        before = replace(train_config, data=replace(train_config.data, cache="none"), async_save=False)
        return train(before, folder / "untrained", stop_at=0, show=False)

    drive(untrained, untrained=None)
    with _timed(folder, "train"):
        checkpoint = run.checkpoint(train_config.steps)
        if not checkpoint.is_dir():
            checkpoint = train(train_config, run.folder)
    drive(lambda: checkpoint, trained=None, blind="blind", wrong_words="wrong_words")
    return _report(folder, config, run)


def _report(folder: Path, config: DemoConfig, run: Run) -> DemoReport:
    """What came of it, written as `report.json` and `report.html`."""
    order = ("trained", "untrained", "blind", "wrong_words")
    recorded, results = (
        open_dataset(folder / "dataset"),
        {n: read_json(folder / "evaluations" / n / "result.json") for n in order},
    )
    with np.load(folder / "evaluations" / "trained" / "films.npz") as films:
        filmed = tuple(Film(results["trained"]["trials"][int(index)], films[index]) for index in films.files)
    settings = {
        "demo": to_json(config),
        # With the dtype that it ran in, which the precision decides and not the recipe's model.
        "train": to_json(replace(run.config, model=run.config.policy_model)),
        "dataset": {"episodes": len(recorded.episodes), "frames": recorded.num_frames},
        "final_loss": run.read_metrics()[-1]["loss"],
        "weights_mb": (run.checkpoint(run.config.steps) / "model.safetensors").stat().st_size / 1e6,
        "versions": {"manipi": manipi.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    sides = {name: read_side_of(result) for name, result in results.items()}
    report = DemoReport(
        success={name: side.success for name, side in sides.items()},
        seconds=read_json(folder / "seconds.json"),
        latency_ms=results["trained"]["latency_ms"],
        settings=settings,
        films=filmed,
        loss_png=run.folder / "loss.png",
        comparison=compare_results(sides["trained"], sides["untrained"], margin=0.05, alpha=ALPHA),
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
