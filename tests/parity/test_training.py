"""The reference's optimizer traces: losses, gradients, schedule, AdamW, clipping, averaging, and what is frozen."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import ABSENT, CASES, Arrays, Case, keys, over, read_arrays, require_frozen
from openpi_trees import from_openpi_tree, to_openpi_tree
from tolerances import TRACE, tolerance_of

from manipi.robots.tabletop import TABLETOP
from manipi.train.config import ComputeConfig, DataConfig, OptimizerConfig, TrainConfig
from manipi.train.step import step as step_module
from manipi.train.step.optimizer import learning_rate
from manipi.train.step.state import TrainState
from manipi.train.step.step import train_step
from manipi.weights.names import openpi_arrays

pytestmark = pytest.mark.skipif(not CASES, reason=ABSENT)

NOT_A_KERNEL = ("bias", "scale", "pos_embedding", "input_embedding")
INPUTS = "noise|time"
# Its gradient is zero but for rounding noise, which AdamW turns into steps of full length.
NOISE = r"final_(param|ema)/.*MultiHeadDotProductAttention_0/key/bias"


def settings(case: Case, stem: str) -> dict[str, Any]:
    """The recorded settings of a trace. Those of others than `train_trace` are changes of its settings."""
    base, changes = case.recorded["train_trace"], dict(case.recorded[stem])
    kinds = base["optimizer"]["type"], base["schedule"]["type"]
    assert kinds == ("AdamW", "cosine with linear warmup")
    flat = {"steps": base["steps"], "ema_decay": base["ema_decay"], "frozen": base["frozen"]}
    flat |= base["optimizer"] | base["schedule"]
    for name in ("as", "optimizer", "schedule"):
        part = changes.pop(name, {})
        changes |= part if isinstance(part, dict) else {}
    assert changes.keys() <= flat.keys(), f"{stem}: unknown settings {sorted(changes.keys() - flat.keys())}"
    return flat | changes


def read_config(case: Case, recorded: dict[str, Any]) -> TrainConfig:
    names = {"lr": "peak_lr", "final_lr": "decay_lr", "beta1": "b1", "beta2": "b2", "clip_norm": "clip_gradient_norm"}
    names |= {name: name for name in ("eps", "weight_decay", "warmup_steps", "decay_steps")}
    return TrainConfig(
        robot=TABLETOP,
        data=DataConfig(path="unused"),
        model=replace(case.config, dtype="bfloat16"),  # the default: the precision decides
        compute=ComputeConfig(precision="fp32" if case.config.dtype == "float32" else "bf16"),
        optimizer=OptimizerConfig(**{ours: recorded[theirs] for ours, theirs in names.items()}),
        ema_decay=recorded["ema_decay"] or 0.0,
        trained="full" if recorded["frozen"] == "none" else "lora",
        frozen_dtype="bfloat16" if "bfloat16" in recorded["frozen"] else "float32",
    )


def start(case: Case, config: TrainConfig) -> TrainState:
    """The state before the first step, with the recorded weights."""
    state = TrainState.initial(config)
    state.model.load_state_dict(from_openpi_tree(case.params, config.model))
    for name, average in state.average.items():
        average.copy_(state.optimized[name].detach())
    return state


def tensors(case: Case, paths: frozenset[str]) -> set[str]:
    """Our names for arrays of the reference."""
    tree = openpi_arrays(case.config)
    return {name for path in paths for layer in tree[path].names for name in layer}


def run(case: Case, file: Path) -> Arrays:
    """Our trace, under the names of the recorded one."""
    recorded = settings(case, file.stem)
    config = read_config(case, recorded)
    state = start(case, config)
    frozen = tensors(case, case.frozen if config.trained == "lora" else frozenset())
    unreached = {n: p for n, p in state.model.named_parameters() if n not in state.parameters and n not in frozen}
    averages = {name: p.detach().clone() for name, p in unreached.items()}
    kept = {n: p.detach() for n, p in state.model.named_parameters() if n in frozen}
    drifting, dtype = dict(kept), getattr(torch, config.frozen_dtype)
    decay, rest = torch.tensor(config.ema_decay, dtype=dtype), torch.tensor(1 - config.ema_decay, dtype=dtype)
    steps: list[dict[str, float]] = []
    before = to_openpi_tree(state.model.state_dict(), case.config)
    for step in range(recorded["steps"]):
        metrics, _ = train_step(state, case.batch(), config)
        with torch.no_grad():
            for name, p in unreached.items():
                # Nothing reads these (see `trainable_parameters`), so we leave them alone; the reference's decay.
                p.mul_(1 - learning_rate(step, config.optimizer) * config.optimizer.weight_decay)
                averages[name].lerp_(p, 1 - config.ema_decay)
        now = to_openpi_tree(state.model.state_dict(), case.config)
        # Ours keep their value. The reference averages frozen weights too, in bfloat16, where they drift.
        drifting = {name: average * decay + kept[name] * rest for name, average in drifting.items()}
        average = to_openpi_tree(state.inference_weights() | averages | drifting, case.config)
        found = {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"], "lr": metrics["learning_rate"]}
        found |= {"update_norm": norm({path: now[path] - before[path] for path in now}), "param_norm_all": norm(now)}
        found |= {"ema_param_norm_all": norm(average), "param_norm_kernels": norm(kernels(now))}
        steps.append({name: float(value) for name, value in found.items()})
        before = now
    trace = {name: np.array([step[name] for step in steps]) for name in steps[0]}
    final = {"final_param": now, "final_ema": average}
    return trace | {f"{kind}/{path}": value for kind, tree in final.items() for path, value in tree.items()}


def norm(tree: Arrays) -> float:
    return float(np.sqrt(sum(np.square(value, dtype=np.float64).sum() for value in tree.values())))


def kernels(tree: Arrays) -> Arrays:
    return {path: value for path, value in tree.items() if value.ndim > 1 and not path.endswith(NOT_A_KERNEL)}


@cache
def trace(case: Case, file: Path) -> Arrays:
    draws = read_arrays(case.folder / "train_trace.npz") | read_arrays(file)  # others have the draws of the first
    with pytest.MonkeyPatch.context() as patch:
        if "noise" in draws:
            noise, time = (torch.from_numpy(draws[name])[:, :, None] for name in ("noise", "time"))
            patch.setattr(step_module, "draw_noise", lambda seed, step, *size: (noise[step], time[step]))
        return run(case, file)


@over("case", "file", "name", values=keys(CASES, "train_trace*.npz", skip=f"{INPUTS}|{NOISE}"))
def test_traces(case, file, name, measure):
    found = trace(case, file)
    assert name in found, f"unread golden keys: {name} is nothing that a training step changes"
    row = tolerance_of(name, TRACE)
    measure(row.quantity, row.error(found[name], read_arrays(file)[name]), row.limit)


@over("case", values=CASES)
def test_what_is_frozen(case):
    """Of the arrays that the loss can reach, training leaves alone those that the reference leaves alone."""
    require_frozen(case.config, case.frozen)
