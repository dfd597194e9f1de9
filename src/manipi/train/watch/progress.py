"""What a run tells while it goes: a progress bar, `metrics.jsonl`, and the loss curve as a picture."""

import io
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from manipi.data.feed.loader import Batch
from manipi.data.feed.mixture import Share
from manipi.storage import atomic_write
from manipi.train.step.state import TrainState
from manipi.train.watch.flops import ModelFlops, peak_flops
from manipi.train.watch.loggers import RunLog

OF_THE_MACHINE = frozenset(
    ("time", "time_per_step", "samples_per_s", "data_wait", "data_wait_p95", "mfu", "peak_memory_gb")
)
"""What a log line says about this machine at this hour; the rest is the same whenever the run is repeated."""

Window: TypeAlias = Sequence[Mapping[str, Tensor | float]]
"""Metrics of consecutive steps."""


class ProgressLog:
    """Averages the steps between two log lines; reads numbers off the device only when it writes one."""

    def __init__(
        self, log: RunLog, start: int, end: int, *, batch_size: int, every: int, show: bool, window: Window = ()
    ):
        self._log, self._every, self._batch_size = log, every, batch_size
        self._bar = tqdm(total=end, initial=start, desc="train", unit="step", disable=not show, smoothing=0.05)
        self._flops, self._peak, self._device = None, None, torch.device("cpu")
        self._begin_window()
        self._window.extend(window)

    def __enter__(self) -> "ProgressLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    @property
    def window(self) -> list[dict[str, float]]:
        """The steps since the last line. A checkpoint keeps them, so that a resumed run's next line is of all of its
        steps."""
        return [{name: float(value) for name, value in metrics.items()} for metrics in self._window]

    def measure(self, state: TrainState, noise_draws: int) -> None:
        """From now on say how much of the device's arithmetic the model uses, where its peak is known."""
        self._device = next(state.model.parameters()).device
        self._flops = ModelFlops(state.model, noise_draws)
        self._peak = peak_flops(self._device, state.model.dtype)
        if self._peak is None and not self._bar.disable:
            name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type
            tqdm.write(f"no MFU in the log: the peak of {name} in {state.model.dtype} is not known")
        self._started = time.perf_counter()

    def record(
        self,
        step: int,
        metrics: Mapping[str, Tensor | float],
        wait: float,
        batch: Batch | None = None,
        spike: Mapping[str, Any] | None = None,
    ) -> None:
        """Count one step.

        Args:
            wait: the time in seconds that it waited for data.
            batch: what it trained on.
            spike: what `Guards.spike` says of it.
        """
        self._window.append(metrics)
        self._waits.append(wait)
        self._spikes += [spike] if spike else []
        self._work += self._flops.of_batch(batch) if self._flops and batch else 0
        self._bar.update()
        if step % self._every == 0 or step == self._bar.total:
            self._write(step)

    def _write(self, step: int) -> None:
        count = len(self._window)
        means = {name: sum(float(m[name]) for m in self._window) / count for name in self._window[0]}
        # Only now has the device done all of it.
        seconds, here = time.perf_counter() - self._started, len(self._waits)
        speed = {"samples_per_s": here * self._batch_size / seconds, "time_per_step": seconds / here}
        use = {"mfu": self._work / seconds / self._peak} if self._peak else {}
        use["peak_memory_gb"] = peak_memory(self._device) / 1e9
        waits = data_wait(self._waits, seconds)
        spikes = {"spikes": self._spikes} if self._spikes else {}
        self._log.log(step, {**means, **speed, **use, **waits, **spikes, "time": time.time()})
        said = f"loss {means['loss']:.4f}, {speed['samples_per_s']:.0f} samples/s"
        said += f", MFU {use['mfu']:.0%}" if "mfu" in use else ""
        wait = f"data wait {waits['data_wait']:.0%}, p95 {1e3 * waits['data_wait_p95']:.0f} ms"
        self._bar.set_postfix_str(f"{said}, {use['peak_memory_gb']:.1f} GB, {wait}")
        self._begin_window()

    def _begin_window(self) -> None:
        self._started, self._waits, self._work = time.perf_counter(), list[float](), 0.0
        self._window, self._spikes = list[Mapping[str, Tensor | float]](), list[Mapping[str, Any]]()


def peak_memory(device: torch.device) -> int:
    """The most bytes that were ever in use: of the GPU by torch, else of this process in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
        metrics = [m for m in metrics if "learning_rate" in m]
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
