"""The settings of a training run. Structure is Python (a recipe), numbers are flags. No torch here."""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from manipi.errors import ConfigError, unknown_name
from manipi.model.config import DType, ModelConfig, NormMode, Pi0FastConfig, Pi05Config
from manipi.robots.robot import Robot

_WHOLE = PrimitiveConstructorSpec[Robot](
    nargs=1,
    metavar="ROBOT",
    instance_from_str=lambda _: NotImplemented,
    is_instance=lambda value: isinstance(value, Robot),
    str_from_instance=lambda robot: [robot.name],
)
"""A robot is structure: tyro takes it as one value, which no flag changes, and does not look inside."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One dataset of a mixture."""

    path: str
    """Folder or URL, seen from `DataConfig.root`: LeRobot (v2.0 to v3.0), or RLDS as NAME/VERSION."""
    weight: float = 1.0
    """Its share of the samples, relative to the other weights."""
    robot: Robot | None = None
    """The one that recorded it, with its statistics and keys of its own; None: the recipe's."""
    keep: str = ""
    """File or URL of the frames to keep (`manipi filter`, or openpi's ranges of DROID); empty: all."""
    episodes: tuple[int, ...] = ()
    """Numbers of the episodes to use; none named: all of them."""
    prompt: Literal["task", "subtask"] = "task"
    fields: str = ""
    """RLDS only: its map in `data.rlds_fields.BY_NAME`; empty: the one beside its files, or of its name."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the demonstrations are and how they are read."""

    path: str = ""
    """Folder or URL of one dataset, instead of the recipe's. Empty: the recipe's, or training has none."""
    root: str = ""
    """Folder or URL that holds the datasets of the recipe's mixture; empty: the current folder."""
    mixture: Annotated[tuple[DatasetConfig, ...], tyro.conf.Fixed, tyro.conf.Suppress] = ()
    """Several datasets, where there is no `path`."""
    keep: str = ""
    """Of `path`: file or URL of the frames to keep (`manipi filter`); empty: all."""
    norm_stats: str = ""
    """Folder or URL with the norm_stats.json of released weights, to go on in their scale; empty: compute them."""
    episodes: tuple[int, ...] = ()
    """Of `path`: numbers of the episodes to use; none named: all of them."""
    prompt: Literal["task", "subtask"] = "task"
    """Of `path`: what the policy is told, the episode's task or the step's subtask."""
    skip_bad_episodes: bool = False
    """Leave out episodes that `manipi check` finds broken, and say which; otherwise they stop the run."""
    holdout: float = 0.1
    """Share of each dataset's episodes kept out of training, for evaluation."""
    num_workers: int = 1
    """Processes that read and encode batches; 0 reads inside the training process."""
    cache: Literal["none", "raw", "jpeg"] = "none"
    """Keep decoded pictures in the run, at the model's size. JPEG: a seventh of the room, slightly other pixels."""
    cache_fill: Literal["first_epoch", "ahead"] = "first_epoch"
    """When they are decoded: as they are first needed, or all before the first step, which is less work in all."""
    cache_gb: float = 50.0
    """The most room that they may take per dataset."""

    @property
    def datasets(self) -> tuple[DatasetConfig, ...]:
        """What to train on: `path` alone, or else the mixture."""
        if not self.path:
            return tuple(replace(one, path=self._under_root(one.path)) for one in self.mixture)
        return (DatasetConfig(path=self.path, keep=self.keep, episodes=self.episodes, prompt=self.prompt),)

    def _under_root(self, path: str) -> str:
        return path if not self.root or "://" in path or path.startswith("/") else f"{self.root.rstrip('/')}/{path}"


Precision: TypeAlias = Literal["bf16", "fp32", "pure_bf16"]
Trained: TypeAlias = Literal["full", "lora", "qlora", "expert_only", "vision_frozen"]


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a step is computed."""

    precision: Precision = "bf16"
    """bf16: float32 weights, bfloat16 compute; fp32: all float32; pure_bf16: weights and moments bfloat16 as well."""
    recompute: Literal["none", "elementwise", "full"] = "none"
    """Memory for time: what backward computes once more instead of keeping it. `elementwise`: all but matrices and
    attention; `full`: each layer, a third more work."""
    compile: bool = False
    """Compile each layer with torch.compile, which fuses its element-wise operations: worth it on a GPU and for long
    runs, since the first step waits for it. Needs a C++ compiler on a processor. Rounds differently."""

    @property
    def dtype(self) -> DType:
        """What the model computes in, and will when it is served."""
        return "float32" if self.precision == "fp32" else "bfloat16"

    @property
    def master_dtype(self) -> DType:
        """What trained weights are kept in."""
        return "bfloat16" if self.precision == "pure_bf16" else "float32"


@dataclass(frozen=True, kw_only=True)
class LRScale:
    """Multipliers of the learning rate, by group of parameters (`train.step.trained`)."""

    vision: float = 1.0
    vlm: float = 1.0
    action_expert: float = 1.0
    heads: float = 1.0

    def __post_init__(self) -> None:
        for name, scale in vars(self).items():
            if not scale > 0:
                raise ConfigError(
                    expected="a multiplier above 0",
                    found=str(scale),
                    where=f"TrainConfig.optimizer.lr_scale.{name}",
                    next="to keep weights as they are set --trained (expert_only, vision_frozen, lora)",
                )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer under a linear warm-up and a decay; the defaults are openpi's, whose SGD and rsqrt peak at 5e-5."""

    kind: Literal["adamw", "sgd"] = "adamw"
    schedule: Literal["cosine", "rsqrt"] = "cosine"
    """How the rate decays: to `final_lr` along a cosine, or for ever with one over the square root of the step."""
    lr: float = 2.5e-5
    """Peak learning rate."""
    final_lr: float = 2.5e-6
    """cosine: learning rate at the end of the decay."""
    warmup_steps: int = 1_000
    decay_steps: int = 30_000
    """cosine: step at which it reaches `final_lr`."""
    timescale: float = 10_000
    """rsqrt: steps after the warm-up until the rate is down to 1/√2 of its peak."""
    beta1: float = 0.9
    """AdamW, as `beta2`, `eps` and `weight_decay`."""
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-10
    momentum: float = 0.9
    """SGD, as `nesterov`."""
    nesterov: bool = False
    clip_norm: float = 1.0
    """Largest global gradient norm; 0: any, as the reference has it for SGD."""
    lr_scale: LRScale = LRScale()
    state_bits: Literal[32, 8] = 32
    """AdamW: bits per moment; 8 needs torchao (Dettmers et al. 2022)."""

    def __post_init__(self) -> None:
        if self.kind == "sgd" and self.state_bits != 32:
            raise _out_of_range("optimizer.state_bits", "32 for SGD", self.state_bits)
        if self.nesterov and not self.momentum > 0:
            raise _out_of_range("optimizer.momentum", "above 0 for nesterov", self.momentum)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How processes share the model: on a mesh of `replicate` copies, each of them cut into `shard` parts."""

    replicate: int = 1
    """Copies of the model. As many as processes: each has it whole, as under DDP."""
    shard: int = 0
    """Parts of a copy (FSDP); 0: what `replicate` leaves, so that without both there is one copy over all processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU for each process where there are GPUs, else the processor."""
    timeout_minutes: float = 30.0
    """How long a process waits for the others. Longer than statistics, a cache filled ahead, and a save take."""

    def __post_init__(self) -> None:
        for name, least in (("replicate", 1), ("shard", 0)):
            if getattr(self, name) < least:
                raise _out_of_range(f"parallel.{name}", f"at least {least}", getattr(self, name))
        if not self.timeout_minutes > 0:
            raise _out_of_range("parallel.timeout_minutes", "above 0", self.timeout_minutes)


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a run watches itself for. None of it changes an update."""

    spike: float = 10.0
    """Warn of a loss that is this many robust standard deviations above its running median; 0: never."""
    spike_window: int = 200
    """Steps that the running median is of; the first quarter of it passes without a warning."""
    stall_seconds: float = 300.0
    """Print all stacks when a batch, a step or a save takes longer than this and five times its median; the first two
    of each may take six times as long. 0: never."""
    on_stall: Literal["report", "exit"] = "report"
    """`exit`: end the process with code 75 after the report, for a scheduler that starts it again."""
    first_batch: bool = True
    """Write what the first batch looks like to `first_batch/` of the run."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the log goes beside `metrics.jsonl`; names are openpi's: loss, grad_norm, param_norm, learning_rate …"""

    tensorboard: bool = False
    """Event files in `tensorboard/` of the run: pip install 'manipi[tensorboard]'."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases: pip install 'manipi[wandb]'. `offline` needs no network; `wandb sync` uploads it later."""
    wandb_project: str = "manipi"


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """How a run looks at frames of held-out episodes while it trains. None of it changes what is trained."""

    every: int = 1_000
    """Steps between two validations; there is one at the end, too. 0: none at all."""
    samples: int = 256
    """Held-out frames of each dataset, and as many training ones; they stay in memory."""
    batch_size: int = 32
    """Frames that the model sees together."""
    raw: bool = False
    """Also the loss of the weights that are not averaged."""
    best_by: Literal["action_error", "loss"] = "action_error"
    """By which number a checkpoint is the best one, which stays as long as none is better."""

    def __post_init__(self) -> None:
        for name, lowest in (("every", 0), ("samples", 1), ("batch_size", 1)):
            if getattr(self, name) < lowest:
                raise _out_of_range(f"validation.{name}", f"at least {lowest}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes to the pictures of training; the defaults are what the reference does with augmax 0.4.1."""

    enabled: bool = True
    crop: float = 0.95
    """Side of a random crop, as a share of the picture's. Wrist cameras are neither cropped nor rotated."""
    rotation: float = 5.0
    """Largest angle either way, in degrees."""
    colour_probability: float = 0.5
    """Share of the pictures whose colours change; how far, the following say."""
    brightness: float = 0.3
    contrast: float = 0.4
    hue: float = 0.1
    """In turns of the colour circle. The reference names none; this is augmax's default."""
    saturation: float = 0.0
    """The reference names 0.5, which augmax computes and drops."""

    def __post_init__(self) -> None:
        for name, highest in (("colour_probability", 1.0), ("hue", 0.5), ("rotation", 180.0), ("saturation", 1.0)):
            if not 0 <= getattr(self, name) <= highest:
                raise _out_of_range(f"augment.{name}", f"from 0 to {highest:g}", getattr(self, name))
        for name in ("brightness", "contrast"):
            if not 0 <= getattr(self, name) < 1:
                raise _out_of_range(f"augment.{name}", "from 0 to below 1", getattr(self, name))
        if not 0 < self.crop <= 1:
            raise _out_of_range("augment.crop", "above 0, at most 1", self.crop)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, complete: it is written into the run's folder and compared on resume."""

    robot: Annotated[Robot, tyro.conf.Fixed, tyro.conf.Suppress, _WHOLE]
    data: DataConfig
    model: tyro.conf.AvoidSubcommands[ModelConfig] = field(default_factory=Pi05Config)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokenizer: str = "byte"
    """`byte`, or the path of a SentencePiece model such as PaliGemma's."""
    action_tokenizer: str = "fit"
    """π0-FAST only: `fit` FAST to the demonstrations, `binning`, or folder or URL of a published tokenizer."""
    norm_mode: NormMode = "quantile"
    """How state and actions are normalised; the released π0 uses zscore, the others quantile."""
    init: str = ""
    """Weights to start from: folder of a checkpoint or run, a released name (`pi05_base`), a URL; empty: the seed's."""
    trained: Trained = "full"
    """`lora`: of experts with adapters, those alone; `qlora`: their matrices in 4 bits (`train.step.trained`)."""
    frozen_dtype: DType = "float32"
    """How frozen weights are kept, in memory and in checkpoints."""
    steps: int = 30_000
    batch_size: int = 32
    """Observations per step, over all processes."""
    accumulate: int = 1
    """Parts of a batch that follow each other and make one step: less memory, the same update up to rounding."""
    noise_draws: int = 1
    """Noise and timestep draws per observation, all on one prefix (flow models)."""
    max_delay: int = 0
    """Flow models, real-time chunking: at most so many first steps of a chunk are given, as if the robot executed them
    while the policy computes (arXiv 2512.05964); 0: none."""
    ema_decay: float = 0.99
    """Decay of the averaged weights that are saved for inference; 0 saves the raw ones."""
    guards: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)
    seed: int = 42
    log_every: int = 50
    save_every: int = 1_000
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    keep_every: int = 0
    """Checkpoints of steps divisible by this stay as well; 0: none."""
    async_save: bool = True
    """Checkpoints are written by a process of their own, from a copy of the training state in memory, while training
    goes on; otherwise training waits for them."""
    num_threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        _require_choices(self)
        for name in ("steps", "batch_size", "accumulate", "noise_draws", "log_every", "save_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise _out_of_range(name, "at least 1", getattr(self, name))
        if self.keep_every < 0:
            raise _out_of_range("keep_every", "at least 0", self.keep_every)
        longest = 0 if isinstance(self.model, Pi0FastConfig) else self.model.action_horizon - 1
        if not 0 <= self.max_delay <= longest:
            raise _out_of_range("max_delay", f"from 0 to {longest} for {type(self.model).__name__}", self.max_delay)
        if not 0 <= self.ema_decay < 1:
            raise _out_of_range("ema_decay", "from 0 to below 1", self.ema_decay)
        for name in ("spike", "stall_seconds"):
            if getattr(self.guards, name) < 0:
                raise _out_of_range(f"guards.{name}", "at least 0", getattr(self.guards, name))
        if self.guards.spike_window < 8:
            raise _out_of_range("guards.spike_window", "at least 8", self.guards.spike_window)
        if not 0 <= self.data.holdout < 1:
            raise _out_of_range("data.holdout", "from 0 to below 1", self.data.holdout)
        if self.batch_size % self.accumulate:
            raise _out_of_range("accumulate", f"a divisor of the batch size {self.batch_size}", self.accumulate)
        if self.validation.raw and (self.parallel.replicate > 1 or self.parallel.shard > 1):
            raise _out_of_range("validation.raw", "False with several processes, whose weights are apart", True)
        self._check_model()

    @property
    def policy_model(self) -> ModelConfig:
        """The model with the dtype that it computes in, which `compute.precision` alone decides."""
        return replace(self.model, dtype=self.compute.dtype)

    def _check_model(self) -> None:
        """That the model has what is to be trained, no dtype of its own, and an optimizer that can round."""
        if self.model.dtype == "float32" and self.compute.dtype != "float32":
            raise ConfigError(
                expected="compute.precision alone to say what the model computes in",
                found=f"model.dtype float32, precision {self.compute.precision}",
                where="TrainConfig.model.dtype",
                next='leave it out and set compute=ComputeConfig(precision="fp32"), or --compute.precision fp32',
            )
        if self.compute.precision == "pure_bf16" and self.optimizer.kind == "sgd":
            raise ConfigError(
                expected="AdamW with pure_bf16, since it rounds at random",
                found="SGD, whose small updates bfloat16 would lose",
                where="TrainConfig.compute.precision",
                next="choose --optimizer.kind adamw, or --compute.precision bf16",
            )
        adapted = self.model.vlm_adapters or getattr(self.model, "action_adapters", None)
        if self.trained in ("lora", "qlora") and not adapted:
            raise ConfigError(
                expected=f"adapters to train with trained={self.trained!r}",
                found="a model without any",
                where="TrainConfig.trained",
                next="set vlm_adapters or action_adapters of the model, or --trained full",
            )
        if self.trained == "expert_only" and isinstance(self.model, Pi0FastConfig):
            raise ConfigError(
                expected="a flow policy with trained='expert_only'",
                found="π0-FAST, which has no action expert",
                where="TrainConfig.trained",
                next="choose --trained full, vision_frozen or lora",
            )


def _require_choices(settings: Any, where: str = "") -> None:
    """That every field that is one of a few words is one of them, at any depth: a recipe is Python, which lets any
    other word through, and a comparison further on then takes it for one of the rest. Robots check themselves."""
    hints = get_type_hints(type(settings))
    for name in (each.name for each in fields(settings)):
        value, at = getattr(settings, name), f"{where}{name}"
        if get_origin(hints[name]) is Literal and value not in (choices := get_args(hints[name])):
            raise unknown_name(at, str(value), [str(choice) for choice in choices], next="choose one of them")
        for part in value if isinstance(value, tuple) else (value,):
            if is_dataclass(part) and not isinstance(part, Robot):
                _require_choices(part, f"{at}.")


def _out_of_range(name: str, expected: str, found: float) -> ConfigError:
    flag = name.replace("_", "-")
    return ConfigError(expected=expected, found=str(found), where=f"TrainConfig.{name}", next=f"set --{flag}")
