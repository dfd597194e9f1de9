"""Pages of an evaluation and of the demo, each one HTML file that needs nothing beside itself; and the demo's JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from manipi.errors import quoted
from manipi.evaluate.compare import Comparison
from manipi.evaluate.statistics import SuccessRate, success_rate
from manipi.page import data_uri, encode_mp4, render
from manipi.records import to_json
from manipi.storage import atomic_write

VARIANTS = {
    "trained": ("Trained", "the policy as it is"),
    "untrained": ("Untrained", "the same network before its first step"),
    "blind": ("Blind", "trained, but every picture is black"),
    "wrong_words": ("Wrong words", "trained, but told another object; judged by the scene’s own"),
}
"""What `DemoReport.success` holds: name and meaning of each policy that was driven."""

MODELS = {"Pi0Config": "π0", "Pi05Config": "π0.5", "Pi0FastConfig": "π0-FAST"}
CONTROLS = {
    "untrained": "the same network with random weights",
    "blind": "every picture is black",
    "wrong_words": "the instruction names another object",
    "held": "the first command is held",
    "replay": "the expert’s commands of another scene",
}
"""What each control does, for people."""
OUTCOMES = {"wrong_block": "touched the wrong block", "max_steps": "ran out of time"}


@dataclass(frozen=True)
class Film:
    """A trial of an evaluation's result, and its pictures."""

    trial: Mapping[str, Any]
    frames: UInt8[np.ndarray, "T h w 3"]


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """What a demonstration found."""

    success: Mapping[str, SuccessRate]
    """By variant; the keys are those of `VARIANTS`."""
    seconds: Mapping[str, float]
    """Wall time by stage, in order."""
    latency_ms: Mapping[str, float]
    """`p50` and `p95` of the client's round trips."""
    settings: Mapping[str, Any]
    """`demo`, `train` (the whole TrainConfig as JSON), `dataset` (`episodes`, `frames`), `final_loss`, `weights_mb`,
    `versions`."""
    films: tuple[Film, ...]
    """Of the trained policy."""
    loss_png: Path
    """In the run's folder."""
    comparison: Comparison
    """Trained beside untrained, on the same scenes."""

    def to_json(self) -> dict[str, Any]:
        """The numbers: everything but films and plot."""
        return {
            name: to_json(getattr(self, name))
            for name in ("success", "seconds", "latency_ms", "settings", "comparison")
        }

    def write_json(self, path: Path) -> None:
        """Raises StorageError where the file cannot be written."""
        atomic_write(path, (json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n").encode())


def write_report(path: Path, report: DemoReport) -> None:
    """Write one HTML file with films, plot and styles inside it.

    Raises:
        StorageError: the file cannot be written.
    """
    settings, train, trained = report.settings, report.settings["train"], report.success["trained"]
    controls = [name for name in VARIANTS if name != "trained"]
    wins = sum(film.trial["success"] for film in report.films)
    page = render(
        "evaluate/report.html",
        title="From demonstrations to a moving arm",
        report=report,
        variants=VARIANTS,
        trained=trained,
        train=train,
        data=settings["dataset"],
        model=MODELS[train["model"]["type"]],
        close=[VARIANTS[name][0].lower() for name in controls if report.success[name].high >= trained.low],
        filmed=(
            _share(wins, trained.k, "success", "successes"),
            _share(len(report.films) - wins, trained.n - trained.k, "failure", "failures"),
        ),
        outcomes=_outcomes(report.films, train["robot"]["control_hz"]),
        loss=data_uri("image/png", report.loss_png.read_bytes()),
        facts=_facts(settings),
        everything=json.dumps(to_json(settings), indent=2, ensure_ascii=False),
        commands=_commands(report),
    )
    atomic_write(path, page)


def _share(shown: int, total: int, one: str, many: str) -> str:
    if shown < total:
        return f"the first {shown} of {total} {many}"
    return {0: f"no {one}", 1: f"the only {one}"}.get(total, f"all {total} {many}")


def _outcomes(films: Sequence[Film], fps: float) -> list[tuple[str, list[tuple[Mapping[str, Any], str, str]]]]:
    """Successes and failures: each a trial, its film as a data URI, and how it ended."""
    outcomes: list[tuple[str, list[tuple[Mapping[str, Any], str, str]]]] = [("Successes", []), ("Failures", [])]
    for film in films:
        trial, frames = film.trial, film.frames
        # The last picture stands for a second, so that a loop shows how it ended.
        data = encode_mp4((*frames, *round(fps) * [frames[-1]]), fps, height=frames.shape[1], width=frames.shape[2])
        ended = "success" if trial["success"] else OUTCOMES.get(trial["failure"] or "", str(trial["failure"]))
        outcomes[0 if trial["success"] else 1][1].append((trial, data_uri("video/mp4", data), ended))
    return outcomes


def write_evaluation(path: Path, result: Mapping[str, Any], films: Mapping[int, np.ndarray], fps: float) -> None:
    """Write the page of an evaluation's result.

    Args:
        films: pictures uint8 [T, h, w, 3] by the trial's index.
        fps: of the films, which is the robot's rate.

    Raises:
        StorageError: the file cannot be written.
    """
    by_task: dict[str, list[bool]] = {}
    for trial in result["trials"]:
        by_task.setdefault(trial["task"], []).append(trial["success"])
    shown = [Film(trial, films[trial["index"]]) for trial in result["trials"] if trial["index"] in films]
    control = result["settings"]["control"]
    facts = {**result["settings"], **{key: result[key] for key in ("options", "server", "simulator", "versions")}}
    facts |= {"checkpoint": result["checkpoint"], "trials changed by batches": result["batched_trials"]}
    page = render(
        "evaluate/evaluation.html",
        title=f"{result['policy']} in {result['suite']}",
        result=result,
        control=None if control is None else CONTROLS[control],
        tasks={task: success_rate(sum(outcomes), len(outcomes)) for task, outcomes in by_task.items()},
        outcomes=_outcomes(shown, fps) if shown else [],
        facts=[(name.replace("_", " "), _in_words(value)) for name, value in facts.items() if value is not None],
    )
    atomic_write(path, page)


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_in_words(one)}" for key, one in value.items()) or "none"
    return str(value)


def _facts(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    train, data = settings["train"], settings["dataset"]
    model, optimizer = train["model"], train["optimizer"]
    camera = f"{model['vision']['image_size']} × {model['vision']['image_size']} pixels"
    weights = f"{settings['weights_mb']:.1f} MB of weights"
    return [
        ("model", f"{MODELS[model['type']]}, {weights}, computed in {model['dtype']}"),
        ("cameras", f"{len(model['cameras'])} of {camera}"),
        ("action chunk", f"{model['action_horizon']} steps at {train['robot']['control_hz']:g} Hz"),
        ("demonstrations", f"{data['episodes']:,} episodes, {data['frames']:,} frames"),
        ("training", f"{train['steps']:,} steps of {train['batch_size']}, peak rate {optimizer['lr']:g}"),
        ("seed", f"{train['seed']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in settings["versions"].items())),
    ]


def _commands(report: DemoReport) -> list[tuple[str, str]]:
    train = report.settings["train"]
    checkpoint = report.loss_png.parent / "checkpoints" / str(train["steps"])
    return [
        ("all of this again, from nothing", "manipi demo --dir again"),
        ("is the data sound?", f"manipi check {quoted(train['data']['path'])}"),
        ("predicted beside recorded actions, and beside baselines", f"manipi eval {quoted(checkpoint)}"),
        ("serve the policy; any openpi client can drive it", f"manipi serve {quoted(checkpoint)}"),
    ]
