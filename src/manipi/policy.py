"""A policy: observation in, action chunk out, through the same pipeline that trained it."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manipi.checkpoints.native import Checkpoint, PolicyConfig, SelfTest, read_checkpoint
from manipi.errors import ConfigError, SelfTestError, WeightsMismatchError, unknown_name
from manipi.model import VLA, ModelInput
from manipi.model.config import Pi0FastConfig
from manipi.robots.robot import Robot
from manipi.tokenizers import CodeConstraint, Tokenizers
from manipi.transforms import pipeline
from manipi.transforms.tokenize import code_constraint
from manipi.types import NormStats, Observation

SELF_TEST_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest difference in normalised units between the trainer's actions and the loaded policy's."""


class Policy:
    """Model, pipeline and robot together.

    Args:
        model: in evaluation mode, on the device where it shall run.
        seed: of the noise that `infer` draws when none is given.
    """

    def __init__(
        self, model: VLA, config: PolicyConfig, robot: Robot, stats: NormStats, tokenizers: Tokenizers, *, seed: int = 0
    ):
        self.model, self.config, self.robot, self.tokenizers, self.norm_stats = model, config, robot, tokenizers, stats
        self.pipeline = pipeline.build(robot, config.model, stats, tokenizers, config.norm_mode)
        self._constraint = (
            code_constraint(config.model, tokenizers, robot.model_action_size)
            if isinstance(config.model, Pi0FastConfig)
            else None
        )
        self._device = next(model.parameters()).device
        self._seed = seed
        self.reset()

    @staticmethod
    def load(folder: Path, *, robot: str | None = None, device: str = "cpu", seed: int = 0) -> "Policy":
        """Read a checkpoint, verify its hashes and replay its self-test.

        Args:
            robot: which of those that it was trained on; None: the recipe's own.

        Raises:
            CheckpointError: the folder is incomplete or altered, or the self-test does not repeat.
            UnknownNameError: it was not trained on that robot.
        """
        checkpoint = read_checkpoint(Path(folder))
        assert checkpoint.self_test is not None
        policy = Policy.from_checkpoint(checkpoint, device=device, seed=seed)
        policy.check(checkpoint.self_test, where=str(folder))
        if robot in (None, policy.robot.name):
            return policy
        if robot not in checkpoint.other_robots:
            known = (policy.robot.name, *checkpoint.other_robots)
            raise unknown_name(f"robot of {folder}", robot, known, next="serve it to a robot that it was trained on")
        return Policy(policy.model, policy.config, *checkpoint.other_robots[robot], policy.tokenizers, seed=seed)

    @staticmethod
    def from_checkpoint(checkpoint: Checkpoint, *, device: str = "cpu", seed: int = 0) -> "Policy":
        """The policy on `device`. Raises ConfigError where there is none, WeightsMismatchError where names differ."""
        _require_device(device)
        with torch.device("meta"):
            model = VLA(checkpoint.config.model)
        _load_weights(model, checkpoint.weights)
        c = checkpoint
        return Policy(model.to(device).eval(), c.config, c.robot, c.norm_stats, c.tokenizers, seed=seed)

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client may know: robot, model and sizes."""
        model = self.config.model
        return {
            "robot": self.robot.to_json(),
            "model": type(model).__name__,
            "action_horizon": model.action_horizon,
            "action_dim": self.robot.action_size,
            "control_hz": self.robot.control_hz,
            "image_size": model.vision.image_size,
            "step": self.config.step,
        }

    def reset(self) -> None:
        """Begin a new episode: the noise starts from the seed again."""
        self._generator = torch.Generator().manual_seed(self._seed)

    def draw_noise(self) -> np.ndarray:
        """Standard normal noise [H, A of the model]."""
        size = (self.config.model.action_horizon, self.config.model.action_dim)
        return torch.randn(size, generator=self._generator).numpy()

    def infer(self, observation: Observation, noise: np.ndarray | None = None) -> dict[str, Any]:
        """One observation in the robot's keys -> `actions` float32 [H, A], commands in the robot's own units.

        Args:
            noise: [H, A of the model]; drawn from the policy's generator when None. π0-FAST uses none.

        Raises:
            ObservationError: the observation does not match the robot; it names the key.
        """
        started = time.perf_counter()
        # A recorded frame may bring its actions along; the policy must not see them.
        seen_by_robot = {key: value for key, value in observation.items() if key not in ("actions", "action_valid")}
        sample, seen = self.pipeline.encode(seen_by_robot)
        batch = {key: np.asarray(value)[None] for key, value in sample.items()}
        if noise is None and self._constraint is None:
            noise = self.draw_noise()
        output = self.run_model(ModelInput.from_numpy(batch, self._device), None if noise is None else noise[None])[0]
        actions = self.pipeline.decode(output, seen)
        return {"actions": actions, "policy_timing": {"infer_ms": (time.perf_counter() - started) * 1e3}}

    @torch.no_grad()
    def run_model(self, inputs: ModelInput, noise: np.ndarray | None) -> np.ndarray:
        """What the model answers to a batch, for `pipeline.decode`: chunks [B, (K,) H, A], or π0-FAST's ids [B, T].

        Args:
            noise: [B, (K,) H, A of the model]; π0-FAST uses none.
        """
        if self._constraint is not None:
            return self._decode_tokens(inputs, self._constraint)
        noise_BKHA = torch.from_numpy(noise).to(self._device)
        return self.model.sample(inputs, noise_BKHA, self.config.num_steps).float().cpu().numpy()

    def _decode_tokens(self, inputs: ModelInput, constraint: CodeConstraint) -> np.ndarray:
        """Greedy decoding in which only tokens are allowed that complete to a chunk of the right shape."""
        model = self.config.model
        surplus = (0, model.vocab_size - self.tokenizers.text.vocab_size)

        def allowed_next(ids_BT: torch.Tensor) -> torch.Tensor:
            mask = np.stack([np.pad(constraint.mask(ids), surplus) for ids in ids_BT.tolist()])
            return torch.from_numpy(mask).to(self._device)

        return self.model.decode_tokens(inputs, model.max_token_len, allowed_next).cpu().numpy()

    def check(self, test: SelfTest, *, where: str) -> None:
        """Replay a recorded observation. Raises SelfTestError where other actions come out."""
        actions = self.infer(test.observation, test.noise)["actions"]
        scale = np.abs(self.norm_stats.actions.max - self.norm_stats.actions.min).max() / 2
        error = float(np.abs(actions - test.actions).max()) if actions.shape == test.actions.shape else np.inf
        tolerance = SELF_TEST_TOLERANCE[self.config.model.dtype] * max(scale, 1e-6)
        if not error <= tolerance:
            raise SelfTestError(
                expected=f"the trainer's action chunk within {tolerance:.2g}",
                found=f"a largest difference of {error:.3g}",
                where=where,
                next="run it with the manipi and torch versions that trained it; do not put it on a robot",
            )

    def noise_stream(self) -> Iterator[np.ndarray]:
        """Noise [H, A of the model] for an episode, without end: from the seed on, whoever else draws."""
        size = (self.config.model.action_horizon, self.config.model.action_dim)
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield torch.randn(size, generator=generator).numpy()


def _require_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise ConfigError(
            expected="a device that torch can use here, such as cpu or cuda",
            found=str(error).splitlines()[0],
            where=f"device {device!r}",
            next="manipi doctor  # says what there is; or --device cpu",
        ) from error


def _load_weights(model: VLA, weights: Mapping[str, torch.Tensor]) -> None:
    try:
        model.load_state_dict(dict(weights), strict=True, assign=True)
    except RuntimeError as error:
        raise WeightsMismatchError(
            expected=f"the tensors of {type(model.config).__name__} in this version of manipi",
            found=str(error),
            where="the checkpoint's weights",
            next="load it with the manipi version that wrote it",
        ) from error


def self_test_for(policy: Policy, observation: Mapping[str, Any]) -> SelfTest:
    """Record what the policy answers to `observation` now."""
    noise = policy.draw_noise()
    return SelfTest(dict(observation), noise, policy.infer(observation, noise)["actions"])
