"""The settings of a training run. Structure is Python (a recipe), numbers are flags. No torch here."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from manipi.errors import ConfigError
from manipi.model.config import ModelConfig, Pi05Config
from manipi.robots.robot import Robot
from manipi.transforms.normalize import NormMode

_WHOLE = PrimitiveConstructorSpec[Robot](
    nargs=1,
    metavar="ROBOT",
    instance_from_str=lambda _: NotImplemented,
    is_instance=lambda value: isinstance(value, Robot),
    str_from_instance=lambda robot: [robot.name],
)
"""A robot is structure: tyro takes it as one value, which no flag changes, and does not look inside."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the demonstrations are and how they are read."""

    path: str
    """Folder of a LeRobot dataset (v2.0 to v3.0)."""
    episodes: tuple[int, ...] = ()
    """Numbers of the episodes to use; none named: all of them."""
    holdout: float = 0.1
    """Share of the episodes kept out of training, for evaluation."""
    num_workers: int = 1
    """Processes that read and encode batches; 0 reads inside the training process."""
    cache: Literal["none", "frames"] = "none"
    """`frames` decodes every video once, at the size that the model takes, into a memory-mapped file in the run."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW under a linear warm-up and a cosine decay; the defaults are openpi's."""

    lr: float = 2.5e-5
    """Peak learning rate."""
    final_lr: float = 2.5e-6
    """Learning rate at the end of the decay."""
    warmup_steps: int = 1_000
    decay_steps: int = 30_000
    """Step at which the cosine reaches `final_lr`."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-10
    clip_norm: float = 1.0
    """Largest global gradient norm."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, complete: it is written into the run's folder and compared on resume."""

    robot: Annotated[Robot, tyro.conf.Fixed, tyro.conf.Suppress, _WHOLE]
    data: DataConfig
    model: tyro.conf.AvoidSubcommands[ModelConfig] = field(default_factory=Pi05Config)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    tokenizer: str = "byte"
    """`byte`, or the path of a SentencePiece model such as PaliGemma's."""
    action_tokenizer: str = "fit"
    """π0-FAST only: `fit` FAST to the demonstrations, `binning`, or folder or URL of a published tokenizer."""
    norm_mode: NormMode = "quantile"
    """How state and actions are normalised; the released π0 uses zscore, the others quantile."""
    steps: int = 30_000
    batch_size: int = 32
    """Observations per step."""
    noise_draws: int = 1
    """Noise and timestep draws per observation, all on one prefix (flow models)."""
    ema_decay: float = 0.99
    """Decay of the averaged weights that are saved for inference; 0 saves the raw ones."""
    seed: int = 42
    log_every: int = 50
    save_every: int = 1_000
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    num_threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "noise_draws", "log_every", "save_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise _out_of_range(name, "at least 1", getattr(self, name))
        if not 0 <= self.ema_decay < 1:
            raise _out_of_range("ema_decay", "from 0 to below 1", self.ema_decay)
        if not 0 <= self.data.holdout < 1:
            raise _out_of_range("data.holdout", "from 0 to below 1", self.data.holdout)


def _out_of_range(name: str, expected: str, found: float) -> ConfigError:
    flag = name.replace("_", "-")
    return ConfigError(expected=expected, found=str(found), where=f"TrainConfig.{name}", next=f"set --{flag}")
