"""The settings of the three policies. They are three types, not switches of one, and none of them needs torch.

ModelConfig
├─ Pi0Config      flow matching; the state is a token, the timestep is mixed into the action tokens
├─ Pi05Config     flow matching; the state is text, the timestep modulates the action expert's norms
└─ Pi0FastConfig  autoregressive; actions are text tokens of the vision-language model
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args, get_type_hints

from manipi.errors import ConfigError, unknown_name
from manipi.records import BeforeStep1, added

DType: TypeAlias = Literal["float32", "bfloat16"]
NormMode: TypeAlias = Literal["zscore", "quantile"]
"""The scale of the states and actions that the weights know; `transforms.normalize` applies it."""


CAMERA_SLOTS = ("base", "left_wrist", "right_wrist")
"""The slots of the released weights, in the order in which their image tokens stand in the prefix."""


def _require_positive(config: Any) -> None:
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if kind is int and not (isinstance(value, int) and value > 0):
            where = f"{type(config).__name__}.{name}"
            raise ConfigError(expected="a positive integer", found=repr(value), where=where, next="set it to 1 or more")


def _require_multiple(name: str, value: int, unit_name: str, unit: int, where: str) -> None:
    if value % unit:
        raise ConfigError(
            expected=f"{name} divisible by {unit_name}",
            found=f"{value} and {unit}",
            where=where,
            next=f"round {value} to a multiple of {unit}",
        )


@dataclass(frozen=True, kw_only=True)
class GemmaSize:
    """The size of one Gemma expert. Experts that share attention differ in `width` and `mlp_dim` only."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        _require_positive(self)
        _require_multiple("num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads, "GemmaSize")
        _require_multiple("head_dim (rotary halves)", self.head_dim, "two", 2, "GemmaSize")
        _require_multiple("width (sine and cosine halves)", self.width, "two", 2, "GemmaSize")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A low-rank update beside a matrix: `y = W x + scale · B A x` (Hu et al. 2021)."""

    rank: int
    alpha: float
    rank_stabilized: bool = False
    """Divide alpha by the square root of the rank (Kalajdzievski 2023) instead of the rank."""

    def __post_init__(self) -> None:
        _require_positive(self)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Which matrices of one expert have a low-rank update; by default none."""

    attention: LoRA | None = None
    """Queries, keys, values and the attention output."""
    feed_forward: LoRA | None = None
    """The three matrices of the MLP."""

    def __bool__(self) -> bool:
        return self.attention is not None or self.feed_forward is not None

    def with_unscaled_feed_forward(self) -> "Adapters":
        """The same with a factor of 1 in the MLP."""
        mlp = self.feed_forward
        return self if mlp is None else dataclasses.replace(self, feed_forward=LoRA(rank=mlp.rank, alpha=mlp.rank))


NO_ADAPTERS = Adapters()


@dataclass(frozen=True, kw_only=True)
class VisionSize:
    """The size of the SigLIP image encoder. Pictures are square."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int
    image_size: int
    """Pixels along each edge of a picture."""

    def __post_init__(self) -> None:
        _require_positive(self)
        _require_multiple("width", self.width, "num_heads", self.num_heads, "VisionSize")
        _require_multiple("image_size", self.image_size, "patch_size", self.patch_size, "VisionSize")

    @property
    def num_tokens(self) -> int:
        """Image tokens per picture: one per patch."""
        return (self.image_size // self.patch_size) ** 2


GEMMA_2B = GemmaSize(width=2048, depth=18, mlp_dim=16_384, num_heads=8, num_kv_heads=1, head_dim=256)
GEMMA_300M = GemmaSize(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256)
SO400M_14 = VisionSize(width=1152, depth=27, mlp_dim=4304, num_heads=16, patch_size=14, image_size=224)

# Small enough to train from scratch on a laptop's processor.
GEMMA_TINY = GemmaSize(width=96, depth=3, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=24)
GEMMA_TINY_EXPERT = GemmaSize(width=64, depth=3, mlp_dim=192, num_heads=4, num_kv_heads=1, head_dim=24)
VISION_TINY_8 = VisionSize(width=64, depth=2, mlp_dim=128, num_heads=4, patch_size=8, image_size=64)


@dataclass(frozen=True, kw_only=True)
class Compat:
    """Quirks of the reference implementation, each off unless its numbers have to be repeated."""

    unmasked_loss: bool = False
    """Flow loss: padded action steps and dimensions count like real ones, and sampling integrates padded dimensions."""
    fast_position_offset: bool = False
    """FAST decoding: the first decoded token skips one position, which training never does."""
    fast_padded_positions: bool = False
    """FAST training: positions are 0, 1, 2, …, while decoding counts the valid tokens only."""
    fast_contiguous_cache: bool = False
    """FAST decoding: steps see the last *n* prompt slots, n being the number of valid ones. Where a camera in the
    middle is missing, that reads its picture after all and forgets as many tokens from the start."""
    fast_writes_past_eos: bool = False
    """FAST decoding: rows go on after their EOS, and decoding ends when all rows emit EOS in the same step."""
    fast_lower_case: bool = False
    """FAST prompts: the instruction is lower-cased, which π0 and π0.5 never do."""
    fast_text_round_trip: bool = False
    """FAST extraction: emitted ids become text and ids again, which alters codes that are white space."""
    minus_one_state_bins: bool = False
    """Prompts with a state: a value below -1 is written as bin "-1" instead of 0."""
    truncated_prompts: bool = False
    """Prompts longer than `max_token_len` are cut at the end instead of refused."""
    unscaled_feed_forward_lora: bool = False
    """LoRA: the updates of the MLP are added without the factor alpha / rank."""


REFERENCE = Compat(**{field.name: True for field in dataclasses.fields(Compat)})
"""Every quirk at once: what the reference computes."""


@dataclass(frozen=True, kw_only=True)
class _SharedConfig:
    """What every policy has."""

    vision: VisionSize = SO400M_14
    """The image encoder."""
    vlm: GemmaSize = GEMMA_2B
    """The language model that reads image and prompt tokens."""
    vocab_size: int = 257_152
    """Rows of the token embedding."""
    action_dim: int = 32
    """Action dimensions A; a robot with fewer is padded."""
    action_horizon: int = 50
    """Steps H of an action chunk."""
    max_token_len: BeforeStep1[int] = 48
    """Prompt tokens after padding."""
    cameras: tuple[str, ...] = CAMERA_SLOTS
    """Camera slots, in the order of their image tokens."""
    dtype: DType = "bfloat16"
    """Compute dtype of the transformer's activations. Parameters keep their own."""
    vlm_adapters: Adapters = NO_ADAPTERS
    """Low-rank updates of the language model."""
    compat: Compat = Compat()
    """Quirks of the reference to repeat."""

    def __post_init__(self) -> None:
        where = type(self).__name__
        _require_positive(self)
        if self.dtype not in get_args(DType):
            raise unknown_name("compute dtype", self.dtype, get_args(DType), next="choose one of them")
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise ConfigError(
                expected="at least one camera slot, each named once",
                found=repr(self.cameras),
                where=f"{where}.cameras",
                next="list each slot of the model once; a robot may leave slots empty, the model masks them",
            )


@dataclass(frozen=True, kw_only=True)
class FixedCodes:
    """Ids of action codes that have a place in the chunk each, and an order there (`manipi.tokenizers.dct`):

    first_id   ┌ neutral ─ codes of one place ─┬ neutral ─ codes of another ─┬ …      `places` times `per_place` ids

    Training then knows what decoding allows: a code is compared with those of its place alone, and what is forced (the
    words around the codes) is not learned at all.
    """

    first_id: int
    places: int
    """At most so many; the tokenizer may need fewer."""
    per_place: int
    """Ids of each, with the neutral one."""
    softness: float = 0.0
    """Targets are spread over neighbouring codes as a Gaussian of this standard deviation, in codes; 0: one code."""
    hidden: float = 0.0
    """Share of the samples whose codes are all learned from pictures and prompt alone: neutral ids stand for them."""

    def __post_init__(self) -> None:
        _require_positive(self)
        if not (self.per_place > 1 and self.softness >= 0 and 0 <= self.hidden <= 1):
            raise ConfigError(
                expected="at least 2 ids per place, softness from 0 on, hidden from 0 to 1",
                found=f"{self.per_place}, {self.softness}, {self.hidden}",
                where="FixedCodes",
                next="change what is out of range",
            )

    @property
    def end_id(self) -> int:
        """The first id behind all places."""
        return self.first_id + self.places * self.per_place


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """What the language model of a flow policy learns to write, beside the flow: action codes, and text such as the
    present subtask or answers about pictures (π0.5, arXiv 2504.16054, eq. 1).

        images | prompt | text ──┬── action codes      causal: cross-entropy
                                 └── noisy actions     flow; they do not see the codes, nor the codes them

    The loss is the sum of three means, each over what has it: flow over real elements, codes and text over the samples
    that have any, of each sample's mean over its tokens.
    """

    flow_weight: float = 1.0
    """Of the flow loss. 1 is enough where it is insulated; π0.5 without took 10 (section IV-D)."""
    codes_weight: float = 1.0
    """Of the action codes, which are those of π0-FAST; 0: none, and no action tokenizer."""
    text_weight: float = 1.0
    """Of the text; 0: none is learnt."""
    insulate: bool = True
    """No gradient of the flow reaches the language model and the image encoder (Driess et al. 2025, arXiv 2505.23705,
    eqs. 5 and 6): they learn by what they write."""
    max_code_len: BeforeStep1[int] = 64
    """Tokens of a chunk's codes after padding, their end mark included."""
    codes: FixedCodes | None = None
    """None: codes as FAST has them."""

    @property
    def weights(self) -> tuple[float, float, float]:
        """Of flow, codes and text."""
        return self.flow_weight, self.codes_weight, self.text_weight

    def __post_init__(self) -> None:
        _require_positive(self)
        for name in ("flow_weight", "codes_weight", "text_weight"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0):
                where = f"JointConfig.{name}"
                raise ConfigError(expected="0 or more", found=str(value), where=where, next="set it to 1, or 0 for off")
        if not any(self.weights):
            where = "JointConfig"
            raise ConfigError(expected="a weight above 0", found="none", where=where, next="give flow, codes or text 1")


@dataclass(frozen=True, kw_only=True)
class HistoryConfig:
    """What a flow policy remembers: older pictures of every camera, and older states (MEM, arXiv 2603.03596, App. C).

    frames = 4, stride = 8      steps    t-24    t-16    t-8    t

    The present alone has image tokens in the prefix. Frames before the episode's start are masked.
    """

    frames: int
    """Pictures per camera, the present one included; 1: no past."""
    stride: int
    """Control steps from one to the next."""
    every: int = 4
    """Temporal attention is in each so many-th block of the image encoder, in a shallower one in its last block."""
    states: bool = True
    """Whether each older state is a token of the prefix."""

    @property
    def steps(self) -> tuple[int, ...]:
        """How many control steps ago each older frame was, the oldest first."""
        return tuple(self.stride * ago for ago in range(self.frames - 1, 0, -1))

    def __post_init__(self) -> None:
        _require_positive(self)


@dataclass(frozen=True, kw_only=True)
class _FlowConfig(_SharedConfig):
    """A policy with a flow-matching action expert beside the language model."""

    action_expert: GemmaSize = GEMMA_300M
    """The expert that reads noisy actions and predicts their velocity."""
    action_adapters: Adapters = NO_ADAPTERS
    """Low-rank updates of the action expert."""
    joint: JointConfig | None = added(None)
    """What the language model learns to write; None: nothing."""
    history: HistoryConfig | None = added(None)
    """What it remembers; None: it sees the present alone."""

    @property
    def past_steps(self) -> tuple[int, ...]:
        """How many control steps ago what it remembers was, the oldest first; empty: nothing."""
        return () if self.history is None else self.history.steps

    @property
    def past_tokens(self) -> int:
        """Tokens of the prefix for older states."""
        return len(self.past_steps) if self.history is not None and self.history.states else 0

    @property
    def fixed_codes(self) -> FixedCodes | None:
        return self.joint.codes if self.joint is not None and self.writes_codes else None

    @property
    def writes_codes(self) -> bool:
        return self.joint is not None and self.joint.codes_weight > 0

    @property
    def writes_text(self) -> bool:
        return self.joint is not None and self.joint.text_weight > 0

    @property
    def writes(self) -> bool:
        """Whether anything reads the language model's outputs."""
        return self.writes_codes or self.writes_text

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            vlm, expert = getattr(self.vlm, field), getattr(self.action_expert, field)
            if vlm != expert:
                raise ConfigError(
                    expected=f"the same {field} in both experts, because they share attention in every layer",
                    found=f"vlm {vlm}, action_expert {expert}",
                    where=f"{type(self).__name__}.action_expert.{field}",
                    next="change one of the two; only width and mlp_dim may differ",
                )


@dataclass(frozen=True, kw_only=True)
class Pi0Config(_FlowConfig):
    """π0 (Black et al. 2024): the state is one continuous token, the timestep is mixed into the action tokens."""


@dataclass(frozen=True, kw_only=True)
class Pi05Config(_FlowConfig):
    """π0.5 (Physical Intelligence 2025): the state is text, the timestep modulates the action expert's norms."""

    max_token_len: BeforeStep1[int] = 200
    state_in_prompt: bool = True
    """Whether the prompt spells out the state. Without it the policy sees no proprioception at all."""


@dataclass(frozen=True, kw_only=True)
class Pi0FastConfig(_SharedConfig):
    """π0-FAST (Pertsch et al. 2025): actions are FAST tokens that the language model writes."""

    action_horizon: int = 32
    max_token_len: BeforeStep1[int] = 250
    eos_token: int = 1
    """The token id after which a row of the batch is complete."""
    codes: FixedCodes | None = added(None)
    """None: codes as FAST has them, any at any place, learned among all tokens."""
    past_steps: ClassVar[tuple[int, ...]] = ()
    past_tokens: ClassVar[int] = 0
    writes_codes: ClassVar[bool] = True
    writes_text: ClassVar[bool] = False
    writes: ClassVar[bool] = True

    @property
    def fixed_codes(self) -> FixedCodes | None:
        return self.codes


ModelConfig: TypeAlias = Pi0Config | Pi05Config | Pi0FastConfig

CONFIG_TYPES = (
    *(Pi0Config, Pi05Config, Pi0FastConfig, FixedCodes, JointConfig, HistoryConfig),
    *(GemmaSize, VisionSize, LoRA, Adapters, Compat),
)
"""What a config is made of, for `manipi.records.from_json`."""
