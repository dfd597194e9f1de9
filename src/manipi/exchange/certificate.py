"""What an import or export proves: nothing was lost, and the policy answers as it did before."""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from manipi.checkpoints.native import Checkpoint, SelfTest, seal, write_description
from manipi.errors import SelfTestError
from manipi.model import VLA, ModelInput
from manipi.model.config import ModelConfig, Pi0FastConfig
from manipi.policy import SELF_TEST_TOLERANCE, Policy
from manipi.transforms import pipeline
from manipi.types import Sample
from manipi.weights.layouts import ForeignWeights
from manipi.weights.stores import ArrayInfo, write_safetensors

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
    unused: tuple[str, ...] = ()
    """Tensors of the source that no computation reads, and that were left behind."""
    compared: str
    """`actions`, or `logits` for π0-FAST."""
    difference: float
    """Largest difference of one chunk [H, A] in normalised units, or of the logits."""
    magnitude: float
    """Largest number among those compared."""
    said: tuple[str, ...] = ()
    """What the files beside imported weights say of the policy."""

    def rows(self) -> list[tuple[str, str]]:
        """For the screen."""
        dtypes = [", ".join(f"{n} {dtype}" for dtype, n in d.items()) for d in (self.dtypes_before, self.dtypes_after)]
        what = "one action chunk, normalised" if self.compared == "actions" else f"logits of {FAST_TOKENS} tokens"
        return [
            ("from", self.source),
            ("to", self.target),
            ("layout", self.layout),
            ("tensors", f"{self.tensors:,} with {self.parameters:,} numbers, all accounted for"),
            ("dtypes", dtypes[0] if dtypes[0] == dtypes[1] else f"{dtypes[0]}  →  {dtypes[1]}"),
            *([("left behind", ", ".join(self.unused))] if self.unused else []),
            *(("its files say" if not number else "", text) for number, text in enumerate(self.said)),
            ("before, after", f"{what}: largest difference {self.difference:.3g} of {self.magnitude:.3g}"),
        ]


def certify(
    source: str,
    target: Path,
    layout: str,
    before: np.ndarray,
    after: np.ndarray,
    *,
    model: ModelConfig,
    read: Iterable[torch.dtype],
    written: Mapping[str, ArrayInfo],
) -> Certificate:
    """The certificate of an import or export.

    Args:
        before, after: answers, as of `answer`.
        read: dtypes of the tensors that were read.
        written: shape and dtype of ours, as they were written.

    Raises:
        SelfTestError: the answers differ by more than the written dtypes explain.
    """
    dtypes = count_dtypes(info.dtype for info in written.values())
    difference, magnitude = float(np.abs(before - after).max()), float(np.abs(before).max())
    tolerance = SELF_TEST_TOLERANCE["bfloat16" if "bfloat16" in dtypes else "float32"] * magnitude
    if not difference <= tolerance:
        raise SelfTestError(
            expected=f"the answer of before, within {tolerance:.2g}",
            found=f"a largest difference of {difference:.3g}",
            where=f"{source} → {target} ({layout})",
            next="keep the weights' dtype (--dtype stored); with that it is a defect of manipi's: report it",
        )
    return Certificate(
        source=source,
        target=str(target),
        layout=layout,
        tensors=len(written),
        parameters=sum(torch.Size(info.shape).numel() for info in written.values()),
        dtypes_before=count_dtypes(read),
        dtypes_after=dtypes,
        compared="logits" if isinstance(model, Pi0FastConfig) else "actions",
        difference=difference,
        magnitude=magnitude,
    )


def count_dtypes(tensors: Iterable[torch.dtype]) -> dict[str, int]:
    """How many tensors of each dtype, by its name."""
    return dict(Counter(str(dtype).removeprefix("torch.") for dtype in tensors))


def example(described: Checkpoint) -> tuple[Sample, np.ndarray]:
    """An observation and noise [H, A], the same for everyone: grey noise, every state at 0.5, the robot's prompt."""
    robot, model, rng = described.robot, described.config.model, np.random.default_rng(0)
    shape = (model.vision.image_size, model.vision.image_size, 3)
    images = {key: rng.integers(0, 256, shape, dtype=np.uint8) for key in robot.cameras.values()}
    states = {s.key: np.full(s.size, 0.5, np.float32) for s in robot.state}
    noise = np.random.default_rng(1).normal(size=(model.action_horizon, model.action_dim)).astype(np.float32)
    return {**images, **states, "prompt": robot.default_prompt or "do the task"}, noise  # type: ignore[dict-item]


def write_streamed(
    folder: Path, described: Checkpoint, infos: Mapping[str, ArrayInfo], tensors: Iterable[tuple[str, Tensor]]
) -> Checkpoint:
    """Write our checkpoint into an existing folder, tensor by tensor, with a self-test. Returns what was written.

    Args:
        described: all but the weights.
        infos: shape and dtype of every tensor; `tensors` are in them.
    """
    write_safetensors(folder / "model.safetensors", infos, tensors)
    written = replace(described, weights=load_file(folder / "model.safetensors"))
    observation, noise = example(written)
    actions = Policy.from_checkpoint(written).infer(observation, noise)["actions"]
    write_description(folder, replace(written, self_test=SelfTest(observation, noise, actions)))
    seal(folder)
    return written


@torch.no_grad()
def answer(model: VLA, described: Checkpoint) -> np.ndarray:
    """What the model says to the example: a normalised action chunk [H, A], or logits [tokens, V]."""
    d = described
    steps = pipeline.build(d.robot, d.config.model, d.norm_stats, d.tokenizers, d.config.norm_mode)
    observation, noise = example(d)
    sample, _ = steps.encode(observation)
    inputs = ModelInput.from_numpy({key: np.asarray(value)[None] for key, value in sample.items()})
    if isinstance(d.config.model, Pi0FastConfig):
        out_BTD = model.gemma({"vlm": model.embed_prefix(inputs)})["vlm"]
        last = int(inputs.token_valid[0].sum())
        return model.gemma.logits(out_BTD[0, -inputs.tokens.shape[1] :][max(0, last - FAST_TOKENS) : last]).numpy()
    return model.sample(inputs, torch.from_numpy(noise)[None], d.config.num_steps)[0].numpy()


def answer_of_weights(checkpoint: Checkpoint) -> np.ndarray:
    """The answer of weights in memory, or mapped into it."""
    model = _meta(checkpoint.config.model)
    model.load_state_dict(dict(checkpoint.weights), strict=True, assign=True)
    return answer(model.eval(), checkpoint)


def answer_of_foreign(foreign: ForeignWeights, described: Checkpoint) -> np.ndarray:
    """The answer of a foreign checkpoint's weights as they are stored, one layer in memory at a time.

    Each layer gets its weights when it runs, and loses them afterwards. The token embedding, which is used outside a
    layer's call, stays.
    """
    read = foreign.reader(described.config.model)
    model = _meta(described.config.model)

    def fill(prefix: str, names: list[str], module: nn.Module, *_: Any) -> None:
        for name in names:
            setattr(module, name, nn.Parameter(read(f"{prefix}.{name}"), requires_grad=False))

    def clear(names: list[str], module: nn.Module, *_: Any) -> None:
        for name in names:
            empty = torch.empty_like(getattr(module, name), device="meta")
            setattr(module, name, nn.Parameter(empty, requires_grad=False))

    for prefix, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if "token_embedding" in names:
            fill(prefix, names, module)
        elif names:
            module.register_forward_pre_hook(functools.partial(fill, prefix, names))
            module.register_forward_hook(functools.partial(clear, names))
    return answer(model.eval(), described)


def _meta(config: ModelConfig) -> VLA:
    """Computing in float32, which shows the weights' differences rather than the computation's roundings."""
    with torch.device("meta"):
        return VLA(replace(config, dtype="float32"))
