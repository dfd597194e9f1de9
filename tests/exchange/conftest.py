"""Tiny trained policies, and their exports; tests that change one take a copy."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.train.sizes import with_layers

from manipi.checkpoints.native import read_checkpoint, write_checkpoint
from manipi.exchange.exporting import Target, export_checkpoint
from manipi.model.config import Adapters, LoRA
from manipi.policy import Policy, self_test_for
from manipi.train.config import TrainConfig
from manipi.train.loop import train


@pytest.fixture(scope="session")
def recipe(tiny) -> Callable[[str], TrainConfig]:
    """`tiny`, but of two layers, which other formats stack or number."""
    return lambda kind: with_layers(tiny(kind, steps=2), 2)


@pytest.fixture(scope="session")
def trained(recipe, undisturbed) -> Callable[[str], Path]:
    """The checkpoint of such a recipe."""
    return lambda kind: undisturbed(recipe(kind)) / "checkpoints/2"


@pytest.fixture(scope="session")
def adapted(tiny, tmp_path_factory) -> Path:
    """The checkpoint of a π0 whose experts have adapters of unequal ranks, after two steps."""
    config = with_layers(tiny("pi0", steps=2), 2)
    lora = LoRA(rank=2, alpha=6.0)
    model = replace(
        config.model,
        vlm_adapters=Adapters(attention=lora, feed_forward=LoRA(rank=3, alpha=3.0)),
        action_adapters=Adapters(attention=LoRA(rank=4, alpha=2.0, rank_stabilized=True)),
    )
    return train(replace(config, model=model), tmp_path_factory.mktemp("adapted") / "run", show=False)


@pytest.fixture(scope="session")
def two_steps(tiny, undisturbed, once) -> Path:
    """A π0.5 of one layer and two denoising steps instead of ten: a program holds each of them."""
    ten = read_checkpoint(undisturbed(tiny("pi05", steps=2)) / "checkpoints/2")
    two = replace(ten, config=replace(ten.config, num_steps=2))
    test = self_test_for(Policy.from_checkpoint(two), ten.self_test.observation)
    return once("two_steps", lambda folder: write_checkpoint(folder / "two", replace(two, self_test=test))) / "two"


@pytest.fixture(scope="session")
def checkpoints(trained, adapted) -> Callable[[str], Path]:
    return lambda kind: adapted if kind == "adapted" else trained(kind)


@pytest.fixture(scope="session")
def exported(checkpoints, tmp_path_factory) -> Callable[[str, Target], Path]:
    """`exported("pi05", "lerobot")` is that policy's checkpoint in that layout."""
    made: dict[tuple[str, str], Path] = {}

    def export_once(kind: str, to: Target) -> Path:
        if (kind, to) not in made:
            made[kind, to] = tmp_path_factory.mktemp(f"{kind}_{to}") / "exported"
            export_checkpoint(checkpoints(kind), to, made[kind, to])
        return made[kind, to]

    return export_once
