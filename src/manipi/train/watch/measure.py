"""One dataset's part of a validation: some of its frames, encoded once, and what a policy makes of them.

    held-out frames ──► loss, with the same noise each time ──────────── beside the loss of as many training frames
                    ├─► sampled chunks ──► error per step and dimension  beside holding position and the mean action
                    └─► other prompts ──► how far the chunks move ────── beside their error and what other noise does

Frames, noise and timesteps are a function of the seed and the data: two validations differ by their weights alone.
π0-FAST has token accuracy in place of noise, and fewer chunks, since it writes them token by token.

Shape letters: n frames, K noise draws; H action horizon, A dimensions of the robot's command.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from manipi.data.action_error import (
    ChunkError,
    baselines,
    chunk_error,
    evenly_spaced,
    recorded_chunks,
    travel_of,
)
from manipi.data.dimensions import command_names, command_units
from manipi.data.feed.loader import Batch
from manipi.model import VLA, ModelInput
from manipi.model.autoregressive import TokenLoss
from manipi.model.config import Pi0FastConfig
from manipi.policy import Policy
from manipi.train.config import TrainConfig
from manipi.train.data import TrainingSet
from manipi.train.step.step import draw_noise
from manipi.transforms.pipeline import observation_of
from manipi.types import Frame, NormStats, Sample

DRAWS = 2
"""Chunks that a flow policy samples per frame: how far they are apart is the noise's doing."""
FEWER = 8
"""One frame in so many is asked with other prompts, and with π0-FAST at all."""
_SEEN = ("images", "image_valid", "state", "action_dim_valid")
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
                self._seen.append([_without_pictures(sample) for sample in seen])
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
            losses.append(float(result.loss))
            weights.append(float(result.weight))
            if isinstance(result, TokenLoss):
                hits.append(float(result.accuracy))
        accuracy = float(np.average(hits, weights=weights)) if hits else None
        return float(np.average(losses, weights=weights)), accuracy

    def _chunks(self, policy: Policy, question: str, frames: np.ndarray) -> Float[np.ndarray, "n K H A"]:
        """The policy's chunks at some held-out frames in the robot's units, one per noise draw."""
        device, tokens, decoded = next(policy.model.parameters()).device, self._questions[question], []
        places = np.searchsorted(self._asked, frames)
        for block in self._blocks(len(frames)):
            shown = {key: self._held_out[key][frames[block]] for key in _SEEN}
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


def _without_pictures(sample: Sample) -> Sample:
    """Decoding needs none."""
    return {key: value for key, value in sample.items() if np.ndim(value) < 3}


def _stack(samples: Sequence[Sample]) -> Batch:
    return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
