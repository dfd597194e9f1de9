"""`manipi inspect`: a dataset, a checkpoint, or a recipe's first frame."""

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import tyro

from manipi.cli.arguments import NewFile, parse, table, write_result
from manipi.cli.stats import stats_table
from manipi.errors import quoted

WIDTH = 110


@dataclass(frozen=True, kw_only=True)
class _Inspect:
    """Show what is in a dataset or a checkpoint, or what a recipe does to its first frame.

    manipi inspect path/to/dataset

    manipi inspect runs/first/checkpoints/30000

    manipi inspect tabletop

    manipi inspect my_robot.py:my_recipe --json trace.json
    """

    target: tyro.conf.Positional[str]
    """A dataset's folder or URL, a checkpoint's folder, a recipe, or path/to/file.py:function."""
    json: NewFile | None = None
    """Write what is shown to this file."""


def main(arguments: Sequence[str]) -> None:
    """Show the target."""
    args = parse(_Inspect, arguments, "inspect")

    from manipi.data.lerobot.tables import holds_recordings
    from manipi.data.open import find_reader
    from manipi.data.rlds.fields import find_version

    path = Path(args.target).expanduser()
    if "://" in args.target:
        shown = _dataset(args.target)
    elif not path.is_dir():
        shown = _recipe(args.target)
    elif (path / "manifest.json").is_file():
        shown = _checkpoint(path)
    # Of recordings, the error says how they become a dataset.
    elif (path / "meta/info.json").is_file() or find_version(path) or holds_recordings(path) or find_reader(path):
        shown = _dataset(path)
    else:
        shown = _checkpoint(path)  # whose error says what a checkpoint is
    write_result(shown, args.json)


def _dataset(path: Path | str) -> Any:
    from manipi.data.open import open_dataset
    from manipi.data.review.describe import describe_dataset

    summary = describe_dataset(open_dataset(path))
    shortest, median, longest = summary.episode_frames
    _facts(
        Path(path).name,
        format=summary.version,
        folder=summary.root,
        robot=summary.robot_type,
        fps=f"{summary.fps:g}",
        episodes=f"{summary.num_episodes:,} of {shortest} to {longest} frames, median {median}",
        frames=f"{summary.num_frames:,}, {summary.hours:.2f} hours",
    )
    rows = [(k, f.kind, _shape(f.shape), f.dtype, _shorten(", ".join(f.names))) for k, f in summary.features.items()]
    _section("features", table(rows, ("key", "kind", "shape", "dtype", "names")))
    tasks = [(count, task or "(none)") for task, count in summary.tasks.items()]
    _section("instructions", table(tasks, ("episodes", "task")))
    _section("a robot for it, guessed from the names: save it as my_robot.py and correct every line", summary.robot)
    print(f"next  manipi check {quoted(path)}    manipi check {quoted(path)} --robot my_robot.py:ROBOT")
    return summary


def _checkpoint(path: Path) -> Any:
    from manipi.checkpoints.native import describe_checkpoint

    summary = describe_checkpoint(path)
    config, robot = summary.config, summary.robot
    _facts(
        str(path),
        model=f"{type(config.model).__name__}, {config.step:,} steps of training",
        files=f"{summary.num_files}, {summary.num_bytes / 1e6:,.1f} MB, every SHA-256 verified",
        normalisation=config.norm_mode,
        **summary.tokenizers,
        robot=f"{robot.name}, {robot.control_hz:g} Hz, {robot.state_size} state dimensions",
        cameras=", ".join(f"{slot} ← {key}" for slot, key in robot.cameras.items()),
        actions=", ".join(f"{type(group).__name__}({group.size})" for group in robot.actions),
    )
    counts = [*summary.parameters.items(), ("all", sum(summary.parameters.values()))]
    _section("parameters", table([(name, f"{count:>15,}") for name, count in counts]))
    _section("tokens", _draw(config.model))
    _section(f"norm stats of {summary.norm_stats.num_frames:,} frames", stats_table(summary.norm_stats, robot))
    print(f"next  manipi serve {quoted(path)}")
    return summary


def _recipe(target: str) -> Any:
    from manipi.recipes.registry import load_recipe
    from manipi.train.data import at_hand, prepare_to_look
    from manipi.transforms.pipeline import observation_of, token_layout, trace

    config = load_recipe(target)
    config = dataclasses.replace(config, model=config.policy_model)  # with the dtype that it computes in
    print(f"{target}\n")
    _section("config", "\n".join(_settings(config)))
    _section("tokens", _draw(config.model))
    paths = [one.path for one in config.data.datasets]
    own = bool(config.data.path) and "://" not in config.data.path
    if not own and not at_hand(config):
        found = f"not on this disk: {', '.join(paths)}" if paths else "the recipe has no dataset of its own"
        print(f"no frame to show: {found}\nnext  manipi train {quoted(target)} --data.path FOLDER")
        return {"config": config, "tokens": token_layout(config.model)}
    data = prepare_to_look(config)
    source = data.main.source
    frame = source.frames(data.main.rows[:1])[0]
    sample = observation_of(frame, config.robot)
    stages, rows = trace(source.pipeline, sample), []
    for stage in stages:
        rows.append((stage.step, "", "", "", "", ""))
        for key, v in stage.values.items():
            mark, shown = "•" if key in stage.changed else " ", _shape(v.shape) if v.text is None else f"{v.text!r}"
            limits = ("" if limit is None else f"{limit:.4g}" for limit in (v.min, v.max))
            rows.append((f"  {mark} {key}", v.dtype, shown, *limits, ""))
        if stage.removed:
            rows.append((f"  – without {', '.join(stage.removed)}", "", "", "", "", ""))
    encoded = source.pipeline.encode(sample)[0]
    tokens = encoded["tokens"][encoded["token_valid"]].tolist()
    steps = table(rows, ("", "dtype", "shape", "min", "max", ""))
    _section(f"the first frame, episode {frame.episode}, behind every step (• new or changed)", steps)
    _section(f"{len(tokens)} of {len(encoded['tokens'])} prompt tokens", f"{data.tokenizers.text.decode(tokens)!r}")
    print(_shorten(" ".join(map(str, tokens)), 4 * WIDTH))
    print(f"\n{data.longest}")
    found = {"stages": stages, "token_ids": tokens, "longest_prompt": data.longest}
    return {"config": config, "tokens": token_layout(config.model), **found}


def _facts(title: str, **facts: str) -> None:
    print(f"{title}\n\n{table([(f'  {name}', text) for name, text in facts.items()])}\n")


def _section(title: str, text: str) -> None:
    indented = "\n".join(f"  {line}".rstrip() for line in text.splitlines())
    print(f"{title}\n{indented}\n")


def _settings(config: Any, path: str = "") -> Iterator[str]:
    """One line per dataclass: its plain values; then the dataclasses inside it."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    inner = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
    plain = "  ".join(f"{name}={_short(value)}" for name, value in values.items() if name not in inner)
    yield textwrap.fill(f"{path:<20} {type(config).__name__}  {plain}", WIDTH, subsequent_indent=" " * 23)
    for name, value in inner.items():
        yield from _settings(value, f"{path}.{name}".strip("."))


def _short(value: Any) -> str:
    """As in a recipe's source: without the fields that have their default."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    if not dataclasses.is_dataclass(value):
        return str(value)
    fields = [field for field in dataclasses.fields(value) if getattr(value, field.name) != field.default]
    return f"{type(value).__name__}({', '.join(f'{f.name}={_short(getattr(value, f.name))}' for f in fields)})"


def _draw(model: Any) -> str:
    """The model's sequence as boxes, prefix and suffix below them."""
    from manipi.transforms.pipeline import token_layout

    parts = [(part, list(spans)) for part, spans in groupby(token_layout(model), key=lambda span: span.part)]
    boxes = [[f" {s.name} {s.tokens} " for s in spans] for _, spans in parts]
    widths = [len("│".join(row)) for row in boxes]
    below = [f" {part} {sum(s.tokens for s in spans)} " for part, spans in parts]
    brackets = "┴".join(text.center(width, "─") for text, width in zip(below, widths))
    grid = model.vision.image_size // model.vision.patch_size
    note = f"{grid}×{grid} image tokens per camera, {model.vision.patch_size} pixels each"
    return f"│{'│'.join('│'.join(row) for row in boxes)}│\n└{brackets}┘\n{note}"


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "1"


def _shorten(text: str, width: int = 60) -> str:
    return text if len(text) <= width else f"{text[: width - 2]} …"
