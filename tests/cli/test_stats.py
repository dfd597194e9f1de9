import json

import numpy as np
from PIL import Image

from manipi.data.norm_stats import NormStatsSketch
from manipi.tokenizers import FastTokenizer
from manipi.transforms.normalize import load_norm_stats


def test_stats(manipi, recipe_file, tmp_path):
    out, answer = tmp_path / "norm_stats.json", tmp_path / "answer.json"
    done = manipi("stats", f"{recipe_file}:my_recipe", "--out", out, "--json", answer)
    assert done.returncode == 0, done.stderr
    assert "nothing suspicious" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("state[", "actions["))]
    assert len(rows) == 28
    stats = load_norm_stats(out)
    shown = np.array([float(row[-6]) for row in rows[:14]])
    np.testing.assert_allclose(shown, stats.state.mean, rtol=1e-3)
    assert json.loads(out.read_text())["norm_stats"]["actions"].keys() == {"mean", "std", "q01", "q99"}
    # Relative actions start near zero, whatever the joint's position.
    assert np.abs(stats.actions.mean).max() < 0.3
    assert json.loads(answer.read_text())["suspicious"] == []


def test_suspicious_dimension(manipi, recipe_file, tmp_path):
    text = recipe_file.read_text()
    # With a horizon of one and actions relative to themselves, nothing ever moves.
    still = text.replace('State("observation.state", 14)', 'State("action", 14)')
    recipe_file.write_text(still.replace("action_horizon=10", "action_horizon=1"))
    done = manipi("stats", f"{recipe_file}:my_recipe")
    assert done.returncode == 0, done.stderr
    assert "actions[13] never moves: q01 0, q99 0" in done.stdout


def test_floors_steps_and_picture(manipi, recipe_file, tmp_path):
    answer, plot, out = tmp_path / "answer.json", tmp_path / "stats.png", tmp_path / "norm_stats.json"
    flags = ("--json", answer, "--plot", plot, "--out", out, "--per-step", "--sketch", tmp_path / "sketch.npz")
    done = manipi("stats", f"{recipe_file}:my_recipe", "--min-range", "actions[3]=9", "0.0001", *flags)
    assert done.returncode == 0, done.stderr
    (note,) = json.loads(answer.read_text())["widened"]
    assert note.startswith("actions[3] widened to a range of 9, from ")
    assert note in done.stdout
    stats, steps = load_norm_stats(out), json.loads(answer.read_text())["per_step"]
    assert stats.actions.q99[3] - stats.actions.q01[3] == 9
    assert np.array(steps["q01"]).shape == (10, 14)
    assert np.min(steps["min"]) == stats.actions.min.min()
    assert "step 0" in done.stdout
    with Image.open(plot) as picture:
        assert picture.size[0] > 1000
    sketch = NormStatsSketch.load(tmp_path / "sketch.npz")
    np.testing.assert_array_equal(sketch.stats().actions.mean, stats.actions.mean)


def test_mistyped_floor(manipi, recipe_file):
    done = manipi("stats", f"{recipe_file}:my_recipe", "--min-range", "actions[3]=wide")
    assert done.returncode == 1
    assert "a number, or NAME=NUMBER" in done.stderr
    done = manipi("stats", f"{recipe_file}:my_recipe", "--min-range", "action[3]=0.1")
    assert done.returncode == 1
    assert "did you mean actions[3]" in done.stderr


def test_feature_that_the_dataset_lacks(manipi, recipe_file):
    recipe_file.write_text(recipe_file.read_text().replace("observation.state", "observation.stat"))
    done = manipi("stats", f"{recipe_file}:my_recipe")
    assert done.returncode == 1
    assert "expected vector 'observation.stat' of size 14" in done.stderr


def test_fitting_fast(manipi, recipe_file, tmp_path):
    folder, answer = tmp_path / "fast", tmp_path / "answer.json"
    target = f"{recipe_file}:my_recipe"
    flags = ("--fit-fast", folder, "--fast-scale", "20", "--fast-codes", "512", "--json", answer)
    done = manipi("stats", target, *flags)
    assert done.returncode == 0, done.stderr
    fast, report = FastTokenizer.load(folder), json.loads(answer.read_text())["fast"]
    assert (fast.scale, fast.vocab_size) == (20, 512)
    assert f"{report['mean_codes']:.1f} codes per chunk, at most {report['max_codes']}; " in done.stdout
    assert f"{140 / report['mean_codes']:.1f} times fewer than one for each of its 140 numbers" in done.stdout
    rows = [line.split() for line in done.stdout.partition("FAST with 512 codes")[2].splitlines()]
    shown = np.array([row[-4:] for row in rows if row and row[0].startswith("actions[")], float)
    np.testing.assert_allclose(shown[:, [0, 2]].T, [report["max_error"], report["mean_error"]], rtol=1e-3)
    # A rounded coefficient is off by half of 1/20 at most, and so is the length of ten of them by the root of ten.
    assert 0 < shown[:, 0].max() <= 0.5 / 20 * np.sqrt(10)
    # One normalised unit is half the distance between the quantiles.
    actions = json.loads(answer.read_text())["stats"]["actions"]
    worth = (np.array(actions["q99"]) - actions["q01"]) / 2
    np.testing.assert_allclose(shown[:, [1, 3]], shown[:, [0, 2]] * worth[:, None], rtol=2e-3, atol=1e-6)
    again = manipi("stats", target, *flags)
    assert again.returncode == 1
    assert "a folder that does not exist yet" in again.stderr
    assert manipi("stats", target, "--fit-fast", tmp_path / "b", "--fast-codes", "9").returncode == 1
    assert not (tmp_path / "b").exists()


def test_a_mixture_has_the_statistics_of_all_its_sets(manipi, toy_dataset, tmp_path):
    recipe = tmp_path / "mixed.py"
    recipe.write_text(f"""
from dataclasses import replace
from manipi.tabletop.recipes import pi05_tabletop
from manipi.train.config import DataConfig, DatasetConfig, TrainConfig

def mixed() -> TrainConfig:
    sets = tuple(DatasetConfig(path={str(toy_dataset)!r}, episodes=e) for e in ((0, 1, 2), (3, 4, 5, 6, 7)))
    return replace(pi05_tabletop(), data=DataConfig(mixture=sets, holdout=0.0))
""")
    done = manipi("stats", f"{recipe}:mixed", "--json", tmp_path / "stats.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "stats.json").read_text())["stats"]["num_frames"] == 65
    assert done.stdout.startswith("65 frames of training episodes in ")
