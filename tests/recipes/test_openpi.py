"""The reference's 31 recipes: their numbers, by hand from its configs, and two real steps of each in miniature; and the
joint variants of its π0.5 recipes, which differ from them in what they say and in nothing else."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.data.open import open_dataset
from manipi.errors import ManipiError, UnknownNameError
from manipi.model import ModelInput
from manipi.model.config import (
    REFERENCE,
    Compat,
    GemmaSize,
    JointConfig,
    Pi0Config,
    Pi0FastConfig,
    Pi05Config,
    VisionSize,
)
from manipi.policy import Policy
from manipi.recipes.registry import load_recipe, recipe_names
from manipi.robots.robot import Robot
from manipi.train.config import DataConfig, TrainConfig
from manipi.train.data import prepare
from manipi.train.loop import train
from manipi.train.step.state import TrainState
from manipi.train.step.step import train_step
from manipi.types import Say

# recipe               model, action dimensions, horizon, tokens | robot, data, relative dimensions | weights, assets
TABLE = """
pi0_aloha                         Pi0  32 50  48 | aloha     -      12 | pi0_base             trossen
pi05_aloha                        Pi05 32 50 200 | aloha     -      12 | pi05_base            trossen
pi0_aloha_towel                   Pi0  32 50  48 | aloha     -      12 | pi0_aloha_towel      trossen
pi0_aloha_tupperware              Pi0  32 50  48 | aloha     -      12 | pi0_aloha_tupperware trossen
pi0_aloha_pen_uncap               Pi0  32 50  48 | aloha     pen    12 | pi0_base             trossen
pi05_aloha_pen_uncap              Pi05 32 50 200 | aloha     pen    12 | pi05_base            trossen
pi0_aloha_sim                     Pi0  32 50  48 | aloha_sim cube    0 | pi0_base             -
pi0_droid                         Pi0  32 10  48 | droid     -       0 | pi0_droid            droid
pi0_fast_droid                    Fast  8 10 250 | droid     -       0 | pi0_fast_droid       droid
pi05_droid                        Pi05 32 15 200 | droid     -       0 | pi05_droid           droid
pi0_fast_full_droid_finetune      Fast  8 16 180 | droid     full    7 | pi0_fast_base        -
pi05_full_droid_finetune          Pi05 32 16 200 | droid     full    7 | pi05_base            droid
pi05_droid_finetune               Pi05 32 16 200 | droid     -       0 | pi05_droid           droid
pi0_libero                        Pi0  32 50  48 | libero    libero  6 | pi0_base             -
pi0_libero_low_mem_finetune       Pi0  32 50  48 | libero    libero  6 | pi0_base             -
pi0_fast_libero                   Fast  7 10 180 | libero    libero  6 | pi0_fast_base        -
pi0_fast_libero_low_mem_finetune  Fast  7 10 180 | libero    libero  6 | pi0_fast_base        -
pi05_libero                       Pi05 32 10 200 | libero    libero  0 | pi05_base            -
debug                             Pi0  32 50  48 | tabletop  demo    3 | -                    -
debug_restore                     Pi0  32 50  48 | tabletop  demo    3 | runs/debug/checkpoints/10 -
debug_pi05                        Pi05 32 50 200 | tabletop  demo    3 | -                    -
paligemma_binning_droid           Fast  8 15 400 | droid     -       0 | roboarena/*          droid
paligemma_fast_droid              Fast  8 15 250 | droid     -       0 | roboarena/*          droid
paligemma_fast_specialist_droid   Fast  8 15 250 | droid     -       0 | roboarena/*          droid
paligemma_vq_droid                Fast  8 15 250 | droid     -       0 | roboarena/*          droid
paligemma_diffusion_droid         Pi0   8 10  48 | droid     -       0 | roboarena/*          droid
pi05_droid_jointpos_polaris       Pi05 32 15 200 | droid     mixture 7 | polaris/*            droid
pi0_fast_droid_jointpos_polaris   Fast  8 10 180 | droid     mixture 7 | polaris/*            droid
pi0_droid_jointpos_polaris        Pi0  32 10 100 | droid     mixture 7 | polaris/*            droid
pi0_droid_jointpos_100k_polaris   Pi0  32 10 100 | droid     mixture 7 | polaris/*            droid
paligemma_binning_droid_jointpos  Fast  8 15 600 | droid     -       7 | -                    -
"""
ROWS = {line.split()[0]: line.replace("|", " ").split()[1:] for line in TABLE.strip().splitlines()}

# steps, batch, averaging | peak rate, warm-up | save, keep every
DEFAULT = "30000 32 0.99 | 2.5e-5 1000 | 1000 5000"
POLARIS = "1000 128 0.99 | 5e-5   1000 | 1000 1000"
TRAINING = {
    "pi0_aloha_pen_uncap": "20000   32 0.99  | 2.5e-5  1000 | 1000  5000",
    "pi05_aloha_pen_uncap": "20000  64 0.99  | 2.5e-5  1000 | 1000  5000",
    "pi0_aloha_sim": "20000         32 0.99  | 2.5e-5  1000 | 1000  5000",
    "pi0_fast_full_droid_finetune": "100000 256 0.99 | 5e-5 1000 | 5000 20000",
    "pi05_full_droid_finetune": "100000 256 0.99     | 5e-5 1000 | 5000 10000",
    "pi05_droid_finetune": "20000   32 0.99  | 2.5e-5  1000 | 1000  5000",
    "pi0_libero_low_mem_finetune": "30000  32 0 | 2.5e-5  1000 | 1000  5000",
    "pi0_fast_libero_low_mem_finetune": "30000 32 0 | 2.5e-5 1000 | 1000 5000",
    "pi05_libero": "30000          256 0.999 | 5e-5   10000 | 1000  5000",
    "debug": "10         2 0.99 | 2.5e-5  1000 |  100  5000",
    "debug_restore": "10 2 0.99 | 2.5e-5  1000 | 1000  5000",
    "debug_pi05": "10    2 0.99 | 2.5e-5  1000 | 1000  5000",
    "pi05_droid_jointpos_polaris": POLARIS,
    "pi0_fast_droid_jointpos_polaris": POLARIS,
    "pi0_droid_jointpos_polaris": POLARIS,
    "pi0_droid_jointpos_100k_polaris": POLARIS,
}
DATA = {
    "-": "",
    "demo": "runs/demo/dataset",
    "pen": "hf://datasets/physical-intelligence/aloha_pen_uncap_diverse",
    "cube": "hf://datasets/lerobot/aloha_sim_transfer_cube_human",
    "libero": "hf://datasets/physical-intelligence/libero",
    "full": "1.0 droid 1.0.1",
    "mixture": "0.9 droid 1.0.1 + 0.1 polaris_droid_cotrain_dataset 1.0.0",
}
RELEASED = "gs://openpi-assets/checkpoints/"
MODELS = {"Pi0": Pi0Config, "Pi05": Pi05Config, "Fast": Pi0FastConfig}
PROMPTS = {
    "pi0_aloha_towel": "fold the towel",
    "pi0_aloha_tupperware": "open the tupperware and put the food on the plate",
    "pi0_aloha_pen_uncap": "uncap the pen",
    "pi05_aloha_pen_uncap": "uncap the pen",
    "pi0_aloha_sim": "Transfer cube",
}
ACTION_TOKENIZERS = {
    "paligemma_binning_droid": "binning",
    "paligemma_binning_droid_jointpos": "binning",
    "paligemma_fast_specialist_droid": "hf://KarlP/fast_droid_specialist",
    "paligemma_vq_droid": "gs://openpi-assets/tokenizers/droid_fsq_tokenizer",
}
JOINT = {
    "pi05_aloha_ki": 256,
    "pi05_aloha_pen_uncap_ki": 256,
    "pi05_droid_ki": 122,
    "pi05_full_droid_finetune_ki": 130,
    "pi05_droid_finetune_ki": 130,
    "pi05_droid_jointpos_polaris_ki": 122,
    "pi05_libero_ki": 72,
    "pi05_aloha_subtask": 256,
    "pi05_aloha_pen_uncap_subtask": 256,
    "pi05_droid_subtask": 122,
    "pi05_droid_finetune_subtask": 130,
    "pi05_libero_subtask": 72,
}
"""Tokens of the longest codes: one of each number of a chunk and two at the end, or 256."""
every_recipe = pytest.mark.parametrize("name", ROWS)


def test_all_31_and_no_other():
    assert len(ROWS) == 31
    tabletop = {"tabletop", *(f"tabletop_{name}" for name in ("pi0", "pi0_fast", "memory", "joint", "subtask"))}
    assert set(recipe_names()) - set(ROWS) - set(JOINT) == tabletop
    with pytest.raises(UnknownNameError, match="did you mean pi05_libero"):
        load_recipe("pi05_liebro")


# ---- numbers


@every_recipe
def test_model_and_data(name):
    c = load_recipe(name)
    model, dim, horizon, tokens, robot, data, relative, weights, assets = ROWS[name]
    weights = weights.replace("*", name)
    assert isinstance(c.model, MODELS[model])
    sizes = (c.model.action_dim, c.model.action_horizon, c.model.max_token_len)
    assert sizes == (int(dim), int(horizon), int(tokens))
    assert c.robot.name == robot
    assert dataset_of(c.data) == DATA[data]
    assert sum(group.size for group in c.robot.actions if group.relative) == int(relative)
    assert c.init.removeprefix(RELEASED) == weights.strip("-")
    assert c.data.norm_stats == (f"{RELEASED}{weights}/assets/{assets}" if assets != "-" else "")
    assert c.norm_mode == ("zscore" if model == "Pi0" else "quantile")


@every_recipe
def test_training(name):
    c = load_recipe(name)
    steps, batch, average, lr, warmup, save, keep = TRAINING.get(name, DEFAULT).replace("|", " ").split()
    assert (c.steps, c.batch_size, c.ema_decay) == (int(steps), int(batch), float(average))
    o = c.optimizer
    assert (o.lr, o.warmup_steps) == (float(lr), int(warmup))
    assert (c.save_every, c.keep_every) == (int(save), int(keep))
    assert (o.final_lr, o.decay_steps) == ((5e-5, 1_000_000) if lr == "5e-5" else (2.5e-6, 30_000))
    assert (o.kind, o.schedule) == ("adamw", "cosine")
    assert (o.beta1, o.beta2, o.eps, o.weight_decay, o.clip_norm) == (0.9, 0.95, 1e-8, 1e-10, 1.0)
    assert (c.seed, c.log_every, c.noise_draws, c.data.holdout, c.data.num_workers) == (42, 100, 1, 0.0, 2)


def dataset_of(data: DataConfig) -> str:
    for one in data.mixture:
        assert one.fields == "droid_joint_position"
        name, version = one.path.split("/")
        assert one.keep == f"gs://openpi-assets/droid/{name}_sample_ranges_v{version.replace('.', '_')}.json"
    return data.path or " + ".join(f"{one.weight} {one.path.replace('/', ' ')}" for one in data.mixture)


@every_recipe
def test_structure(name):
    c = load_recipe(name)
    fast, debug = isinstance(c.model, Pi0FastConfig), name.startswith("debug")
    assert c.model.compat == (Compat() if debug else REFERENCE)
    assert c.model.vocab_size == 257_152
    wide, narrow = {"width": 2048, "mlp_dim": 16_384}, {"width": 1024, "mlp_dim": 4096}
    gemma = {"depth": 18, "num_heads": 8, "num_kv_heads": 1, "head_dim": 256}
    if debug:
        wide = narrow = {"width": 64, "mlp_dim": 128}
        gemma |= {"depth": 4, "head_dim": 16}
    assert c.model.vlm == GemmaSize(**wide, **gemma)
    assert isinstance(c.model, Pi0FastConfig) or c.model.action_expert == GemmaSize(**narrow, **gemma)
    slots = ("base", "base_1", "wrist") if fast and c.robot.name == "droid" else ("base", "left_wrist", "right_wrist")
    assert c.model.cameras == slots
    assert c.tokenizer.partition("#")[0] == ("byte" if debug else "gs://big_vision/paligemma_tokenizer.model")
    if fast:
        assert c.action_tokenizer == ACTION_TOKENIZERS.get(name, "hf://physical-intelligence/fast")
    assert c.robot.default_prompt == PROMPTS.get(name)
    assert getattr(c.model, "state_in_prompt", True) == (name != "pi05_libero")


@every_recipe
def test_adapters(name):
    c = load_recipe(name)
    low_memory = name.endswith("low_mem_finetune")
    assert (c.trained, c.frozen_dtype) == (("lora", "bfloat16") if low_memory else ("full", "float32"))
    assert c.compute.precision == ("bf16" if c.policy_model.dtype == "bfloat16" else "fp32")
    experts = {"vlm_adapters": 16} | ({} if isinstance(c.model, Pi0FastConfig) else {"action_adapters": 32})
    for field, rank in experts.items():
        adapters = getattr(c.model, field)
        assert bool(adapters) == low_memory
        for lora in (adapters.attention, adapters.feed_forward) if low_memory else ():
            assert (lora.rank, lora.alpha, lora.rank_stabilized) == (rank, rank, False)


@pytest.mark.parametrize("name", JOINT)
def test_joint_variants(name):
    base, _, kind = name.rpartition("_")
    c, plain = load_recipe(name), load_recipe(base)
    joint = JointConfig(text_weight=float(kind == "subtask"), max_code_len=JOINT[name])
    assert c.model == replace(plain.model, joint=joint, compat=Compat(minus_one_state_bins=True))
    assert c.data.language == ((Say(learn_subtask=True),) if kind == "subtask" else ())
    assert c.action_tokenizer == "hf://physical-intelligence/fast"
    data = replace(c.data, language=())
    assert replace(c, model=plain.model, data=data, action_tokenizer=plain.action_tokenizer) == plain


def test_cameras_of_datasets():
    three = {"base": "cam_high", "left_wrist": "cam_left_wrist", "right_wrist": "cam_right_wrist"}
    for name, features in {
        "pi0_aloha_pen_uncap": {slot: f"observation.images.{camera}" for slot, camera in three.items()},
        "pi0_aloha_sim": {"base": "observation.images.top"},
        "pi05_droid_finetune": {"base": "exterior_image_1_left", "left_wrist": "wrist_image_left"},
        "pi0_fast_full_droid_finetune": {"base": "exterior_image_1_left", "wrist": "wrist_image_left"},
        "pi0_libero": {"base": "image", "left_wrist": "wrist_image"},
    }.items():
        robot = load_recipe(name).robot
        assert {slot: robot.dataset_key(key) for slot, key in robot.cameras.items()} == features


def test_without_a_dataset(tmp_path):
    """Recipes of RLDS mixtures, and those made for serving, say what they need."""
    for name, message in {
        "pi0_droid": r"(?s)a recipe without a dataset of its own.*--data\.path FOLDER",
        "pi0_droid_jointpos_polaris": r"(?s)droid/1\.0\.1.*--data\.root",
    }.items():
        with pytest.raises(ManipiError, match=message):
            prepare(load_recipe(name), tmp_path)


# ---- a step of each, and a run of one of each kind


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory) -> Callable[[Robot], Path]:
    """`demonstrations(robot)` is a LeRobot dataset with all that the robot names; one per layout."""
    made: dict[str, Path] = {}

    def record(robot: Robot) -> Path:
        images = [robot.dataset_key(key) for key in robot.cameras.values()]
        vectors = {robot.dataset_key(s.key): s.size for s in robot.state}
        vectors[robot.dataset_key(robot.action_key)] = robot.action_size
        layout = f"{images} {vectors}"
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp("demonstrations") / robot.name
            write(made[layout], images, vectors)
        return made[layout]

    return record


def write(root: Path, images: list[str], vectors: dict[str, int]) -> None:
    features = {key: Feature(kind="image", shape=(16, 16, 3), dtype="video") for key in images}
    features |= {key: Feature(kind="vector", shape=(size,), dtype="float32") for key, size in vectors.items()}
    features["subtask_index"] = Feature(kind="vector", shape=(1,), dtype="int64")
    rng = np.random.default_rng(0)
    with LeRobotWriter(root, fps=10, features=features, robot_type="toy") as writer:
        for length in (9, 6):
            pictures = {key: rng.integers(0, 256, (length, 16, 16, 3), dtype=np.uint8) for key in images}
            walks = {k: rng.uniform(0, 1, (length, size)).astype(np.float32) for k, size in vectors.items()}
            steps = {"subtask_index": np.arange(length)[:, None] // 5}
            writer.add_episode(pictures | walks | steps, task="do it")
        writer.add_texts("subtask", ["begin", "end"])


def miniature(recipe: TrainConfig, path: Path) -> TrainConfig:
    """The recipe with its own structure, at sizes that two processor cores train in a second.

    One quirk stays out: bytes have no text for action codes, so that emitted ids cannot take the way through text.
    """
    gemma = GemmaSize(width=16, depth=1, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8)
    vision = VisionSize(width=16, depth=1, mlp_dim=32, num_heads=2, patch_size=8, image_size=16)
    sizes = {"vision": vision, "vlm": gemma, "vocab_size": 1280, "action_horizon": 4, "max_token_len": 240}
    sizes["compat"] = replace(recipe.model.compat, fast_text_round_trip=False)
    if not isinstance(recipe.model, Pi0FastConfig):
        sizes["action_expert"] = replace(gemma, width=12)
    return replace(
        recipe,
        model=replace(recipe.model, **sizes),
        data=DataConfig(path=str(path), num_workers=0, language=recipe.data.language),
        tokenizer="byte",
        action_tokenizer="binning" if recipe.action_tokenizer == "binning" else "fit",
        init="",
        steps=2,
        batch_size=2,
        num_threads=1,
        async_save=False,  # its writer would take longer to start than all the rest
    )


@pytest.mark.parametrize("name", [*ROWS, *JOINT])
def test_a_step(name, demonstrations, tmp_path):
    """Statistics, tokens, batches, loss and gradients, as the recipe would have them."""
    recipe = load_recipe(name)
    config = miniature(recipe, demonstrations(recipe.robot))
    state = TrainState.initial(config)
    with prepare(config, tmp_path).loader(0) as loader:
        _, batch, _ = next(iter(loader))
    metrics, _ = train_step(state, ModelInput.from_numpy(batch), config)
    assert np.isfinite(float(metrics["loss"]))
    assert float(metrics["grad_norm"]) > 0
    for term in ("codes", "text") if name in JOINT else ():
        assert (metrics[f"loss/{term}"] > 1) == (term == "codes" or name.endswith("subtask"))


KINDS = (
    "pi0_aloha_sim",
    "pi05_aloha",
    "pi05_libero",
    "pi0_libero_low_mem_finetune",
    "pi0_fast_libero_low_mem_finetune",
    "paligemma_binning_droid_jointpos",
    "paligemma_diffusion_droid",
    "debug_pi05",
    "pi05_droid_ki",
    "pi05_libero_subtask",
)
"""Each policy, with adapters and without, each robot, each way to write actions and to read the state."""


@pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.long) for name in (*ROWS, *JOINT)]
)
def test_two_steps_make_a_policy(name, demonstrations, tmp_path):
    recipe = load_recipe(name)
    config = miniature(recipe, demonstrations(recipe.robot))
    folder = train(config, tmp_path / "run", show=False)
    policy = Policy.load(folder)
    actions = policy.infer(prepare(config, tmp_path / "run").example())["actions"]
    assert actions.shape == (4, recipe.robot.action_size)
    assert np.isfinite(actions).all()
    assert policy.metadata["step"] == 2


# ---- DROID as it is published


@pytest.mark.parametrize("name", ["pi05_full_droid_finetune", "pi0_fast_droid_jointpos_polaris"])
def test_mixtures_of_record_files(name, shared_datasets, tmp_path, monkeypatch):
    """The recipe's own sets, masks and shares, with the synthetic set in place of DROID and of the simulated part."""
    monkeypatch.setenv("MANIPI_HOME", str(tmp_path / "home"))
    synthetic, recipe = shared_datasets / "synthetic_droid_rlds/droidlike/1.0.0", load_recipe(name)
    keys = [episode.key for episode in open_dataset(synthetic, fields="droid_joint_position").episodes]
    ranges = tmp_path / "ranges.json"
    ranges.write_text(json.dumps({keys[0]: [[5, 60]], keys[2]: [[0, 40], [50, 70]]}))
    for one in recipe.data.mixture:
        (tmp_path / "data" / one.path).parent.mkdir(parents=True)
        (tmp_path / "data" / one.path).symlink_to(synthetic)
    sets = tuple(replace(one, keep=str(ranges)) for one in recipe.data.mixture)
    data = DataConfig(root=str(tmp_path / "data"), mixture=sets, holdout=0.0, num_workers=0)
    config = replace(miniature(recipe, tmp_path), data=data, batch_size=10)
    folder = train(config, tmp_path / "run", show=False)
    prepared = prepare(config, tmp_path / "run")
    assert [share.frames for share in prepared.report()] == [115] * len(sets)
    weights = [one.weight for one in sets]
    assert [share.share for share in prepared.report()] == pytest.approx([w / sum(weights) for w in weights], abs=1e-4)
    actions = Policy.load(folder).infer(prepared.example())["actions"]
    assert actions.shape == (4, 8)
