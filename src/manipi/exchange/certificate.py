"""What an import or export proves: nothing was lost, and the policy answers as it did before."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from manipi.checkpoints.native import Checkpoint
from manipi.checkpoints.sources import Source, stream_weights
from manipi.model import VLA, ModelInput
from manipi.model.config import ModelConfig, Pi0FastConfig
from manipi.robots.robot import Robot
from manipi.transforms import pipeline
from manipi.types import Sample

FAST_TOKENS = 8
"""How far π0-FAST's logits are compared. A whole chunk would read every weight hundreds of times."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Counts, dtypes, and one action chunk before and after."""

    source: str
    target: str
    layout: str
    tensors: int
    parameters: int
    dtypes_before: Mapping[str, int]
    dtypes_after: Mapping[str, int]
    unused: tuple[str, ...]
    """Tensors of the source that no computation reads, and that were left behind."""
    compared: str
    """`actions`, or `logits` for π0-FAST."""
    difference: float
    """Largest difference of one chunk [H, A] in normalised units, or of the logits."""
    magnitude: float
    """Largest number among those compared."""

    def rows(self) -> list[tuple[str, str]]:
        """For the screen."""
        dtypes = [", ".join(f"{n} {dtype}" for dtype, n in d.items()) for d in (self.dtypes_before, self.dtypes_after)]
        what = "one action chunk, normalised" if self.compared == "actions" else f"logits of {FAST_TOKENS} tokens"
        return [
            ("from", f"{self.source}  ({self.layout})"),
            ("to", self.target),
            ("tensors", f"{self.tensors:,} with {self.parameters:,} numbers, all accounted for"),
            ("dtypes", dtypes[0] if dtypes[0] == dtypes[1] else f"{dtypes[0]}  →  {dtypes[1]}"),
            *([("left behind", ", ".join(self.unused))] if self.unused else []),
            ("before, after", f"{what}: largest difference {self.difference:.3g} of {self.magnitude:.3g}"),
        ]


def certify(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """The largest difference and the largest magnitude."""
    return float(np.abs(before - after).max()), float(np.abs(before).max())


def count_dtypes(tensors: Iterable[torch.dtype]) -> dict[str, int]:
    return dict(Counter(str(dtype).removeprefix("torch.") for dtype in tensors))


def example_observation(robot: Robot, image_size: int) -> Sample:
    """Grey noise, every state at 0.5, and the robot's prompt: the same for everyone."""
    rng = np.random.default_rng(0)
    images = {key: rng.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8) for key in robot.cameras.values()}
    states = {s.key: np.full(s.size, 0.5, np.float32) for s in robot.state}
    return {**images, **states, "prompt": robot.default_prompt or "do the task"}  # type: ignore[dict-item]


def example_noise(config: ModelConfig) -> np.ndarray:
    """[H, A], the same for everyone."""
    return np.random.default_rng(1).normal(size=(config.action_horizon, config.action_dim)).astype(np.float32)


@torch.no_grad()
def answer(model: VLA, described: Checkpoint) -> np.ndarray:
    """What the model says to the example: a normalised action chunk [H, A], or logits [tokens, V]."""
    d = described
    steps = pipeline.build(d.robot, d.config.model, d.norm_stats, d.tokenizers, d.config.norm_mode)
    sample, _ = steps.encode(example_observation(d.robot, d.config.model.vision.image_size))
    inputs = ModelInput.from_numpy({key: np.asarray(value)[None] for key, value in sample.items()})
    if isinstance(d.config.model, Pi0FastConfig):
        out_BTD = model.gemma({"vlm": model.embed_prefix(inputs)})["vlm"]
        last = int(inputs.token_valid[0].sum())
        return model.gemma.logits(out_BTD[0, -inputs.tokens.shape[1] :][max(0, last - FAST_TOKENS) : last]).numpy()
    noise = torch.from_numpy(example_noise(d.config.model))[None]
    return model.sample(inputs, noise, d.config.num_steps)[0].numpy()


def answer_of_weights(weights: Mapping[str, Tensor], described: Checkpoint) -> np.ndarray:
    """The answer of weights in memory, or mapped into it."""
    model = _meta(described.config.model)
    model.load_state_dict(dict(weights), strict=True, assign=True)
    return answer(model.eval(), described)


def answer_of_source(source: Source, described: Checkpoint) -> np.ndarray:
    """The answer of a foreign checkpoint in its own dtype, one layer in memory at a time."""
    return answer_streamed(source.reader(described.config.model), described)


def answer_streamed(reader: Callable[[str], Tensor], described: Checkpoint) -> np.ndarray:
    """The answer of weights that are read by name when their layer runs."""
    model = _meta(described.config.model)
    stream_weights(model, reader)
    return answer(model.eval(), described)


def _meta(config: ModelConfig) -> VLA:
    """Computing in float32, which shows the weights' differences rather than the computation's roundings."""
    with torch.device("meta"):
        return VLA(replace(config, dtype="float32"))
