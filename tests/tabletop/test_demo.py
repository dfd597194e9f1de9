"""The demonstration from end to end, at the smallest size: real video, real training, real servers."""

import json

import pytest

from manipi.errors import TrainingError
from manipi.tabletop.demo import run_demo
from manipi.tabletop.recipes import DemoConfig

SMALL = DemoConfig(episodes=20, steps=2, trials=1, films=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_stage_leaves_its_result_and_is_not_repeated(tmp_path):
    run_demo(tmp_path, SMALL)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["success"]) == {"trained", "untrained", "blind", "wrong_words"}
    assert all(set(rate) >= {"n", "k", "rate", "low", "high"} for rate in report["success"].values())
    assert all(rate["n"] == 1 for rate in report["success"].values())
    assert report["settings"]["dataset"]["episodes"] == 20
    page = (tmp_path / "report.html").read_text()
    assert "<video" in page
    assert "computed in float32" in page  # as its recipe's precision says, and not its model
    kept = [tmp_path / "dataset", tmp_path / "check.json", *(tmp_path / "evaluations").glob("*/*")]
    before = {path: path.stat().st_mtime_ns for path in [*kept, tmp_path / "run" / "checkpoints" / "2"]}
    run_demo(tmp_path, SMALL)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(TrainingError, match="another folder with --dir"):
        run_demo(tmp_path, DemoConfig(episodes=21))
