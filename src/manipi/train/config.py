"""The settings of a training run. Structure is Python (a recipe), numbers are flags.

Each setting says in its type when a run that goes on may bring another value (`manipi.records`), and what it may be:

    steps: Anytime[Count] = 30_000          lr: Stays[NotNegative] = 2.5e-5
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from manipi.errors import ConfigError, unknown_name
from manipi.model.config import DType, ModelConfig, NormMode, Pi0FastConfig, Pi05Config
from manipi.records import Anytime, BeforeStep1, Stays, added
from manipi.robots.robot import Robot
from manipi.types import Say


@dataclass(frozen=True)
class Within:
    """Marks the type of a setting with the values that it may have, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]
    next: str = ""
    """What to do about another one; empty: set the flag."""


def up_to(highest: float) -> Within:
    """From 0 on."""
    return Within(f"from 0 to {highest:g}", lambda v: 0 <= v <= highest)


Count: TypeAlias = Annotated[int, Within("at least 1", lambda v: v >= 1)]
CountOrNone: TypeAlias = Annotated[int, Within("at least 0", lambda v: v >= 0)]
NotNegative: TypeAlias = Annotated[float, Within("at least 0", lambda v: v >= 0)]
Positive: TypeAlias = Annotated[float, Within("above 0", lambda v: v > 0)]
BelowOne: TypeAlias = Annotated[float, Within("from 0 to below 1", lambda v: 0 <= v < 1)]
Multiplier: TypeAlias = Annotated[
    float,
    Within(
        "a multiplier above 0",
        lambda v: v > 0,
        next="to keep weights as they are set --trained (expert_only, vision_frozen, lora)",
    ),
]


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One dataset of a mixture."""

    path: str
    """Folder or URL, seen from `DataConfig.root`: LeRobot (v2.0 to v3.0), or RLDS as NAME/VERSION. Of questions also
    a JSONL file."""
    kind: Literal["robot", "vqa"] = added("robot")
    """`vqa`: questions about pictures and their answers, of a JSONL file or a LeRobot dataset's language_events."""
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
    """RLDS only: its map in `data.rlds.fields.BY_NAME`; empty: the one beside its files, or of its name."""
    language: tuple[Say, ...] = added(())
    """What the policy is told, and learns to write: one choice per sample; empty: it is told what `prompt` says."""

    def __post_init__(self) -> None:
        asks, told = self.kind == "vqa", self.prompt != "task"
        if (asks and (told or self.language or self.keep)) or (told and self.language):
            raise ConfigError(
                expected="questions without prompt, language and keep" if asks else "either prompt or language",
                found=f"prompt {self.prompt!r}, {len(self.language)} choices of language, keep {self.keep!r}",
                where=f"the dataset {self.path}",
                next="leave them out" if asks else 'leave prompt out, and write Say(instruct="subtask")',
            )

    @property
    def plan(self) -> tuple[Say, ...]:
        """`language`, or what `prompt` says."""
        return self.language or (Say(instruct=self.prompt),)


STRUCTURE = (Robot, tuple[DatasetConfig, ...], tuple[Say, ...])
"""Types of settings that a recipe alone says: there is no flag for them."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the demonstrations are and how they are read."""

    path: Anytime[str] = ""
    """Folder or URL of one dataset, instead of the recipe's. Empty: the recipe's, or training has none."""
    root: Anytime[str] = ""
    """Folder or URL that holds the datasets of the recipe's mixture; empty: the current folder."""
    mixture: Stays[tuple[DatasetConfig, ...]] = ()
    """Several datasets, where there is no `path`."""
    keep: Stays[str] = ""
    """Of `path`: file or URL of the frames to keep (`manipi filter`); empty: all."""
    norm_stats: Stays[str] = ""
    """Folder or URL with the norm_stats.json of released weights, to go on in their scale; empty: compute them."""
    episodes: Stays[tuple[int, ...]] = ()
    """Of `path`: numbers of the episodes to use; none named: all of them."""
    prompt: Stays[Literal["task", "subtask"]] = "task"
    """Of `path`: what the policy is told, the episode's task or the step's subtask."""
    language: Stays[tuple[Say, ...]] = added(())
    """Of `path`: what it is told, and learns to write, as one of several choices per sample; empty: as `prompt`."""
    skip_bad_episodes: Stays[bool] = False
    """Leave out episodes that `manipi check` finds broken, and say which; otherwise they stop the run."""
    holdout: Stays[BelowOne] = 0.1
    """Share of each dataset's episodes kept out of training, for evaluation."""
    num_workers: Anytime[CountOrNone] = 1
    """Processes that read and encode batches; 0 reads inside the training process."""
    cache: Stays[Literal["none", "raw", "jpeg"]] = "none"
    """Keep decoded pictures in the run, at the model's size. JPEG: a seventh of the room, slightly other pixels."""
    cache_fill: Anytime[Literal["first_epoch", "ahead"]] = "first_epoch"
    """When they are decoded: as they are first needed, or all before the first step, which is less work in all."""
    cache_gb: Anytime[float] = 50.0
    """The most room that they may take per dataset."""

    @property
    def datasets(self) -> tuple[DatasetConfig, ...]:
        """What to train on: `path` alone, or else the mixture."""
        if not self.path:
            return tuple(replace(one, path=self._under_root(one.path)) for one in self.mixture)
        chosen = {"keep": self.keep, "episodes": self.episodes, "prompt": self.prompt, "language": self.language}
        return (DatasetConfig(path=self.path, **chosen),)

    def _under_root(self, path: str) -> str:
        return path if not self.root or "://" in path or path.startswith("/") else f"{self.root.rstrip('/')}/{path}"


Precision: TypeAlias = Literal["bf16", "fp32", "pure_bf16"]
Trained: TypeAlias = Literal["full", "lora", "qlora", "expert_only", "vision_frozen"]


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a step is computed."""

    precision: BeforeStep1[Precision] = "bf16"
    """bf16: float32 weights, bfloat16 compute; fp32: all float32; pure_bf16: weights and moments bfloat16 as well."""
    recompute: Anytime[Literal["none", "elementwise", "full"]] = "none"
    """Memory for time: what backward computes once more instead of keeping it. `elementwise`: all but matrices and
    attention; `full`: each layer, a third more work."""
    compile: Stays[bool] = False
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
    """Multipliers of the learning rate, by group of parameters (`train.step.state`)."""

    vision: Stays[Multiplier] = 1.0
    vlm: Stays[Multiplier] = 1.0
    action_expert: Stays[Multiplier] = 1.0
    heads: Stays[Multiplier] = 1.0


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer under a linear warm-up and a decay; the defaults are openpi's, whose SGD and rsqrt peak at 5e-5."""

    kind: Stays[Literal["adamw", "sgd"]] = "adamw"
    schedule: Stays[Literal["cosine", "rsqrt"]] = "cosine"
    """How the rate decays: to `final_lr` along a cosine, or for ever with one over the square root of the step."""
    lr: Stays[NotNegative] = 2.5e-5
    """Peak learning rate."""
    final_lr: Stays[float] = 2.5e-6
    """cosine: learning rate at the end of the decay."""
    warmup_steps: Stays[int] = 1_000
    decay_steps: Stays[int] = 30_000
    """cosine: step at which it reaches `final_lr`."""
    timescale: Stays[float] = 10_000
    """rsqrt: steps after the warm-up until the rate is down to 1/√2 of its peak."""
    beta1: Stays[BelowOne] = 0.9
    """AdamW, as `beta2`, `eps` and `weight_decay`."""
    beta2: Stays[BelowOne] = 0.95
    eps: Stays[NotNegative] = 1e-8
    weight_decay: Stays[NotNegative] = 1e-10
    momentum: Stays[NotNegative] = 0.9
    """SGD, as `nesterov`."""
    nesterov: Stays[bool] = False
    clip_norm: Stays[float] = 1.0
    """Largest global gradient norm; 0: any, as the reference has it for SGD."""
    lr_scale: LRScale = LRScale()
    state_bits: BeforeStep1[Literal[32, 8]] = 32
    """AdamW: bits per moment; 8 needs torchao (Dettmers et al. 2022)."""

    def __post_init__(self) -> None:
        if self.kind == "sgd" and self.state_bits != 32:
            raise _out_of_range("optimizer.state_bits", "32 for SGD", self.state_bits)
        if self.nesterov and not self.momentum > 0:
            raise _out_of_range("optimizer.momentum", "above 0 for nesterov", self.momentum)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How processes share the model: on a mesh of `replicate` copies, each of them cut into `shard` parts."""

    replicate: Anytime[Count] = 1
    """Copies of the model. As many as processes: each has it whole, as under DDP."""
    shard: Anytime[CountOrNone] = 0
    """Parts of a copy (FSDP); 0: what `replicate` leaves, so that without both there is one copy over all processes."""
    device: Anytime[Literal["auto", "cpu", "cuda"]] = "auto"
    """auto: a GPU for each process where there are GPUs, else the processor."""
    timeout_minutes: Anytime[Positive] = 30.0
    """How long a process waits for the others. Longer than statistics, a cache filled ahead, and a save take."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a run watches itself for. None of it changes an update."""

    spike: Anytime[NotNegative] = 10.0
    """Warn of a loss that is this many robust standard deviations above its running median; 0: never."""
    spike_window: Anytime[Annotated[int, Within("at least 8", lambda v: v >= 8)]] = 200
    """Steps that the running median is of; the first quarter of it passes without a warning."""
    stall_seconds: Anytime[NotNegative] = 300.0
    """Print all stacks when a batch, a step or a save takes longer than this and five times its median; the first two
    of each may take six times as long. 0: never."""
    on_stall: Anytime[Literal["report", "exit"]] = "report"
    """`exit`: end the process with code 75 after the report, for a scheduler that starts it again."""
    first_batch: Anytime[bool] = True
    """Write what the first batch looks like to `first_batch/` of the run."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the log goes beside `metrics.jsonl`; names are openpi's: loss, grad_norm, param_norm, learning_rate …"""

    tensorboard: Anytime[bool] = False
    """Event files in `tensorboard/` of the run: pip install 'manipi[tensorboard]'."""
    wandb: Anytime[Literal["off", "offline", "online"]] = "off"
    """Weights & Biases: pip install 'manipi[wandb]'. `offline` needs no network; `wandb sync` uploads it later."""
    wandb_project: Anytime[str] = "manipi"


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """How a run looks at frames of held-out episodes while it trains. None of it changes what is trained."""

    every: Anytime[CountOrNone] = 1_000
    """Steps between two validations; there is one at the end, too. 0: none at all."""
    samples: Anytime[Count] = 256
    """Held-out frames of each dataset, and as many training ones; they stay in memory."""
    batch_size: Anytime[Count] = 32
    """Frames that the model sees together."""
    raw: Anytime[bool] = False
    """Also the loss of the weights that are not averaged."""
    best_by: Anytime[Literal["action_error", "loss"]] = "action_error"
    """By which number a checkpoint is the best one, which stays as long as none is better; with a suite it is the
    success, and of equals the action error."""
    suite: Anytime[str] = added("")
    """Also drive a simulated robot each time, in this suite (`manipi eval --suite`); empty: no."""
    trials: Anytime[Count] = added(50)
    """Of the suite, each time on the same scenes, which are none of `manipi eval --seed 0`."""
    workers: Anytime[Count] = added(1)
    """Simulators of the suite side by side."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes to the pictures of training; the defaults are what the reference does with augmax 0.4.1."""

    enabled: Stays[bool] = True
    crop: Stays[Annotated[float, Within("above 0, at most 1", lambda v: 0 < v <= 1)]] = 0.95
    """Side of a random crop, as a share of the picture's. Wrist cameras are neither cropped nor rotated."""
    rotation: Stays[Annotated[float, up_to(180)]] = 5.0
    """Largest angle either way, in degrees."""
    colour_probability: Stays[Annotated[float, up_to(1)]] = 0.5
    """Share of the pictures whose colours change; how far, the following say."""
    brightness: Stays[BelowOne] = 0.3
    contrast: Stays[BelowOne] = 0.4
    hue: Stays[Annotated[float, up_to(0.5)]] = 0.1
    """In turns of the colour circle. The reference names none; this is augmax's default."""
    saturation: Stays[Annotated[float, up_to(1)]] = 0.0
    """The reference names 0.5, which augmax computes and drops."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, complete: it is written into the run's folder and compared on resume."""

    robot: Stays[Robot]
    data: DataConfig
    model: Stays[ModelConfig] = field(default_factory=Pi05Config)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokenizer: Stays[str] = "byte"
    """`byte`, or the path of a SentencePiece model such as PaliGemma's."""
    action_tokenizer: Stays[str] = "fit"
    """Of policies that write codes: `fit` FAST to the demonstrations, or `dct` fixed codes; `binning`; or folder or
    URL of a published tokenizer."""
    norm_mode: Stays[NormMode] = "quantile"
    """How state and actions are normalised; the released π0 uses zscore, the others quantile."""
    init: Stays[str] = ""
    """Weights to start from: folder of a checkpoint or run, a released name (`pi05_base`), a URL; empty: the seed's."""
    trained: BeforeStep1[Trained] = "full"
    """`lora`: of experts with adapters, those alone; `qlora`: their matrices in 4 bits (`train.step.state`)."""
    frozen_dtype: BeforeStep1[DType] = "float32"
    """How frozen weights are kept, in memory and in checkpoints."""
    steps: Anytime[Count] = 30_000
    batch_size: Stays[Count] = 32
    """Observations per step, over all processes."""
    accumulate: BeforeStep1[Count] = 1
    """Parts of a batch that follow each other and make one step: less memory, the same update up to rounding."""
    noise_draws: BeforeStep1[Count] = 1
    """Noise and timestep draws per observation, all on one prefix (flow models)."""
    max_delay: Stays[int] = 0
    """Flow models, real-time chunking: at most so many first steps of a chunk are given, as if the robot executed them
    while the policy computes (arXiv 2512.05964); 0: none."""
    ema_decay: BeforeStep1[BelowOne] = 0.99
    """Decay of the averaged weights that are saved for inference; 0 saves the raw ones."""
    guards: Anytime[GuardConfig] = field(default_factory=GuardConfig)
    log: Anytime[LogConfig] = field(default_factory=LogConfig)
    seed: Stays[int] = 42
    log_every: Stays[Count] = 50
    save_every: Stays[Count] = 1_000
    keep_checkpoints: Anytime[Count] = 2
    """How many of the newest checkpoints stay."""
    keep_every: Anytime[CountOrNone] = 0
    """Checkpoints of steps divisible by this stay as well; 0: none."""
    async_save: Anytime[bool] = True
    """Checkpoints are written by a process of their own, from a copy of the training state in memory, while training
    goes on; otherwise training waits for them."""
    num_threads: Anytime[CountOrNone] = 0
    """CPU threads of torch; 0 leaves torch's choice."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        _require_values(self)
        longest = 0 if isinstance(self.model, Pi0FastConfig) else self.model.action_horizon - 1
        if not 0 <= self.max_delay <= longest:
            raise _out_of_range("max_delay", f"from 0 to {longest} for {type(self.model).__name__}", self.max_delay)
        if self.batch_size % self.accumulate:
            raise _out_of_range("accumulate", f"a divisor of the batch size {self.batch_size}", self.accumulate)
        if self.validation.raw and (self.parallel.replicate > 1 or self.parallel.shard > 1):
            raise _out_of_range("validation.raw", "False with several processes, whose weights are apart", True)
        if self.validation.suite and not self.validation.every:
            raise _out_of_range("validation.every", "at least 1 with a validation.suite", 0)
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


def _require_values(settings: Any, where: str = "") -> None:
    """That every setting, at any depth, is within what its type says: one of a few words, or of a range.

    A recipe is Python, which lets any other value through, and a comparison further on then takes a wrong word for one
    of the rest. Robots check themselves.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    for name in (each.name for each in fields(settings)):
        value, at, hint, marks = getattr(settings, name), f"{where}{name}", hints[name], ()
        if get_origin(hint) is Annotated:
            hint, *marks = get_args(hint)
        if get_origin(hint) is Literal and value not in (choices := get_args(hint)):
            raise unknown_name(at, str(value), [str(choice) for choice in choices], next="choose one of them")
        for mark in marks:
            if isinstance(mark, Within) and not mark.holds(value):
                raise _out_of_range(at, mark.words, value, mark.next)
        for part in value if isinstance(value, tuple) else (value,):
            if is_dataclass(part) and not isinstance(part, Robot):
                _require_values(part, f"{at}.")


def _out_of_range(name: str, expected: str, found: float, next: str = "") -> ConfigError:
    flag = name.replace("_", "-")
    return ConfigError(expected=expected, found=str(found), where=f"TrainConfig.{name}", next=next or f"set --{flag}")
