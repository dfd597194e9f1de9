"""ALOHA: released weights, fine-tuning, and the simulated robot."""

from manipi.model.config import ModelConfig, Pi0Config, Pi05Config
from manipi.recipes import openpi
from manipi.robots.aloha import aloha, aloha_sim
from manipi.train.config import TrainConfig


def pi0_aloha() -> TrainConfig:
    """Serve the base model."""
    return _serve(Pi0Config(), "pi0_base")


def pi05_aloha() -> TrainConfig:
    """Serve the base model."""
    return _serve(Pi05Config(), "pi05_base")


def pi0_aloha_towel() -> TrainConfig:
    return _serve(Pi0Config(), "pi0_aloha_towel", "fold the towel")


def pi0_aloha_tupperware() -> TrainConfig:
    return _serve(Pi0Config(), "pi0_aloha_tupperware", "open the tupperware and put the food on the plate")


def pi0_aloha_pen_uncap() -> TrainConfig:
    return _pen_uncap(Pi0Config(), "pi0_base", batch_size=32)


def pi05_aloha_pen_uncap() -> TrainConfig:
    return _pen_uncap(Pi05Config(), "pi05_base", batch_size=64)


def pi0_aloha_sim() -> TrainConfig:
    """One camera, absolute joints, statistics of its own."""
    robot = aloha_sim(relative=False, default_prompt="Transfer cube")
    data = openpi.data("hf://datasets/lerobot/aloha_sim_transfer_cube_human")
    return openpi.config(robot, Pi0Config(), "pi0_base", data=data, steps=20_000)


def _serve(model: ModelConfig, weights: str, prompt: str | None = None) -> TrainConfig:
    data = openpi.data(stats=f"{weights}/assets/trossen")
    return openpi.config(aloha(default_prompt=prompt), model, weights, data=data)


def _pen_uncap(model: ModelConfig, weights: str, batch_size: int) -> TrainConfig:
    path = "hf://datasets/physical-intelligence/aloha_pen_uncap_diverse"
    data = openpi.data(path, stats=f"{weights}/assets/trossen")
    robot = aloha(default_prompt="uncap the pen")
    return openpi.config(robot, model, weights, data=data, steps=20_000, batch_size=batch_size)
