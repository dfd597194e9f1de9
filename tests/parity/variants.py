"""A folder of cases as `golden/README.md` describes them, of other sizes than the public set, with our own numbers.

State of 6 dimensions, state of 8 under an action_dim of 7, 15 steps, 180 prompt tokens, pictures of 28 pixels, and the
Gemma that openpi calls "dummy". Nothing here says whether a number is right: the expected values are those of our plain
path. What such a folder shows is whether the suite takes everything from the files of a case.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from golden import Arrays, Case
from openpi_trees import from_openpi_tree
from quantities import as_numpy, quantities
from test_training import trace

from manipi.checkpoints.native import Checkpoint, PolicyConfig
from manipi.model import VLA
from manipi.model.config import Adapters, GemmaSize, LoRA, ModelConfig, Pi0Config, Pi0FastConfig, Pi05Config, VisionSize
from manipi.policy import Policy
from manipi.robots import Joints, Robot, State
from manipi.tokenizers import SentencePieceTokenizer, Tokenizers
from manipi.train.step.state import trainable_parameters
from manipi.transforms.normalize import contract, normalize
from manipi.types import FieldStats, NormStats
from manipi.weights.names import openpi_arrays
from manipi.weights.stores import ArrayInfo, write_tree

BATCH, HORIZON, LENGTH, ACTIONS, IMAGE = 2, 15, 180, 7, 28
STATES = {"pi0": 7, "pi05": 8, "pi0_fast": 8, "pi0_lora": 7}
"""Dimensions of the recorded state: wider than the actions where no network reads it."""
DUMMY = GemmaSize(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16)
VISION = VisionSize(width=32, depth=1, mlp_dim=64, num_heads=2, patch_size=14, image_size=IMAGE)
CAMERAS = {
    False: ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
    True: ("base_0_rgb", "base_1_rgb", "wrist_0_rgb"),
}
TRAINING = {
    "steps": 2,
    "optimizer": {
        "type": "AdamW", "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 1e-10, "clip_gradient_norm": 1.0,
    },
    "schedule": {
        "type": "cosine with linear warmup", "warmup_steps": 1, "peak_lr": 1e-3, "decay_steps": 2, "decay_lr": 1e-4,
    },
}  # fmt: skip


def write_variant(folder: Path) -> None:
    """Models, trees, checkpoints, transforms and whole calls, in a folder that is made."""
    for kind in STATES:
        _write_model(folder / "models" / f"dummy_{kind}", kind)
        _write_tree(folder / "trees" / f"dummy_{kind}.json", _config(kind))
    _write_transforms(folder / "transforms")
    _write_tokenizer(folder / "tokenizer/words.model")
    _write_calls(folder / "policy")


def _config(kind: str) -> ModelConfig:
    sizes = {"action_dim": ACTIONS, "action_horizon": HORIZON, "max_token_len": LENGTH}
    shared = {**sizes, "vision": VISION, "vlm": DUMMY, "vocab_size": 1024}
    if kind == "pi0_fast":
        return Pi0FastConfig(**shared)
    rank = Adapters(attention=LoRA(rank=2, alpha=2.0), feed_forward=LoRA(rank=2, alpha=2.0))
    adapters = {"vlm_adapters": rank, "action_adapters": rank} if kind == "pi0_lora" else {}
    return (Pi05Config if kind == "pi05" else Pi0Config)(**shared, action_expert=DUMMY, **adapters)


def _frozen(config: ModelConfig) -> list[str]:
    """What a run that trains adapters leaves alone of the arrays beside them."""
    with torch.device("meta"):
        full, trained = (trainable_parameters(VLA(config), mode) for mode in ("full", "lora"))
    if getattr(config, "vlm_adapters", None) is None or not config.vlm_adapters:
        return []
    names = {path: {n for layer in a.names for n in layer} for path, a in openpi_arrays(config).items()}
    return [path for path, ours in names.items() if ours & full.keys() and not ours & trained.keys()]


# ---- models


def _write_model(folder: Path, kind: str) -> None:
    folder.mkdir(parents=True)
    rng, config = np.random.default_rng(0), _config(kind)
    params = {
        path: (rng.normal(size=array.shape) / np.sqrt(array.shape[-1])).astype(np.float32)
        for path, array in openpi_arrays(config).items()
    }
    np.savez(folder / "params.npz", **params)
    np.savez(folder / "inputs.npz", **_inputs(kind, rng))
    steps = {"decode/tokens": np.zeros((BATCH, 3))} if kind == "pi0_fast" else {}
    np.savez(folder / "outputs.npz", **steps)
    frozen = _frozen(config)
    how = {"ema_decay": None, "frozen": "adapters alone"} if frozen else {"ema_decay": 0.9, "frozen": "none"}
    recorded = {
        **{name: getattr(config, name) for name in ("vocab_size", "action_dim", "action_horizon", "max_token_len")},
        "kind": kind,
        "siglip": asdict(VISION) | {"pool": "none", "posemb": "learned"},
        "vlm": asdict(DUMMY),
        "action_expert": None if kind == "pi0_fast" else asdict(DUMMY),
        "lora": _adapters(config) if frozen else None,
        "num_parameters": sum(value.size for value in params.values()),
        "num_parameter_arrays": len(params),
        "frozen_parameters_by_default_filter": frozen,
        "grad_norm_per_parameter": {},
        "train_trace": TRAINING | how,
    } | ({"eos_token": 1} if kind == "pi0_fast" else {})
    _write_json(folder / "config.json", recorded)
    names = ["siglip/", "v_t", "logits", "kv_cache/k", "extra_v_t", "actions_4", "decode/tokens", "grad"]
    case = Case(folder)
    found = {name: as_numpy(value) for name, value in quantities(case, case.model(), names).items()}
    norms = {n.removeprefix("grad_norm/"): float(x) for n, x in found.items() if n.startswith("grad_norm/")}
    _write_json(folder / "config.json", recorded | {"grad_norm_per_parameter": norms})
    kept = {n: x for n, x in found.items() if not n.startswith("grad_norm/")}
    np.savez(folder / "outputs.npz", **kept)
    draws = {} if kind == "pi0_fast" else _draws(rng)
    np.savez(folder / "train_trace.npz", **draws)
    np.savez(folder / "train_trace.npz", **draws, **trace(Case(folder), folder / "train_trace.npz"))
    fields = {"state": _statistics(rng, 6), "actions": _statistics(rng, ACTIONS)}
    stats = {key: dict(zip(("mean", "std", "q01", "q99"), map(np.ndarray.tolist, x))) for key, x in fields.items()}
    _write_json(folder / "ckpt_pure/assets/six/norm_stats.json", {"norm_stats": stats})
    (folder / "ckpt_pure/params").mkdir(parents=True)
    arrays = {path: ArrayInfo(value.shape, torch.float32) for path, value in params.items()}
    layers = [(path, None, torch.from_numpy(value)) for path, value in params.items()]
    write_tree(folder / "ckpt_pure/params", arrays, layers)


def _adapters(config: ModelConfig) -> dict[str, Any]:
    entry = {"attn": {"rank": 2, "alpha": 2.0}, "ffn": {"rank": 2, "alpha": 2.0}}
    return {"vlm": entry, "action_expert": entry, "rslora": False}


def _draws(rng: np.random.Generator) -> Arrays:
    noise = rng.normal(size=(TRAINING["steps"], BATCH, HORIZON, ACTIONS)).astype(np.float32)
    return {"noise": noise, "time": rng.uniform(0.1, 0.9, (TRAINING["steps"], BATCH)).astype(np.float32)}


def _inputs(kind: str, rng: np.random.Generator) -> Arrays:
    cameras, fast = CAMERAS[kind == "pi0_fast"], kind == "pi0_fast"
    index, lengths = np.arange(LENGTH), np.array([[100], [LENGTH]])
    arrays = {
        **{f"image/{name}": rng.uniform(-1, 1, (BATCH, IMAGE, IMAGE, 3)).astype(np.float32) for name in cameras},
        **{f"image_mask/{name}": np.array([True, name != cameras[-1]]) for name in cameras},
        "state": rng.normal(size=(BATCH, STATES[kind])).astype(np.float32),
        "actions": rng.normal(size=(BATCH, HORIZON, ACTIONS)).astype(np.float32),
        "tokenized_prompt": np.where(index < lengths, rng.integers(4, 900, (BATCH, LENGTH)), 0).astype(np.int32),
        "tokenized_prompt_mask": index < lengths,
    }
    if not fast:
        draws = {name: rng.normal(size=(BATCH, HORIZON, ACTIONS)) for name in ("noise", "init_noise")}
        draws |= {"time": np.array([0.3, 0.7]), "extra_times": np.array([[0.5, 0.6], [0.001, 0.01], [0.9, 1.0]])}
        return arrays | {name: value.astype(np.float32) for name, value in draws.items()}
    postfix = (index >= lengths - 30) & (index < lengths)
    arrays |= {"token_ar_mask": postfix.astype(np.int32), "token_loss_mask": postfix}
    prompt = {"tokenized_prompt": arrays["tokenized_prompt"], "tokenized_prompt_mask": index < np.array([[60], [90]])}
    nothing = {"token_ar_mask": np.zeros_like(prompt["tokenized_prompt"]), "token_loss_mask": np.zeros_like(postfix)}
    return arrays | {f"decode/{name}": value for name, value in (prompt | nothing).items()}


def _write_tree(path: Path, config: ModelConfig) -> None:
    arrays = {name: {"shape": list(a.shape), "dtype": "float32"} for name, a in openpi_arrays(config).items()}
    tree = {
        "parameters": arrays,
        "num_arrays": len(arrays),
        "num_parameters": sum(int(np.prod(array["shape"])) for array in arrays.values()),
        "defaults": {"action_dim": ACTIONS, "action_horizon": HORIZON, "max_token_len": LENGTH},
        "frozen_parameters_by_default_filter": _frozen(config),
    }
    _write_json(path, tree)


# ---- transforms


def _write_transforms(folder: Path) -> None:
    """LIBERO's adapter with a state of 6; padding and offsets of such states. All of it copies, or is subtraction."""
    rng, arrays, cases = np.random.default_rng(1), {}, []

    def add(case: str, op: str, args: dict[str, Any], given: Mapping[str, Any], out: Mapping[str, Any]) -> None:
        cases.append({"case": case, "op": op, "args": args})
        for part, values in (("in", given), ("out", out)):
            arrays.update({f"{case}/{part}/{key}": value for key, value in values.items()})

    state, actions = rng.normal(size=6), rng.normal(size=(4, 7)).astype(np.float32)
    base, wrist = rng.integers(0, 256, (2, 20, 30, 3), np.uint8)
    seen = {"observation|image": base, "observation|wrist_image": wrist, "observation|state": state}
    for kind, absent in (("pi0", False), ("pi05", False), ("pi0_fast", True)):
        names = CAMERAS[False]
        pictures = dict(zip(names, (base, wrist, np.zeros_like(base)), strict=True))
        out = {f"image/{name}": picture for name, picture in pictures.items()}
        out |= {f"image_mask/{name}": np.array(valid) for name, valid in zip(names, (True, True, absent), strict=True)}
        out |= {"state": state, "actions": actions, "prompt": np.array("go")}
        given = {**seen, "actions": actions, "prompt": np.array("go")}
        add(f"inputs_{kind}", "libero_inputs", {"model_type": kind}, given, out)
    add("outputs", "libero_outputs", {}, {"actions": actions}, {"actions": actions})
    mask, moved = [True] * 6 + [False], actions - np.append(state, 0)
    add(
        "delta",
        "delta_actions",
        {"mask": mask},
        {"state": state, "actions": actions},
        {"state": state, "actions": moved},
    )
    single = state.astype(np.float32)
    padded = {"state": np.append(single, np.float32(0)), "actions": actions}
    add("pad", "pad_states_and_actions", {"model_action_dim": 7}, {"state": single, "actions": actions}, padded)
    folder.mkdir(parents=True)
    np.savez(folder / "sizes.npz", **arrays)
    _write_json(folder / "sizes.json", cases)


# ---- whole calls


def _write_tokenizer(path: Path) -> None:
    """As Gemma's: action codes are pieces that no text has, in front of the last 128."""
    path.parent.mkdir(parents=True)
    model, numbers, symbols = io.BytesIO(), " ".join(map(str, range(256))), ["|", *(f"<loc{i}>" for i in range(400))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"Task: wipe the tray, State: {numbers};", "Action: put it back"]),
        model_writer=model, model_type="bpe", vocab_size=4 + len(symbols) + 120, user_defined_symbols=symbols,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


def _write_calls(folder: Path) -> None:
    folder.mkdir()
    shared = {"tokenizer": "../tokenizer/words.model", "weights": "../models/<model>/params.npz"}
    calls = [_write_call(folder, "dummy_pi0", 6, in_prompt=False), _write_call(folder, "dummy_pi05", 8, in_prompt=True)]
    _write_json(folder / "cases.json", {**shared, "compute_dtype": "float32", "cases": calls})


def _write_call(folder: Path, model: str, states: int, *, in_prompt: bool) -> dict[str, Any]:
    rng, case = np.random.default_rng(2), Case(folder.parent / "models" / model)
    robot = Robot(
        name="six or eight",
        cameras={"base": "observation/image", "left_wrist": "observation/wrist_image"},
        state=(State("observation/state", states),),
        actions=(Joints(6, relative=True), Joints(1)),
    )
    slots = {"base": "base_0_rgb", "left_wrist": "left_wrist_0_rgb", "right_wrist": "right_wrist_0_rgb"}
    config = replace(case.config, cameras=tuple(slots))
    config = replace(config, state_in_prompt=True) if in_prompt else config
    fields = {name: FieldStats(*_statistics(rng, size)) for name, size in (("state", states), ("actions", ACTIONS))}
    stats = NormStats(**fields, num_frames=0, contract=contract(robot, HORIZON), data="")
    norm_mode = "quantile" if in_prompt else "zscore"
    policy = Policy.from_checkpoint(
        Checkpoint(
            weights=from_openpi_tree(case.params, config),
            config=PolicyConfig(model=config, norm_mode=norm_mode, num_steps=3, step=0),
            robot=robot,
            norm_stats=stats,
            tokenizers=Tokenizers(SentencePieceTokenizer(folder.parent / "tokenizer/words.model")),
            self_test=None,
        )
    )
    base, wrist = rng.integers(0, 256, (2, 40, 30, 3), np.uint8)
    seen = {"observation/image": base, "observation/wrist_image": wrist, "observation/state": rng.normal(size=states)}
    noise = rng.normal(size=(HORIZON, ACTIONS)).astype(np.float32)
    sample, _ = policy.pipeline.encode(seen | {"prompt": "wipe the tray"})
    whole = normalize(seen["observation/state"].astype(np.float32), stats.state, norm_mode)
    padding = np.zeros(max(0, ACTIONS - states), np.float32)
    found = {
        "state": np.concatenate([whole, padding]),  # as the reference has it: wider states stay
        "tokenized_prompt": sample["tokens"],
        "tokenized_prompt_mask": sample["token_valid"],
    }
    for name, picture, valid in zip(slots.values(), sample["images"], sample["image_valid"], strict=True):
        found |= {f"image/{name}": picture, f"image_mask/{name}": valid}
    arrays = {f"obs/{key.replace('/', '|')}": value for key, value in seen.items()} | {"obs/prompt": "wipe the tray"}
    arrays |= {f"model_input/{key}": value for key, value in found.items()}
    arrays |= {
        f"norm_stats/{field}/{name}": getattr(getattr(stats, field), name)
        for field in ("state", "actions")
        for name in ("mean", "std", "q01", "q99")
    }
    actions = policy.infer(seen | {"prompt": "wipe the tray"}, noise)["actions"]
    np.savez(folder / f"{model}.npz", noise=noise, actions=actions, **arrays)
    return {
        "case": model,
        "model": model,
        "use_quantiles": in_prompt,
        "discrete_state_input": in_prompt,
        "tokenizer_max_len": LENGTH,
        "default_prompt": None,
        "num_steps": 3,
        "transform_order": "libero inputs; delta(6 of 7); normalise; resize; tokenize; pad",
    }


def _statistics(rng: np.random.Generator, size: int) -> list[np.ndarray]:
    mean, std = rng.normal(size=size), rng.uniform(0.5, 2, size)
    return [mean, std, mean - 2 * std, mean + 2 * std, mean - 3 * std, mean + 3 * std]


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
