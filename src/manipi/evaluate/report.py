"""The demonstration's report: one HTML file that needs nothing beside itself, and the same numbers as JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manipi.errors import quoted
from manipi.evaluate.rollout import SuccessRate, Trial
from manipi.page import data_uri, encode_mp4, render
from manipi.records import to_json
from manipi.storage import atomic_write

VARIANTS = {
    "trained": ("Trained", "the policy as it is"),
    "untrained": ("Untrained", "the same network before its first step"),
    "blind": ("Blind", "trained, but every picture is black"),
    "wrong_prompt": ("Wrong words", "trained, but told another object; judged by the scene’s own"),
}
"""What `DemoReport.success` holds: name and meaning of each policy that was driven."""

MODELS = {"Pi0Config": "π0", "Pi05Config": "π0.5", "Pi0FastConfig": "π0-FAST"}
OUTCOMES = {"wrong_block": "touched the wrong block", "max_steps": "ran out of time"}


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
    trials: tuple[Trial, ...]
    """Those of the trained policy that were filmed."""
    loss_png: Path
    """In the run's folder."""

    def to_json(self) -> dict[str, Any]:
        """The numbers: everything but films and plot."""
        return {name: to_json(getattr(self, name)) for name in ("success", "seconds", "latency_ms", "settings")}

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
    wins = sum(trial.success for trial in report.trials)
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
            _share(len(report.trials) - wins, trained.n - trained.k, "failure", "failures"),
        ),
        outcomes=[
            (
                title,
                [_film(trial, round(train["robot"]["control_hz"])) for trial in report.trials if trial.success == won],
            )
            for title, won in (("Successes", True), ("Failures", False))
        ],
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


def _film(trial: Trial, fps: int) -> tuple[Trial, str, str]:
    """A trial, its film as a data URI, and how it ended."""
    assert trial.frames is not None
    height, width = trial.frames.shape[1:3]
    # The last picture stands for a second, so that a loop shows how it ended.
    film = encode_mp4((*trial.frames, *fps * [trial.frames[-1]]), fps, height=height, width=width)
    outcome = "success" if trial.success else OUTCOMES.get(trial.failure or "", str(trial.failure))
    return trial, data_uri("video/mp4", film), outcome


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
