"""What a run watches itself for: numbers that are not finite, losses that leap, and steps that do not end."""

from __future__ import annotations

import faulthandler
import io
import os
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from torch import Tensor
from tqdm import tqdm

from manipi.data.feed.loader import ASK_FOR_STACKS, Batch, Loader
from manipi.errors import NonFiniteError, StorageError
from manipi.storage import atomic_write
from manipi.train.config import GuardConfig

if TYPE_CHECKING:
    from manipi.data.feed.mixture import Mixture, Place

FIRST_TIME, USUAL_TIMES = 6, 5
"""A stall is `stall_seconds` times the former for the first two of a kind, and never below the latter times the median
of its kind."""
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again."""
STDERR = 2
"""faulthandler writes to a file descriptor, whatever has become of `sys.stderr`."""
NAMED = 8
"""Samples that a message or a log line names at most."""


# Numbers -------------------------------------------------------------------------------------------------------------


class SpikeDetector:
    """Tells a loss far above the ones before it, in robust standard deviations: 1.4826 times the median deviation.

    That scale is taken to be at least a twentieth of the median, or a loss that hardly varies would spike by nothing.
    """

    def __init__(self, config: GuardConfig):
        self._factor, self._losses = config.spike, deque[float](maxlen=config.spike_window)
        self._least = config.spike_window // 4

    def median_before(self, loss: float) -> float | None:
        """Where this loss is a spike, the median that it is one above; then counts the loss."""
        losses = np.array(self._losses)
        self._losses.append(loss)
        if not self._factor or len(losses) < self._least:
            return None
        median = float(np.median(losses))
        scale = max(1.4826 * float(np.median(np.abs(losses - median))), median / 20)
        return median if loss > median + self._factor * scale else None


# Time ----------------------------------------------------------------------------------------------------------------


class _Phase(NamedTuple):
    name: str
    waits_for: str
    began: float
    limit: float
    workers: Callable[[], list[int]]


class Watchdog(AbstractContextManager):
    """A thread that prints all stacks, once, when a phase takes too long. It needs a process that can print.

    Should something hold the interpreter for good, not even this thread runs; faulthandler's own timer then speaks.
    """

    def __init__(self, config: GuardConfig):
        self._config = config
        self._phase: _Phase | None = None
        self._durations: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=51))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._config.stall_seconds:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.ident:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def phase(self, name: str, waits_for: str, workers: Callable[[], list[int]] = list) -> Iterator[None]:
        """Watch the block. Phases of one name are expected to take about as long."""
        before, began = self._phase, time.monotonic()
        seconds, usual = (
            self._config.stall_seconds,
            list(self._durations[name])[1:],
        )  # the first starts workers, or compiles
        limit = max(seconds, USUAL_TIMES * float(np.median(usual))) if usual else FIRST_TIME * seconds
        self._phase = _Phase(name, waits_for, began, limit, workers)
        try:
            yield
            self._durations[name].append(time.monotonic() - began)
        finally:
            self._phase = before

    def _watch(self) -> None:
        seconds, told = self._config.stall_seconds, None
        while not self._ended.wait(min(1.0, seconds / 4)):
            faulthandler.dump_traceback_later(FIRST_TIME * seconds, file=STDERR)
            phase = self._phase
            if phase and phase is not told and time.monotonic() - phase.began > phase.limit:
                told = phase
                self._report(phase)

    def _report(self, phase: _Phase) -> None:
        workers = phase.workers()
        taken = time.monotonic() - phase.began
        lines = [f"stalled: {phase.name} has been waiting for {phase.waits_for} for {taken:.1f} s"]
        lines += [
            f"  data worker, process {pid}: {_process_status(pid).get('State', 'state unknown')}"
            f"{', whose turn it is' if pid == workers[0] else ''}"
            for pid in workers
        ]
        tqdm.write("\n".join([*lines, "all stacks:"]), file=sys.stderr)
        faulthandler.dump_traceback(file=STDERR)
        for pid in workers:
            # The signal would end a process that is not ready for it yet.
            caught = int(_process_status(pid).get("SigCgt", "0"), 16)
            if ASK_FOR_STACKS and caught >> (ASK_FOR_STACKS - 1) & 1:
                os.kill(pid, ASK_FOR_STACKS)
        if self._config.on_stall == "exit":
            time.sleep(1.0)  # for the workers' stacks
            os._exit(EXIT_CODE)


def _process_status(pid: int) -> dict[str, str]:
    """Linux' account of a process; empty elsewhere, or where it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        lines = []
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


# Both, around a run --------------------------------------------------------------------------------------------------


class Guards(Watchdog):
    """Around the loop of one run.

    with Guards(config.guards, folder, loader, data.mixture) as guards:
        for step, batch, wait in guards.batches(start, end):
            with guards.step(step, batch): ...
            with guards.phase("the run", "the checkpoint"): ...

    Args:
        folder: the run's, for the batch of a step that fails.
    """

    def __init__(self, config: GuardConfig, folder: Path, loader: Loader, mixture: Mixture):
        super().__init__(config)
        self._folder, self._loader, self._mixture = folder, loader, mixture
        self._spikes = SpikeDetector(config)

    def batches(self, start: int, end: int) -> Iterator[tuple[int, Batch, float]]:
        """What the loader gives, from step `start` on and before `end`."""
        batches, step = iter(self._loader), start
        while step < end:
            with self.phase("the data loader", f"the batch of step {step}", partial(self._loader.workers, step)):
                step, batch, wait = next(batches)
            yield step, batch, wait
            step += 1

    @contextmanager
    def step(self, step: int, batch: Batch) -> Iterator[None]:
        """Watch one update. Raises NonFiniteError with the samples to blame, once their batch is kept."""
        with self.phase("the training step", f"forward, backward and update of step {step}"):
            try:
                yield
            except NonFiniteError as error:
                raise self._blame(error, step, batch) from None

    def spike(self, step: int, loss: float, sample_loss: Tensor) -> dict[str, Any] | None:
        """What to log of a loss that leaps, which this also warns of; None for any other. Steps count from 0."""
        median = self._spikes.median_before(loss)
        if median is None:
            return None
        pairs = zip(self.places(step), sample_loss.tolist(), strict=True)
        worst = sorted(pairs, key=lambda pair: -pair[1])[:NAMED]
        tqdm.write(f"loss spike at step {step}: {loss:.4g}, running median {median:.4g}; most of it by {worst[0][0]}")
        samples = [{"dataset": p.dataset, "episode": p.episode, "frame": p.frame, "loss": one} for p, one in worst]
        return {"step": step, "loss": loss, "median": median, "samples": samples}

    def places(self, step: int) -> list[Place]:
        """Where the samples of a step came from."""
        return self._mixture.places(self._loader.rows(step))

    def _blame(self, error: NonFiniteError, step: int, batch: Batch) -> NonFiniteError:
        """The same error with the samples' names, once their batch is on disk."""
        places = self.places(step)
        bad = [place for place, loss in zip(places, error.sample_loss) if not np.isfinite(loss)]
        named = "; ".join(map(str, bad[:NAMED])) + (f"; {len(bad) - NAMED} more" if len(bad) > NAMED else "")
        blame = f"of {len(bad)} of {len(places)} samples the loss is" if bad else "the gradient alone is"
        kept = self._keep({**batch, "sample_loss": np.array(error.sample_loss)}, places, step)
        return NonFiniteError(
            expected=error.expected,
            found=f"{error.found}; {blame} not finite",
            where=f"step {step}" + (f": {named}" if bad else ""),
            next=f"{_advice(bad, places)}; {kept}; the last checkpoint is intact, and the same command goes on there "
            "and repeats this step",
        )

    def _keep(self, batch: Batch, places: Sequence[Place], step: int) -> str:
        """Where the batch is now. On a full disk nowhere, which shall not hide why the run ends."""
        rank = f"_rank{self._loader.rank}" if self._loader.world_size > 1 else ""
        path, buffer = self._folder / f"bad_batch_{step}{rank}.npz", io.BytesIO()
        names = {key: np.array([getattr(place, key) for place in places]) for key in ("dataset", "episode", "frame")}
        np.savez_compressed(buffer, **names, **batch)  # type: ignore[arg-type]
        try:
            atomic_write(path, buffer.getvalue())
        except StorageError as error:
            return f"the batch could not be kept: expected {error.expected}, found {error.found}"
        return f"the batch is in {path}"


def _advice(bad: Sequence[Place], places: Sequence[Place]) -> str:
    if 0 < len(bad) < len(places):
        return "; ".join(f"manipi check {root}" for root in dict.fromkeys(place.root for place in bad))
    return "lower --optimizer.lr: it is the weights, not a sample" if bad else "lower --optimizer.lr"
