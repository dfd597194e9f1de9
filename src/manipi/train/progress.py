"""What a run tells while it goes: a progress bar, `metrics.jsonl`, and the loss curve as a picture."""

import io
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from manipi.data.mixture import Share
from manipi.storage import atomic_write
from manipi.train.run import Run


class ProgressLog:
    """Averages the steps between two log lines; reads numbers off the device only when it writes one."""

    def __init__(self, run: Run, start: int, end: int, *, batch_size: int, every: int, show: bool):
        self._run, self._every, self._batch_size = run, every, batch_size
        self._bar = tqdm(total=end, initial=start, desc="train", unit="step", disable=not show, smoothing=0.05)
        self._begin_window()

    def __enter__(self) -> "ProgressLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def record(self, step: int, metrics: Mapping[str, Tensor | float], wait: float) -> None:
        """Count one step; `wait` is the time in seconds that it waited for data."""
        self._window.append(metrics)
        self._waits.append(wait)
        self._bar.update()
        if step % self._every == 0 or step == self._bar.total:
            self._write(step)

    def _write(self, step: int) -> None:
        seconds, count = time.perf_counter() - self._started, len(self._window)
        means = {name: sum(float(m[name]) for m in self._window) / count for name in self._window[0]}
        speed = {"samples_per_s": count * self._batch_size / seconds, **data_wait(self._waits, seconds)}
        self._run.log({"step": step, **means, **speed, "time": time.time()})
        wait = f"data wait {speed['data_wait']:.0%}, p95 {1e3 * speed['data_wait_p95']:.0f} ms"
        self._bar.set_postfix_str(f"loss {means['loss']:.4f}, {speed['samples_per_s']:.0f} samples/s, {wait}")
        self._begin_window()

    def _begin_window(self) -> None:
        self._started, self._waits = time.perf_counter(), list[float]()
        self._window = list[Mapping[str, Tensor | float]]()


def data_wait(waits: Sequence[float], seconds: float) -> dict[str, float]:
    """Share of the time that steps waited for data, and the wait in seconds that one step in twenty exceeds."""
    return {"data_wait": sum(waits) / seconds, "data_wait_p95": float(np.percentile(waits, 95))}


def show_mixture(shares: Sequence[Share]) -> None:
    """What the run sees of each dataset, one line per set."""
    width = max(len(one.dataset) for one in shares)
    tqdm.write(f"{'dataset':<{width}}  share  epochs   episodes       frames  held out  left out  robot")
    for one in shares:
        numbers = f"{one.episodes:>9,} {one.frames:>12,} {one.held_out:>9,} {one.left_out:>9,}"
        tqdm.write(f"{one.dataset:<{width}} {one.share:6.1%} {one.epochs:7.2f}  {numbers}  {one.robot}")


def plot_loss(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The loss and the learning rate over the steps, as a PNG."""
    with figure(path, figsize=(7, 3.5)) as drawing:
        axis = drawing.subplots()
        steps = [m["step"] for m in metrics]
        axis.plot(steps, [m["loss"] for m in metrics], color="#0b6e99", linewidth=1.5)
        axis.set(xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.25, which="both")
        rate = axis.twinx()
        rate.plot(steps, [m["learning_rate"] for m in metrics], color="#c46a1b", linewidth=1, linestyle=":")
        rate.set_ylabel("learning rate (dotted)", color="#c46a1b")


@contextmanager
def figure(path: Path, figsize: tuple[float, float]) -> Iterator[Any]:
    """A figure of matplotlib, which is a PNG once the block has drawn it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=figsize, dpi=110, layout="constrained")
    yield drawing
    buffer = io.BytesIO()
    FigureCanvasAgg(drawing).print_png(buffer)
    atomic_write(path, buffer.getvalue())
