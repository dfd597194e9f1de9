"""What a run says about held-out episodes while it goes on, without changing it by a bit.

The weights are those that would be served now. Numbers go to `validation.jsonl`, one line each time, and in full to
`validation/STEP.json`; pictures are beside it. Which checkpoint is the best follows from them: `Run.best`.

Of each dataset some frames are encoded once, and asked again at every validation:

    held-out frames ──► loss, with the same noise each time ──────────── beside the loss of as many training frames
                    ├─► sampled chunks ──► error per step and dimension  beside holding position and the mean action
                    └─► other prompts ──► how far the chunks move ────── beside their error and what other noise does

Frames, noise and timesteps are a function of the seed and the data: two validations differ by their weights alone.
π0-FAST has token accuracy in place of noise, and fewer chunks, since it writes them token by token.

Shape letters: n frames, K noise draws; H action horizon, A dimensions of the robot's command.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from tqdm import tqdm

from manipi.data.action_error import (
    ChunkError,
    baselines,
    chunk_error,
    evenly_spaced,
    recorded_chunks,
    travel_of,
)
from manipi.data.dataset import command_names, command_units, label
from manipi.data.feed.loader import Batch
from manipi.errors import ConfigError
from manipi.model import VLA, ModelInput
from manipi.model.autoregressive import TokenLoss
from manipi.model.config import Pi0FastConfig
from manipi.policy import Policy
from manipi.records import json_bytes
from manipi.storage import atomic_write
from manipi.train.config import TrainConfig
from manipi.train.data import TrainingData, TrainingSet
from manipi.train.run.folder import Run, append_log, read_log
from manipi.train.step.step import draw_noise
from manipi.train.watch.progress import figure
from manipi.transforms.pipeline import observation_of
from manipi.types import Frame, NormStats, Sample

# The frames of one dataset --------------------------------------------------------------------------------------------


DRAWS = 2
"""Chunks that a flow policy samples per frame: how far they are apart is the noise's doing."""
FEWER = 8
"""One frame in so many is asked with other prompts, and with π0-FAST at all."""
_SEEN = ("images", "image_valid", "state", "action_dim_valid", "past_images", "past_states", "past_valid")
"""What a policy is shown beside the prompt."""


@dataclass(frozen=True, kw_only=True)
class PromptProbe:
    """How far chunks move: mean absolute difference as a share of the travel."""

    prompts: int
    """Different ones among the frames that were read."""
    blank: float
    """When the prompt is empty."""
    swapped: float | None
    """When it is another frame's; None where there is one prompt only."""
    noise: float | None
    """When the noise is another; None for π0-FAST."""


@dataclass(frozen=True, kw_only=True)
class SetResult:
    """One validation of one dataset."""

    dataset: str
    robot: str
    control_hz: float
    weight: float
    frames: int
    loss: float
    train_loss: float
    raw_loss: float | None
    """Of the weights that are not averaged, where asked for."""
    token_accuracy: float | None
    """π0-FAST only."""
    dimensions: tuple[str, ...]
    units: tuple[str, ...]
    travel: Float[np.ndarray, "A"]
    errors: dict[str, ChunkError]
    """Of the policy and of the baselines, on the frames that it was asked at."""
    probe: PromptProbe


class HeldOutFrames:
    """Everything about some frames of a dataset that does not depend on weights; pictures stay at the model's size."""

    def __init__(self, one: TrainingSet, stats: NormStats, config: TrainConfig):
        self._set, self._stats, self._config = one, stats, config
        self._fast = isinstance(config.model, Pi0FastConfig)
        self._robot, dataset, count = one.source.pipeline.robot, one.source.dataset, config.validation.samples
        rows = evenly_spaced(one.held_out, count)
        few = evenly_spaced(np.arange(len(rows)), -(-len(rows) // FEWER))
        self._asked = few if self._fast else np.arange(len(rows))
        self._probed = np.searchsorted(self._asked, few)
        self._read(rows, evenly_spaced(one.rows, count))
        horizon = config.model.action_horizon
        size = (DRAWS, horizon, config.model.action_dim)
        self._noise, self._timesteps = draw_noise(config.seed, -1, count, *size)
        self._travel = travel_of(self._robot, dataset, one.rows)
        self._recorded, self._valid = recorded_chunks(self._robot, dataset, rows[self._asked], horizon)
        simple = baselines(self._robot, dataset, rows[self._asked], one.rows, horizon)
        self._baselines = {name: self._error(chunks[:, None]) for name, chunks in simple.items()}

    def measure(self, policy: Policy, raw: VLA | None) -> SetResult:
        """What `policy` makes of the frames, and the loss of the `raw` weights, if any."""
        if policy.robot != self._robot:
            policy = Policy(policy.model, policy.config, self._robot, self._stats, policy.tokenizers)
        model = policy.model
        assert isinstance(model, VLA), "an engine has no loss"
        loss, accuracy = self._loss(model, self._held_out)
        own = self._chunks(policy, "own", self._asked)
        return SetResult(
            dataset=self._set.source.dataset.name,
            robot=self._robot.name,
            control_hz=self._robot.control_hz,
            weight=self._set.weight,
            frames=len(self._held_out["state"]),
            loss=loss,
            train_loss=self._loss(model, self._training)[0],
            raw_loss=self._loss(raw, self._held_out)[0] if raw is not None else None,
            token_accuracy=accuracy,
            dimensions=command_names(self._robot, self._set.source.dataset),
            units=command_units(self._robot),
            travel=self._travel,
            errors={"policy": self._error(own), **self._baselines},
            probe=self._probe(policy, own),
        )

    # ---- reading, once

    def _read(self, rows: np.ndarray, train_rows: np.ndarray) -> None:
        pipeline, prompts, shown = self._set.source.pipeline, set[str](), list[tuple[Sample, str]]()
        training, held_out, own = list[Sample](), list[Sample](), list[Sample]()
        self._seen: list[list[Sample]] = []
        for frame in self._frames(train_rows):
            training.append(pipeline.encode_frame(frame))
            prompts.add(frame.prompt)
        for i, frame in enumerate(self._frames(rows)):
            held_out.append(pipeline.encode_frame(frame))
            prompts.add(frame.prompt)
            if i in self._asked:
                observation = observation_of(frame, self._robot)
                del observation["actions"], observation["action_valid"]
                question, seen = pipeline.encode(observation)
                own.append(_tokens(question))
                # Decoding needs no pictures.
                self._seen.append([{k: v for k, v in sample.items() if np.ndim(v) < 3} for sample in seen])
                if len(own) - 1 in self._probed:
                    shown.append((observation, frame.prompt))
        self._training, self._held_out, self._prompts = _stack(training), _stack(held_out), sorted(prompts)
        self._questions = {"own": _stack(own)}
        another = dict(zip(self._prompts, self._prompts[1:] + self._prompts[:1], strict=True))
        for name, change in (("blank", dict.fromkeys(prompts, "")), ("swapped", another)):
            asked = [pipeline.encode({**observation, "prompt": change[prompt]})[0] for observation, prompt in shown]
            self._questions[name] = _stack([_tokens(question) for question in asked])

    def _frames(self, rows: np.ndarray) -> Iterator[Frame]:
        for block in self._blocks(len(rows)):
            yield from self._set.source.frames(rows[block])

    def _blocks(self, count: int) -> list[slice]:
        size = self._config.validation.batch_size
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    # ---- measuring

    @torch.no_grad()
    def _loss(self, model: VLA, batch: Batch) -> tuple[float, float | None]:
        """The loss over all frames, as one batch would have it, and π0-FAST's token accuracy."""
        device = next(model.parameters()).device
        losses, hits, weights = [], [], []
        for block in self._blocks(len(batch["state"])):
            inputs = ModelInput.from_numpy({key: value[block] for key, value in batch.items()}, device)
            draw = () if self._fast else (self._noise[block, :1].to(device), self._timesteps[block, :1].to(device))
            result = model(inputs, *draw)
            losses.append(result.loss.reshape(-1).tolist())
            weights.append(result.weight.reshape(-1).tolist())
            if isinstance(result, TokenLoss):
                hits.append(float(result.accuracy))
        accuracy = float(np.average(hits, weights=np.array(weights)[:, 0])) if hits else None
        terms = zip(np.array(losses).T.copy(), np.array(weights).T.copy(), strict=True)  # of a joint loss several
        means = [np.average(values, weights=counts) if counts.any() else 0.0 for values, counts in terms]
        joint = getattr(model.config, "joint", None)
        return float(means[0] if joint is None else np.dot(means, joint.weights)), accuracy

    def _chunks(self, policy: Policy, question: str, frames: np.ndarray) -> Float[np.ndarray, "n K H A"]:
        """The policy's chunks at some held-out frames in the robot's units, one per noise draw."""
        device, tokens, decoded = next(policy.model.parameters()).device, self._questions[question], []
        places = np.searchsorted(self._asked, frames)
        for block in self._blocks(len(frames)):
            shown = {key: self._held_out[key][frames[block]] for key in _SEEN if key in self._held_out}
            inputs = ModelInput.from_numpy({**shown, **{k: v[block] for k, v in tokens.items()}}, device)
            if self._fast:
                answers = policy.run_model(inputs, None)[:, None]
            else:
                answers = policy.run_model(inputs, self._noise[frames[block]].numpy())
            for place, draws in zip(places[block], answers, strict=True):
                decoded.append([policy.pipeline.decode(answer, self._seen[place]) for answer in draws])
        return np.array(decoded)

    def _probe(self, policy: Policy, own: np.ndarray) -> PromptProbe:
        frames, mine = self._asked[self._probed], own[self._probed]

        def moved(question: str) -> float:
            return self._error(mine, self._chunks(policy, question, frames), self._probed).share_of_travel

        return PromptProbe(
            prompts=len(self._prompts),
            blank=moved("blank"),
            swapped=moved("swapped") if len(self._prompts) > 1 else None,
            noise=None if self._fast else self._error(own[:, :1], own[:, 1:]).share_of_travel,
        )

    def _error(
        self, chunks: np.ndarray, others: np.ndarray | None = None, places: np.ndarray | slice = slice(None)
    ) -> ChunkError:
        """Of chunks [n, K, H, A] from others, or from what was recorded; every noise draw counts the same."""
        chunks, others = np.broadcast_arrays(chunks, self._recorded[:, None] if others is None else others)
        valid = np.broadcast_to(self._valid[places][:, None], chunks.shape[:3])
        pairs = (chunks.reshape(-1, *chunks.shape[2:]), others.reshape(-1, *others.shape[2:]))
        return chunk_error(*pairs, valid.reshape(-1, valid.shape[2]), self._travel)


def _tokens(sample: Sample) -> Sample:
    return {key: value for key, value in sample.items() if key.startswith("token")}


def _stack(samples: Sequence[Sample]) -> Batch:
    return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}


# The validations of a run ---------------------------------------------------------------------------------------------


IGNORED = 0.05
"""Prompts count as ignored where another one moves the chunks by less than this share of their error."""


Rollouts: TypeAlias = Callable[[Policy, Path, bool], Mapping[str, float]]
"""Drives a simulated robot with a policy, and keeps the trials in a folder; the last argument: whether to show a bar.

Returns `success`, its interval `success_low` and `success_high`, and `trials`, the same for the same weights.
`manipi.cli.train.rollouts_of` has the one of `manipi train`: servers and simulators are no part of training.
"""


class Validation:
    """The validations of a run.

    Args:
        rollouts: of `validation.suite`; None where that is empty.
        show: print a line or two per validation.

    Raises:
        ConfigError: there is a suite, and nothing that drives the robot in it.
    """

    def __init__(self, run: Run, data: TrainingData, *, rollouts: Rollouts | None = None, show: bool):
        self._run, self._data, self._rollouts, self._show = run, data, rollouts, show
        self._held_out = [one for one in data.robot_sets if len(one.held_out)]
        config = run.config
        if config.validation.suite and rollouts is None:
            raise ConfigError(
                expected=f"`rollouts`, which drive a robot in the suite {config.validation.suite}",
                found="none",
                where="run_training",
                next="manipi train, which has them; or give manipi.cli.train.rollouts_of(config), or no suite",
            )
        if not show or not config.validation.every:
            return
        if without := [one.source.dataset.name for one in data.robot_sets if not len(one.held_out)]:
            tqdm.write(
                f"no validation on {', '.join(without)}: no episode is held out (--data.holdout 0.1: a tenth is)"
            )
        if (self._held_out or rollouts) and math.lcm(config.validation.every, config.save_every) > config.steps:
            tqdm.write(
                "no step before the last is both validated and saved, and could be the best checkpoint: "
                "make --validation.every a multiple of --save-every and smaller than --steps"
            )

    def due(self, step: int) -> bool:
        """Whether there is one after so many steps."""
        every, wanted = self._run.config.validation.every, self._held_out or self._rollouts
        return bool(every and wanted and (step % every == 0 or step == self._run.config.steps))

    def measure(self, policy: Policy, raw: VLA) -> None:
        """See what the policy makes of held-out frames; `conclude` then goes on.

        Args:
            policy: the one that would be served.
            raw: with the weights that are being trained.
        """
        self._began, self._policy = time.perf_counter(), policy
        self._results = [one.measure(policy, raw if self._run.config.validation.raw else None) for one in self._frames]

    def conclude(self, step: int) -> dict[str, float]:
        """Drive a robot where there is a suite, write numbers and pictures, and say how it stands.

        Returns:
            The numbers, as loggers name them: `val/loss` and so on.

        Raises:
            SimulatorError: from the rollouts, as they say.
        """
        folder, results = self._run.folder / "validation", self._results
        numbers = summary(results)
        if self._rollouts is not None:
            trials = folder / f"{step}.trials"
            shutil.rmtree(trials, ignore_errors=True)  # of a run that was killed before its checkpoint
            numbers |= self._rollouts(self._policy, trials, self._show)
        record = {"step": step, **numbers, "seconds": time.perf_counter() - self._began, "time": time.time()}
        atomic_write(folder / f"{step}.json", json_bytes({**record, "sets": results}))
        if results:
            plot_errors(results, step, folder / f"{step}.png")
        append_log(self._run.validations, record)
        plot_curves(read_log(self._run.validations), self._run.read_metrics(), folder / "curves.png")
        if self._show:
            for line in (_sentence(record), *map(_about_prompts, results)):
                tqdm.write(line)
        return {f"val/{name}": value for name, value in numbers.items()}

    @cached_property
    def _frames(self) -> list[HeldOutFrames]:
        """Read at the first validation, not before the first step."""
        stats = self._data.stats
        return [HeldOutFrames(o, stats[o.source.pipeline.robot.name], self._run.config) for o in self._held_out]


def summary(results: Sequence[SetResult]) -> dict[str, float]:
    """The numbers of a validation: means over its datasets, by their weights in the mixture, of those that have one."""

    means: dict[str, float] = {}
    columns = {
        **{name: [getattr(r, name) for r in results] for name in ("loss", "train_loss", "raw_loss", "token_accuracy")},
        "action_error": [r.errors["policy"].share_of_travel for r in results],
        "hold_error": [r.errors["holding position"].share_of_travel for r in results],
        "mean_error": [r.errors["the mean action"].share_of_travel for r in results],
        "blank_prompt": [r.probe.blank for r in results],
        "swapped_prompt": [r.probe.swapped for r in results],
        "other_noise": [r.probe.noise for r in results],
    }
    for name, values in columns.items():
        if known := [(value, r.weight) for value, r in zip(values, results, strict=True) if value is not None]:
            means[name] = float(np.average([v for v, _ in known], weights=[w for _, w in known]))
    return means


def _sentence(record: dict[str, Any]) -> str:
    said = []
    if "success" in record:
        interval = f"{record['success_low']:.1%} to {record['success_high']:.1%} of {record['trials']} trials"
        said.append(f"success {record['success']:.1%} ({interval})")
    if "loss" in record:
        said.append(f"loss {record['loss']:.4f} (training frames {record['train_loss']:.4f})")
        said += [f"tokens right {record['token_accuracy']:.1%}"] if "token_accuracy" in record else []
        simple = f"holding position {record['hold_error']:.2%}, the mean action {record['mean_error']:.2%}"
        said.append(f"action error {record['action_error']:.2%} of the travel ({simple})")
    return f"validation  step {record['step']}: {', '.join(said)}"


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


# Pictures -------------------------------------------------------------------------------------------------------------


POLICY, TRAINING = "#0b6e99", "#c46a1b"
SIMPLE = {"holding position": ("#c46a1b", "--"), "the mean action": ("#555555", ":")}


def plot_curves(validations: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses; action error beside the baselines; what prompts do; success, of a suite. One panel each."""
    steps, driven = [v["step"] for v in validations], "success" in validations[-1]
    with figure(path, figsize=(16 if driven else 12, 3.6)) as drawing:
        loss, error, prompts, *more = drawing.subplots(1, 4 if driven else 3)
        if driven:
            low, high = ([100 * v.get(f"success_{end}", np.nan) for v in validations] for end in ("low", "high"))
            more[0].fill_between(steps, low, high, color=POLICY, alpha=0.18, linewidth=0, label="95 % interval")
            _curve(more[0], steps, validations, "success", POLICY, "success", 100)
            more[0].set(title="success in the simulator", ylabel="% of the trials", ylim=(0, 100))
        loss.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], color="#cccccc", label="training batches")
        _curve(loss, steps, validations, "train_loss", TRAINING, "fixed training frames")
        _curve(loss, steps, validations, "loss", POLICY, "held-out frames")
        if "raw_loss" in validations[-1]:
            _curve(loss, steps, validations, "raw_loss", "#6b4c9a", "held-out, not averaged")
        loss.set(title="loss", yscale="log")
        _curve(error, steps, validations, "action_error", POLICY, "policy", 100)
        for key, name in (("hold_error", "holding position"), ("mean_error", "the mean action")):
            colour, style = SIMPLE[name]
            if key not in validations[-1]:  # no episode is held out
                continue
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
        for axis in (loss, error, prompts, *more):
            axis.set_xlabel("step")
            axis.grid(alpha=0.25)
            if axis.get_legend_handles_labels()[0]:
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
