"""A checkpoint before any training: random weights, and everything else that serving needs."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from manipi.checkpoints.native import Checkpoint, PolicyConfig, read_description, write_checkpoint
from manipi.model import VLA
from manipi.policy import Policy, self_test_for
from manipi.robots.robot import Robot
from manipi.storage import require_absent
from manipi.tokenizers import Tokenizers
from manipi.train.config import TrainConfig
from manipi.train.data import fit_dct
from manipi.transforms.normalize import contract
from manipi.types import FieldStats, NormStats, Sample
from manipi.weights.layouts import open_action_tokenizer, open_text_tokenizer


def write_untrained(target: Path, source: TrainConfig | Path, *, seed: int = 0) -> None:
    """Write a checkpoint that can be served: to try a loop without training, and as a control.

    Args:
        source: a recipe's config, whose robot has no dataset yet: state and actions are then taken as they are, as if
            from -1 to 1; of action tokenizers that would be fitted to data, binning replaces FAST, and fixed codes
            are fitted to poses that are held. Or a checkpoint, whose norm stats and tokenizers stay.
        seed: of the weights.

    Raises:
        StorageError: `target` exists, or there is no room.
        CheckpointError: the checkpoint is incomplete.
        TokenizerError, FetchError: the recipe's tokenizer cannot be had.
    """
    require_absent(target)
    bare = _described(source) if isinstance(source, TrainConfig) else read_description(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = VLA(bare.config.model).state_dict()
    checkpoint = replace(bare, weights=weights, config=replace(bare.config, step=0))
    test = self_test_for(Policy.from_checkpoint(checkpoint), _example(bare.robot, bare.config.model.vision.image_size))
    write_checkpoint(target, replace(checkpoint, self_test=test))


def _described(config: TrainConfig) -> Checkpoint:
    model, robot, action = config.policy_model, config.robot, None
    if model.writes_codes:
        held = np.linspace(-1, 1, 64)[:, None, None] * np.ones((model.action_horizon, robot.model_action_size))
        named = "binning" if config.action_tokenizer == "fit" else config.action_tokenizer
        action = fit_dct(model, held) if named == "dct" else open_action_tokenizer(named)
    sampling = PolicyConfig(model=model, norm_mode=config.norm_mode, step=0, max_delay=config.max_delay)
    return Checkpoint(
        weights={},
        config=sampling,
        robot=robot,
        norm_stats=NormStats(
            state=_as_it_is(robot.state_size),
            actions=_as_it_is(robot.model_action_size),
            num_frames=0,
            contract=contract(robot, model.action_horizon),
            data=hashlib.sha256(b"no data").hexdigest(),
        ),
        tokenizers=Tokenizers(open_text_tokenizer(config.tokenizer, action), action),
        self_test=None,
    )


def _as_it_is(size: int) -> FieldStats:
    zero, one = np.zeros(size), np.ones(size)
    return FieldStats(mean=zero, std=one, q01=-one, q99=one, min=-one, max=one)


def _example(robot: Robot, image_size: int) -> Sample:
    """Grey noise, every state at 0.5, and the robot's prompt."""
    rng = np.random.default_rng(0)
    images = {key: rng.integers(0, 256, (image_size, image_size, 3), np.uint8) for key in robot.cameras.values()}
    states = {s.key: np.full(s.size, 0.5, np.float32) for s in robot.state}
    return {**images, **states, "prompt": robot.default_prompt or "do the task"}  # type: ignore[dict-item]
