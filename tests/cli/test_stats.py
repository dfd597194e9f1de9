import json

import numpy as np

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


def test_feature_that_the_dataset_lacks(manipi, recipe_file):
    recipe_file.write_text(recipe_file.read_text().replace("observation.state", "observation.stat"))
    done = manipi("stats", f"{recipe_file}:my_recipe")
    assert done.returncode == 1
    assert "expected vector 'observation.stat' of size 14" in done.stderr
