"""The reference's recipes: every function is called as its config is there.

They go on from released weights as openpi would, quirks included.
"""

from dataclasses import replace
from typing import Any, Literal

from manipi.model.config import REFERENCE, Adapters, GemmaSize, LoRA, ModelConfig, Pi0Config, Pi0FastConfig, Pi05Config
from manipi.robots.aloha import aloha, aloha_sim
from manipi.robots.franka import droid, libero
from manipi.robots.robot import Robot
from manipi.robots.tabletop import TABLETOP
from manipi.train.config import DataConfig, DatasetConfig, OptimizerConfig, TrainConfig
from manipi.weights.released import ASSETS, CHECKPOINTS

STEADY = OptimizerConfig(lr=5e-5, final_lr=5e-5, decay_steps=1_000_000)
"""After the warm-up the rate stays as it is."""


def _config(robot: Robot, model: ModelConfig, init: str, **settings: Any) -> TrainConfig:
    """A run that goes on from released weights; `settings` are TrainConfig's own.

    A plain π0 was trained on z-scores, everything else on quantiles.
    """
    ours: dict[str, Any] = {"tokenizer": ASSETS["paligemma_tokenizer"], "log_every": 100, "keep_every": 5_000}
    ours["norm_mode"] = "zscore" if isinstance(model, Pi0Config) else "quantile"
    if isinstance(model, Pi0FastConfig):
        ours["action_tokenizer"] = ASSETS["fast_tokenizer"]
    return TrainConfig(robot=robot, model=replace(model, compat=REFERENCE), init=init, **ours | settings)


def _data(path: str = "", *, stats: str = "", **settings: Any) -> DataConfig:
    """openpi trains on every episode. `stats` is a checkpoint and an asset id: `pi05_base/assets/trossen`."""
    return DataConfig(path=path, norm_stats=stats and f"{CHECKPOINTS}/{stats}", holdout=0.0, num_workers=2, **settings)


# ALOHA: released weights, fine-tuning, and the simulated robot --------------------------------------------------------

PEN_UNCAP = "hf://datasets/physical-intelligence/aloha_pen_uncap_diverse"


def _aloha(
    model: ModelConfig, weights: str, prompt: str | None = None, *, path: str = "", **settings: Any
) -> TrainConfig:
    data = _data(path, stats=f"{weights}/assets/trossen")
    return _config(aloha(default_prompt=prompt), model, weights, data=data, **settings)


def pi0_aloha() -> TrainConfig:
    """Serve the base model."""
    return _aloha(Pi0Config(), "pi0_base")


def pi05_aloha() -> TrainConfig:
    """Serve the base model."""
    return _aloha(Pi05Config(), "pi05_base")


def pi0_aloha_towel() -> TrainConfig:
    return _aloha(Pi0Config(), "pi0_aloha_towel", "fold the towel")


def pi0_aloha_tupperware() -> TrainConfig:
    return _aloha(Pi0Config(), "pi0_aloha_tupperware", "open the tupperware and put the food on the plate")


def pi0_aloha_pen_uncap() -> TrainConfig:
    return _aloha(Pi0Config(), "pi0_base", "uncap the pen", path=PEN_UNCAP, steps=20_000, batch_size=32)


def pi05_aloha_pen_uncap() -> TrainConfig:
    return _aloha(Pi05Config(), "pi05_base", "uncap the pen", path=PEN_UNCAP, steps=20_000, batch_size=64)


def pi0_aloha_sim() -> TrainConfig:
    """One camera, absolute joints, statistics of its own."""
    robot = aloha_sim(relative=False, default_prompt="Transfer cube")
    data = _data("hf://datasets/lerobot/aloha_sim_transfer_cube_human")
    return _config(robot, Pi0Config(), "pi0_base", data=data, steps=20_000)


# DROID: released weights, and fine-tuning -----------------------------------------------------------------------------

KEEP_RANGES = "gs://openpi-assets/droid/droid_sample_ranges_v1_0_1.json"
"""Steps of DROID's episodes in which the arm does not idle."""
DROID = DatasetConfig(path="droid/1.0.1", keep=KEEP_RANGES, fields="droid_joint_position")
FULL: dict[str, Any] = {"optimizer": STEADY, "steps": 100_000, "batch_size": 256, "save_every": 5_000}


def _droid(
    model: ModelConfig,
    weights: str,
    action_space: Literal["joint_position", "joint_velocity"] = "joint_velocity",
    *,
    own_stats: bool = False,
    mixture: tuple[DatasetConfig, ...] = (),
    **settings: Any,
) -> TrainConfig:
    """π0-FAST calls the wrist camera's slot `wrist`.

    Args:
        weights: a released name, or a folder below openpi's checkpoints.
        own_stats: compute the statistics of the data, where otherwise those beside the weights are taken.
    """
    slot = "wrist" if isinstance(model, Pi0FastConfig) else "left_wrist"
    init = f"{CHECKPOINTS}/{weights}" if "/" in weights else weights
    data = _data(stats="" if own_stats else f"{weights}/assets/droid", mixture=mixture)
    return _config(droid(action_space=action_space, wrist_slot=slot), model, init, data=data, **settings)


def _fast(action_horizon: int, max_token_len: int = 250) -> Pi0FastConfig:
    cameras = ("base", "base_1", "wrist")
    return Pi0FastConfig(action_dim=8, action_horizon=action_horizon, max_token_len=max_token_len, cameras=cameras)


def pi0_droid() -> TrainConfig:
    return _droid(Pi0Config(action_horizon=10), "pi0_droid")


def pi0_fast_droid() -> TrainConfig:
    return _droid(_fast(10), "pi0_fast_droid")


def pi05_droid() -> TrainConfig:
    return _droid(Pi05Config(action_horizon=15), "pi05_droid")


def pi0_fast_full_droid_finetune() -> TrainConfig:
    """Joint positions, with statistics of its own."""
    settings = {"own_stats": True, "mixture": (DROID,), "keep_every": 20_000}
    return _droid(_fast(16, 180), "pi0_fast_base", "joint_position", **settings, **FULL)


def pi05_full_droid_finetune() -> TrainConfig:
    """Joint positions, in the scale of the base model's DROID."""
    settings = {"mixture": (DROID,), "keep_every": 10_000}
    return _droid(Pi05Config(action_horizon=16), "pi05_base", "joint_position", **settings, **FULL)


def pi05_droid_finetune() -> TrainConfig:
    """Joint velocities of a smaller dataset of one's own (`--data.path`), in the scale of π0.5-DROID."""
    return _droid(Pi05Config(action_horizon=16), "pi05_droid", steps=20_000)


# The RoboArena baselines, trained from PaliGemma: four ways to spell actions, and flow matching -----------------------


def paligemma_binning_droid() -> TrainConfig:
    return _droid(_fast(15, 400), "roboarena/paligemma_binning_droid", action_tokenizer="binning")


def paligemma_fast_droid() -> TrainConfig:
    return _droid(_fast(15), "roboarena/paligemma_fast_droid")


def paligemma_fast_specialist_droid() -> TrainConfig:
    """FAST, fitted to DROID alone."""
    tokenizer = "hf://KarlP/fast_droid_specialist"
    return _droid(_fast(15), "roboarena/paligemma_fast_specialist_droid", action_tokenizer=tokenizer)


def paligemma_vq_droid() -> TrainConfig:
    """Codes of a learned quantiser (FSQ)."""
    tokenizer = "gs://openpi-assets/tokenizers/droid_fsq_tokenizer"
    return _droid(_fast(15), "roboarena/paligemma_vq_droid", action_tokenizer=tokenizer)


def paligemma_diffusion_droid() -> TrainConfig:
    return _droid(Pi0Config(action_dim=8, action_horizon=10), "roboarena/paligemma_diffusion_droid")


# The PolaRiS baselines: joint positions on DROID, and one part in ten simulated demonstrations ------------------------

SIMULATED = DatasetConfig(
    path="polaris_droid_cotrain_dataset/1.0.0",
    weight=0.1,
    keep="gs://openpi-assets/droid/polaris_droid_cotrain_dataset_sample_ranges_v1_0_0.json",
    fields="droid_joint_position",
)


def _polaris(name: str, model: ModelConfig) -> TrainConfig:
    settings = {"mixture": (replace(DROID, weight=0.9), SIMULATED), "optimizer": STEADY, "steps": 1_000}
    settings |= {"batch_size": 128, "keep_every": 1_000}
    return _droid(model, f"polaris/{name}", "joint_position", **settings)


def pi05_droid_jointpos_polaris() -> TrainConfig:
    return _polaris("pi05_droid_jointpos_polaris", Pi05Config(action_horizon=15))


def pi0_fast_droid_jointpos_polaris() -> TrainConfig:
    return _polaris("pi0_fast_droid_jointpos_polaris", _fast(10, 180))


def pi0_droid_jointpos_polaris() -> TrainConfig:
    return _polaris("pi0_droid_jointpos_polaris", Pi0Config(action_horizon=10, max_token_len=100))


def pi0_droid_jointpos_100k_polaris() -> TrainConfig:
    """From weights of 100,000 steps."""
    return _polaris("pi0_droid_jointpos_100k_polaris", Pi0Config(action_horizon=10, max_token_len=100))


def paligemma_binning_droid_jointpos() -> TrainConfig:
    """Made for serving; where its weights are, openpi does not say: name them with `--init`."""
    return _droid(_fast(15, 600), "", "joint_position", own_stats=True, action_tokenizer="binning")


# LIBERO: fine-tuning of each base model, whole or by low-rank adapters ------------------------------------------------

VLM_ADAPTERS = Adapters(attention=LoRA(rank=16, alpha=16), feed_forward=LoRA(rank=16, alpha=16))
ACTION_ADAPTERS = Adapters(attention=LoRA(rank=32, alpha=32), feed_forward=LoRA(rank=32, alpha=32))
LIBERO_FAST = Pi0FastConfig(action_dim=7, action_horizon=10, max_token_len=180)
LOW_MEMORY = {"ema_decay": 0.0, "trained": "lora", "frozen_dtype": "bfloat16"}


def _libero(model: ModelConfig, weights: str, *, relative: bool = True, **settings: Any) -> TrainConfig:
    data = _data("hf://datasets/physical-intelligence/libero")
    return _config(libero(relative=relative), model, weights, data=data, **settings)


def pi0_libero() -> TrainConfig:
    """With the commands relative once more, as the released weights had it; see `manipi.robots.franka`."""
    return _libero(Pi0Config(), "pi0_base")


def pi0_libero_low_mem_finetune() -> TrainConfig:
    model = Pi0Config(vlm_adapters=VLM_ADAPTERS, action_adapters=ACTION_ADAPTERS)
    return _libero(model, "pi0_base", **LOW_MEMORY)


def pi0_fast_libero() -> TrainConfig:
    return _libero(LIBERO_FAST, "pi0_fast_base")


def pi0_fast_libero_low_mem_finetune() -> TrainConfig:
    return _libero(replace(LIBERO_FAST, vlm_adapters=VLM_ADAPTERS), "pi0_fast_base", **LOW_MEMORY)


def pi05_libero() -> TrainConfig:
    """The policy never sees its state: the prompt does not spell it out, and π0.5 has no other place for it."""
    model = Pi05Config(action_horizon=10, state_in_prompt=False)
    optimizer = replace(STEADY, warmup_steps=10_000)
    return _libero(model, "pi05_base", relative=False, optimizer=optimizer, batch_size=256, ema_decay=0.999)


# Is everything in place? ---------------------------------------------------------------------------------------------

DUMMY = GemmaSize(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16)


def _debug(model: ModelConfig, **settings: Any) -> TrainConfig:
    data = DataConfig(path="runs/demo/dataset", holdout=0.0, num_workers=2)
    settings |= {"steps": 10, "batch_size": 2, "log_every": 100, "keep_every": 5_000}
    return TrainConfig(robot=TABLETOP, data=data, model=model, **settings)


def debug() -> TrainConfig:
    """Ten steps of small Gemmas behind the full image encoder, on what `manipi demo` records: is all in place?"""
    return _debug(Pi0Config(vlm=DUMMY, action_expert=DUMMY), norm_mode="zscore", save_every=100)


def debug_restore() -> TrainConfig:
    """From where `debug` ended."""
    return replace(debug(), init="runs/debug/checkpoints/10", save_every=1_000)


def debug_pi05() -> TrainConfig:
    return _debug(Pi05Config(vlm=DUMMY, action_expert=DUMMY))
