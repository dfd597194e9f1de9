"""What is in a checkpoint. Weights are not loaded: their shapes stand in the file's header."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from manipi.checkpoints.native import PolicyConfig, verify
from manipi.model.config import CONFIG_TYPES
from manipi.records import from_json, read_json
from manipi.robots.robot import Robot
from manipi.tokenizers import Tokenizers
from manipi.transforms.normalize import load_norm_stats
from manipi.types import NormStats

_EXPERT = re.compile(r"\b(?:experts|final_norms)\.(\w+)\.")


@dataclass(frozen=True, kw_only=True)
class CheckpointSummary:
    """A checkpoint at a glance; its hashes were verified."""

    folder: str
    num_files: int
    num_bytes: int
    config: PolicyConfig
    parameters: Mapping[str, int]
    """By part of the model."""
    robot: Robot
    norm_stats: NormStats
    tokenizers: Mapping[str, str]


def describe_checkpoint(folder: Path) -> CheckpointSummary:
    """Raises CheckpointError where there is none, IntegrityError where a file is missing or altered."""
    verify(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    tokenizers = Tokenizers.load(folder / "tokenizer")
    spoken = {"text": f"{tokenizers.text.reference.kind}, {tokenizers.text.vocab_size:,} ids"}
    if tokenizers.action is not None:
        spoken["actions"] = f"{tokenizers.action.kind}, {tokenizers.action.vocab_size:,} codes"
    config = from_json(read_json(folder / "config.json"), (PolicyConfig, *CONFIG_TYPES), str(folder / "config.json"))
    return CheckpointSummary(
        folder=str(folder),
        num_files=len(files),
        num_bytes=sum(path.stat().st_size for path in files),
        config=config,
        parameters=count_parameters(folder / "model.safetensors"),
        robot=Robot.from_json(read_json(folder / "robot.json"), str(folder / "robot.json")),
        norm_stats=load_norm_stats(folder / "norm_stats.json"),
        tokenizers=spoken,
    )


def count_parameters(weights: Path) -> dict[str, int]:
    """Numbers in a safetensors file by part: vision, token embedding, each expert of the transformer, head."""
    counts = Counter[str]()
    with safe_open(weights, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 (the file is no mapping)
            expert = _EXPERT.search(name)
            part = f"{expert.group(1)} expert" if expert else name.removeprefix("gemma.").partition(".")[0]
            counts[part.replace("_", " ")] += math.prod(file.get_slice(name).get_shape())
    return dict(counts)
