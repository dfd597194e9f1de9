"""Ten optimizer steps of the reference: losses, gradients, schedule, AdamW, clipping and the averaged weights."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from manipi.checkpoints.openpi_names import from_openpi_tree, to_openpi_tree
from manipi.model import ModelInput
from manipi.model.config import Compat, GemmaSize, Pi0Config, Pi0FastConfig, Pi05Config, VisionSize
from manipi.robots.tabletop import TABLETOP
from manipi.train import loop
from manipi.train.config import DataConfig, OptimizerConfig, TrainConfig
from manipi.train.loop import train_step
from manipi.train.optimizer import learning_rate
from manipi.train.state import TrainState

SHARED = Path(os.environ.get("MANIPI_SHARED", Path(__file__).parents[2].parent / "shared"))
GOLDEN = SHARED / "golden/models"
KINDS = {"pi0": Pi0Config, "pi05": Pi05Config, "pi0_fast": Pi0FastConfig}
TRACES = sorted(path for kind in KINDS for path in (GOLDEN / kind).glob("train_trace*.npz"))

pytestmark = pytest.mark.skipif(not TRACES, reason=f"no golden traces under {GOLDEN}; set MANIPI_SHARED")


def read_model(folder: Path, cameras: tuple[str, ...]) -> Pi0Config | Pi05Config | Pi0FastConfig:
    recorded = json.loads((folder / "config.json").read_text())
    fields = {key: recorded[key] for key in ("vocab_size", "action_dim", "action_horizon", "max_token_len")}
    fields["vision"] = VisionSize(**{key: recorded["siglip"][key] for key in VisionSize.__dataclass_fields__})
    fields["vlm"] = GemmaSize(**recorded["vlm"])
    if recorded["action_expert"] is not None:
        fields["action_expert"] = GemmaSize(**recorded["action_expert"])
    compat = Compat(unmasked_loss=True, fast_padded_positions=True)
    return KINDS[recorded["kind"]](**fields, cameras=cameras, dtype="float32", compat=compat)


def read_batch(inputs: dict[str, np.ndarray], cameras: tuple[str, ...]) -> ModelInput:
    names = {"tokens": "tokenized_prompt", "token_valid": "tokenized_prompt_mask", "state": "state"}
    names |= {"actions": "actions", "token_causal": "token_ar_mask", "token_loss": "token_loss_mask"}
    arrays = {ours: inputs[theirs] for ours, theirs in names.items() if theirs in inputs}
    for ours, theirs in (("images", "image"), ("image_valid", "image_mask")):
        arrays[ours] = np.stack([inputs[f"{theirs}/{camera}"] for camera in cameras], axis=1)
    return ModelInput.from_numpy(arrays)


@dataclass(frozen=True)
class Trace:
    arrays: dict[str, np.ndarray]
    config: TrainConfig
    state: TrainState
    batch: ModelInput


@pytest.fixture(params=TRACES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def trace(request, monkeypatch) -> Trace:
    folder, arrays = request.param.parent, dict(np.load(request.param))
    inputs = dict(np.load(folder / "inputs.npz"))
    cameras = tuple(name.removeprefix("image/") for name in inputs if name.startswith("image/"))
    decay = {"weight_decay": 0.05, "clip_norm": 0.5} if request.param.stem.endswith("_wd") else {}
    config = TrainConfig(
        robot=TABLETOP,
        data=DataConfig(path="unused"),
        model=read_model(folder, cameras),
        optimizer=OptimizerConfig(lr=1e-3, final_lr=1e-4, warmup_steps=3, decay_steps=10, **decay),
        ema_decay=0.9,
    )
    state = TrainState.initial(config)
    state.model.load_state_dict(from_openpi_tree(dict(np.load(folder / "params.npz")), config.model))
    for name, parameter in state.parameters.items():
        state.average[name].copy_(parameter.detach())
    draws = dict(np.load(folder / "train_trace.npz"))  # the other trace has the same
    if "noise" in draws:
        pairs = zip(draws["noise"], draws["time"], strict=True)
        drawn = [(torch.from_numpy(noise)[:, None], torch.from_numpy(time)[:, None]) for noise, time in pairs]
        monkeypatch.setattr(loop, "draw_noise", lambda seed, step, *size: drawn[step])
    return Trace(arrays, config, state, read_batch(inputs, cameras))


def test_ten_steps(trace):
    arrays, state = trace.arrays, trace.state
    found = [train_step(state, trace.batch, trace.config) for _ in range(10)]
    np.testing.assert_allclose([float(m["loss"]) for m in found], arrays["loss"], rtol=2e-4)
    np.testing.assert_allclose([float(m["grad_norm"]) for m in found], arrays["grad_norm"], rtol=5e-4)
    np.testing.assert_allclose([m["learning_rate"] for m in found], arrays["lr"], rtol=1e-6)
    assert learning_rate(10, trace.config.optimizer) == pytest.approx(1e-4)
    ours = {"final_param": state.model.state_dict(), "final_ema": state.inference_weights()}
    trees = {kind: to_openpi_tree(weights, trace.config.model) for kind, weights in ours.items()}
    recorded = [key for key in arrays if key.startswith("final_")]
    assert len(recorded) >= 12
    for key in recorded:
        kind, _, path = key.partition("/")
        np.testing.assert_allclose(trees[kind][path], arrays[key], atol=3e-4, err_msg=key)
