"""What the log says about the wait for data."""

import pytest

from manipi.train.run.folder import Run
from manipi.train.watch.progress import ProgressLog, RunLog, data_wait


def test_one_step_in_twenty_waits():
    wait = data_wait([0.0] * 90 + [0.5] * 10, seconds=20.0)
    assert wait == {"data_wait": 0.25, "data_wait_p95": 0.5}
    assert data_wait([0.0] * 99 + [9.0], seconds=100.0)["data_wait_p95"] == 0.0


def test_every_line_has_its_own_window(tiny, tmp_path, capsys):
    run = Run(tmp_path / "run", tiny())
    with ProgressLog(RunLog(run, 0), 0, 4, batch_size=4, every=2, show=True) as log:
        for step, wait in enumerate([3.0, 1.0, 0.25, 0.25], start=1):
            log.record(step, {"loss": 1.0}, wait)
    first, second = run.read_metrics()
    assert first["data_wait_p95"] == pytest.approx(2.9)
    assert second["data_wait_p95"] == 0.25
    assert first["data_wait"] > second["data_wait"] > 0
    assert "p95 250 ms" in capsys.readouterr().err
