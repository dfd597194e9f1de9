"""The demonstration's report: one HTML file that needs nothing beside itself, and the same numbers as JSON."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from manipi.evaluate.rollout import Trial
from manipi.evaluate.statistics import SuccessRate
from manipi.page import data_uri, encode_mp4, fact_rows, percent, render
from manipi.records import to_json
from manipi.storage import atomic_write

VARIANTS = {
    "trained": ("Trained", "the policy as it is"),
    "untrained": ("Untrained", "the same network before its first step"),
    "blind": ("Blind", "trained, but every picture is black"),
    "wrong_prompt": ("Wrong words", "trained, but told another object; judged by the scene’s own"),
}
"""What `DemoReport.success` holds: name and meaning of each policy that was driven."""

OUTCOMES = {None: "success", "wrong_block": "touched the wrong block", "max_steps": "ran out of time"}


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
    atomic_write(path, render("manipi.evaluate", "report_template.html", _fields(report)))


def _fields(report: DemoReport) -> dict[str, str]:
    """The template's placeholders, as HTML."""
    trained = report.success["trained"]
    return {
        "title": "From demonstrations to a moving arm",
        "summary": _summary(report),
        "rate": percent(trained.rate),
        "counts": f"{trained.k} of {trained.n}",
        "interval": f"{percent(trained.low)} to {percent(trained.high)}",
        "comparison": _comparison(report.success),
        "bars": "\n".join(_bar(name, report.success[name]) for name in VARIANTS),
        "filmed": _filmed(report),
        "films": _films(report),
        "training": _training(report.settings),
        "loss": data_uri("image/png", report.loss_png.read_bytes()),
        "seconds": fact_rows([*_durations(report.seconds)], total=True),
        "latency": fact_rows([(f"{name[1:]} % within", f"{ms:.1f} ms") for name, ms in report.latency_ms.items()]),
        "settings": fact_rows(_settings(report)),
        "everything": escape(json.dumps(to_json(report.settings), indent=2, ensure_ascii=False)),
        "commands": _commands(report),
    }


# Words --------------------------------------------------------------------------------------------------------------


def _summary(report: DemoReport) -> str:
    data, train = report.settings["dataset"], report.settings["train"]
    return (
        f"A scripted expert recorded {data['episodes']:,} demonstrations ({data['frames']:,} frames). "
        f"A {_model_name(train)} policy with {report.settings['weights_mb']:.1f} MB of weights learned from them, "
        f"from scratch, in {train['steps']:,} steps. It was then served over a websocket, and drove the simulated arm "
        f"on {report.success['trained'].n} scenes that are in no demonstration, from one camera and a sentence."
    )


def _training(settings: Mapping[str, Any]) -> str:
    train, loss = settings["train"], settings["final_loss"]
    return f"{train['steps']:,} steps of {train['batch_size']} observations; the loss ended at {loss:.4g}."


def _comparison(success: Mapping[str, SuccessRate]) -> str:
    """What the intervals allow to say, and no more."""
    trained, first = success["trained"], "Each control takes one thing away."
    close = [VARIANTS[name][0].lower() for name in VARIANTS if name != "trained" and success[name].high >= trained.low]
    if not close:
        return f"{first} The trained policy’s interval lies above those of all three controls."
    names = escape(" and ".join(close))
    return (
        f"{first} The trained policy’s interval does <b>not</b> lie above that of {names}: "
        "these trials alone do not show that it is better."
    )


def _model_name(train: Mapping[str, Any]) -> str:
    names = {"Pi0Config": "π0", "Pi05Config": "π0.5", "Pi0FastConfig": "π0-FAST"}
    return names[train["model"]["type"]]


def _settings(report: DemoReport) -> list[tuple[str, str]]:
    settings, train = report.settings, report.settings["train"]
    model, optimizer = train["model"], train["optimizer"]
    camera = f"{model['vision']['image_size']} × {model['vision']['image_size']} pixels"
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    return [
        ("model", f"{_model_name(train)}, {settings['weights_mb']:.1f} MB of weights, computed in {model['dtype']}"),
        ("cameras", f"{len(model['cameras'])} of {camera}"),
        ("action chunk", f"{model['action_horizon']} steps at {train['robot']['control_hz']:g} Hz"),
        ("demonstrations", f"{settings['dataset']['episodes']:,} episodes, {settings['dataset']['frames']:,} frames"),
        ("training", f"{train['steps']:,} steps of {train['batch_size']}, peak rate {optimizer['lr']:g}"),
        ("seed", f"{train['seed']}"),
        ("versions", versions),
    ]


def _commands(report: DemoReport) -> str:
    train, run = report.settings["train"], report.loss_png.parent
    checkpoint = run / "checkpoints" / str(train["steps"])
    lines = [
        ("all of this again, from nothing", "manipi demo --dir again"),
        ("is the data sound?", f"manipi check {train['data']['path']}"),
        ("predicted beside recorded actions, and beside baselines", f"manipi eval {checkpoint}"),
        ("serve the policy; any openpi client can drive it", f"manipi serve {checkpoint}"),
    ]
    return "\n".join(f"<i># {escape(why)}</i>\n{escape(command)}" for why, command in lines)


# Parts --------------------------------------------------------------------------------------------------------------


def _bar(name: str, rate: SuccessRate) -> str:
    """One row of the chart: the rate as a bar, its interval as a whisker, on a scale of 0 to 100."""
    title, meaning = VARIANTS[name]
    value, low, high = 100 * rate.rate, 100 * rate.low, 100 * rate.high
    lines = "".join(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="20"/>' for x in (0, 25, 50, 75, 100))
    ends = "".join(f'<line class="whisker" x1="{x:.2f}" x2="{x:.2f}" y1="7" y2="13"/>' for x in (low, high))
    return f"""<div class="bar {name}"><div><b>{title}</b><small>{meaning}</small></div>
<svg viewBox="0 0 100 20" preserveAspectRatio="none" role="img" aria-label="{title}: {rate}">{lines}
<rect class="fill" x="0" y="4" width="{value:.2f}" height="12"/>
<line class="whisker" x1="{low:.2f}" x2="{high:.2f}" y1="10" y2="10"/>{ends}</svg>
<div class="numbers"><b>{percent(rate.rate)}</b><small>{rate.k} of {rate.n}<br>{percent(rate.low)} to \
{percent(rate.high)}</small></div></div>"""


def _filmed(report: DemoReport) -> str:
    trained, wins = report.success["trained"], sum(trial.success for trial in report.trials)
    successes = _share(wins, trained.k, "success", "successes")
    failures = _share(len(report.trials) - wins, trained.n - trained.k, "failure", "failures")
    return f"From the trained policy’s {trained.n} trials: {successes} and {failures}."


def _share(shown: int, total: int, one: str, many: str) -> str:
    if shown < total:
        return f"the first {shown} of {total} {many}"
    return {0: f"no {one}", 1: f"the only {one}"}.get(total, f"all {total} {many}")


def _films(report: DemoReport) -> str:
    fps = round(report.settings["train"]["robot"]["control_hz"])
    parts = []
    for title, wanted in (("Successes", True), ("Failures", False)):
        chosen = [trial for trial in report.trials if trial.success == wanted]
        shown = "\n".join(_film(trial, fps) for trial in chosen)
        parts.append(f"<h3>{title}: {len(chosen)}</h3>\n" + (f'<div class="films">\n{shown}\n</div>' if chosen else ""))
    return "\n".join(parts)


def _film(trial: Trial, fps: int) -> str:
    assert trial.frames is not None
    height, width = trial.frames.shape[1:3]
    # The last picture stands for a second, so that a loop shows how it ended.
    frames = (*trial.frames, *fps * [trial.frames[-1]])
    source = data_uri("video/mp4", encode_mp4(frames, fps, height=height, width=width))
    kind, outcome = ("good", "success") if trial.success else ("bad", OUTCOMES.get(trial.failure, str(trial.failure)))
    prompt = escape(trial.prompt)
    return f"""<figure><video src="{source}" aria-label="{prompt}" autoplay muted loop playsinline></video>
<figcaption><b>{prompt}</b><span class="{kind}">{escape(outcome)}</span><br>{trial.steps} steps, \
seed&nbsp;{trial.seed}</figcaption></figure>"""


def _durations(seconds: Mapping[str, float]) -> Iterable[tuple[str, str]]:
    for stage, value in (*seconds.items(), ("together", sum(seconds.values()))):
        yield stage.replace("_", " "), f"{value:,.1f} s"
