"""The robot files of examples/ train on the real data that they name, and what they train can be evaluated."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from manipi.cli import main
from manipi.recipes.registry import load_recipe
from manipi.train.config import TrainConfig
from manipi.train.loop import train

REPOSITORY = Path(__file__).parents[1]
CASES = {
    "g1_v21": ("g1.py:pi05_g1", "g1_bottle_lerobot_v21", (1, 0)),
    "g1_v30": ("g1.py:pi05_g1", "g1_bottle_lerobot_v30", (1, 0)),
    "open50": ("open50.py:pi0_open50", "open50_lerobot_v3", (10, 11)),
}
"""Recipe, dataset, and two of its episodes."""


def recipe(case: str) -> TrainConfig:
    """Two steps of the example's recipe on two episodes, one of them held out."""
    target, dataset, episodes = CASES[case]
    path = Path(os.environ.get("MANIPI_SHARED", REPOSITORY / "../shared")).resolve() / "datasets" / dataset
    if not path.is_dir():
        pytest.skip(f"no {path}; set MANIPI_SHARED to the folder that holds datasets/{dataset}")
    config = load_recipe(f"{REPOSITORY / 'examples' / target}")
    data = replace(config.data, path=str(path), episodes=episodes, holdout=0.5, num_workers=0, cache="none")
    validation = replace(config.validation, samples=16)
    return replace(config, data=data, validation=validation, steps=2, batch_size=2, num_threads=1, async_save=False)


@pytest.mark.parametrize("case", [pytest.param("g1_v21", marks=pytest.mark.long), "g1_v30", "open50"])
def test_trains_and_evaluates(case, tmp_path, capsys):
    config = recipe(case)
    checkpoint = train(config, tmp_path / "run", show=False)
    main(["eval", str(checkpoint), "--max-frames", "3", "--json", str(tmp_path / "out.json")])
    assert "The policy" in capsys.readouterr().out
    held_out = json.loads((tmp_path / "out.json").read_text())["held-out"]
    assert held_out["frames"] == 3
    assert len(held_out["errors"]) == 4
    assert len(held_out["dimensions"]) == config.robot.action_size
    assert all(error["share_of_travel"] > 0 for error in held_out["errors"].values())
