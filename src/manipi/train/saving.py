"""Checkpoints, written by a process of their own while training goes on.

    trainer   update │save│ forward, backward │join│ update, forward, backward, update …
    copier           └── state into shared memory ─┘
    writer                                         └── self-test, files, hashes, one rename ──┘

The weights change in the optimizer's step alone, so that the copy may go on until the next one. A save waits for the
one before it. The writer outlives a killed trainer for as long as it takes to finish the copy in hand; `train.lock`
keeps others out until then.
"""

import errno
import mmap
import os
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manipi.checkpoints.native import Checkpoint, write_checkpoint
from manipi.data.helper import start_helper
from manipi.data.shared import nameless_file
from manipi.errors import ManipiError, StorageError, TrainingError
from manipi.policy import Policy, self_test_for
from manipi.records import read_json, write_json
from manipi.storage import require_room, storage_errors
from manipi.train.lock import Lock
from manipi.train.run import Run
from manipi.train.state import TrainState, growing, inference_weights, save_tensors
from manipi.types import Sample

Window: TypeAlias = Sequence[Mapping[str, float]]
"""Metrics of the steps since the last log line."""

_ALIGNMENT = 64
_NEXT = "free some space, keep fewer (--keep-checkpoints), or move the run to another disk; what is there is untouched"


@dataclass(frozen=True)
class CheckpointWriter:
    """What is the same in every checkpoint of a run, and how one is written."""

    run: Run
    bare: Checkpoint
    """Without weights, step and self-test."""
    example: Sample
    """The observation of the self-test."""

    def policy(self, weights: Mapping[str, Tensor], step: int, device: str = "cpu") -> Policy:
        """The policy with these weights, in whose memory it may stay."""
        config = replace(self.bare.config, step=step)
        return Policy.from_checkpoint(replace(self.bare, weights=weights, config=config), device=device)

    def write(
        self, weights: Mapping[str, Tensor], save_state: Callable[[Path], object], step: int, window: Window
    ) -> None:
        """One checkpoint; then those that are too old go. Raises StorageError, BadValueError.

        Args:
            weights: that are served.
            save_state: makes a folder of the training state.
        """
        policy = self.policy(weights, step)
        bare = replace(self.bare, weights=weights, config=policy.config)
        test = self_test_for(policy, self.example)

        def write_train_state(folder: Path) -> None:
            save_state(folder)
            write_json(folder / "log_window.json", list(window))

        write_checkpoint(self.run.checkpoint(step), replace(bare, self_test=test), write_train_state)
        with storage_errors(self.run.checkpoints):
            self.run.prune()

    def size(self, state: TrainState) -> int:
        """Bytes of one of this state, a little overestimated."""
        served = state.model.parameters()
        described = sum(p.stat().st_size for p in self.run.tokenizer.rglob("*"))
        described += sum(np.asarray(value).nbytes for value in self.example.values())
        numbers = sum(t.numel() * t.element_size() + 2048 for t in (*state._tensors().values(), *served))
        return numbers + described + 100_000

    def require_room(self, state: TrainState) -> None:
        """Raises StorageError where one of this state does not fit on the disk."""
        with storage_errors(self.run.checkpoint(state.step)):
            require_room(self.run.checkpoint(state.step), self.size(state), _NEXT)


def read_window(checkpoint: Path) -> list[dict[str, float]]:
    path = checkpoint / "train_state/log_window.json"
    return read_json(path) if path.exists() else []  # older runs have none


class Saver:
    """Writes checkpoints while training waits; `AsyncSaver` while it goes on.

    with make_saver(writer, state, lock) as saver:
        train_step(state, …)
        saver.check()
        saver.save(window)
    """

    def __init__(self, writer: CheckpointWriter, state: TrainState):
        self._writer, self._state = writer, state

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def save(self, window: Window) -> None:
        """The state as it is now. Raises StorageError, and before anything is written where there is no room.

        Of many processes all have to call it.
        """
        self._state.world.once(lambda: self._writer.require_room(self._state))
        self._write(window)

    def _write(self, window: Window) -> None:
        state, step, weights = self._state, self._state.step, self._state.inference_weights()
        if state.world.size == 1:
            self._writer.write(weights, state.save, step, window)
            return
        # Of many processes each writes its part of the training state before rank 0 puts the checkpoint together.
        parts = self._writer.run.checkpoints / f".{step}.parts.partial"
        try:
            with storage_errors(self._writer.run.checkpoint(step)):
                state.save(parts)
            state.world.once(lambda: self._writer.write(weights, parts.rename, step, window))
        except ManipiError:
            if state.world.leads:
                shutil.rmtree(parts, ignore_errors=True)
            raise

    def check(self) -> None:
        """Raise what went wrong with a checkpoint meanwhile."""

    def wait(self) -> None:
        """Until every checkpoint stands, or raise why one does not."""


class AsyncSaver(Saver):
    """The one that the drawing above shows; for the thread that trains.

    Args:
        lock: what the writer holds for as long as it lives.

    Raises:
        StorageError: from `save` or `check`: see `CheckpointWriter.write`, or no memory for the copy.
        TrainingError: likewise: the writer died.
    """

    def __init__(self, writer: CheckpointWriter, state: TrainState, lock: Lock):
        super().__init__(writer, state)
        self._snapshot = Snapshot(_fixed(state._tensors()))
        self._process, self._connection = start_helper(_serve, writer, self._snapshot, lock)
        self._copier, self._copy = ThreadPoolExecutor(1, "copier"), Future[None]()
        self._copy.set_result(None)
        self._writing = self._copies_state = False
        self._hook = state.optimizer.register_step_pre_hook(lambda *_: self._before_update())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.wait()
        except ManipiError as late:
            if error is None:
                raise
            error.add_note(f"besides, the last checkpoint was not written:\n{late}")
        finally:
            self._hook.remove()
            self._copier.shutdown()
            self._process.kill()  # it is idle, or Ctrl-C ended the wait
            self._process.join()
            self._connection.close()

    def save(self, window: Window) -> None:
        self.wait()
        super().save(window)

    def _write(self, window: Window) -> None:
        tensors = self._state._tensors()
        fixed = _fixed(tensors)
        source = self._snapshot.source(fixed)
        rows = {name: tensor.clone() for name, tensor in growing(tensors).items()}
        self._writing, self._copies_state = True, source.tensors is fixed
        self._copy = self._copier.submit(self._hand_over, source, rows, self._state.step, window)

    def _before_update(self) -> None:
        if self._copies_state:
            self._copy.result()

    def _hand_over(self, source: "Source", rows: Mapping[str, Tensor], step: int, window: Window) -> None:
        """Of the token embedding's rows there are few, and their number grows: they go with the word."""
        apart = {name: tensor.cpu().numpy() for name, tensor in rows.items()}
        self._snapshot.copy(source)
        with suppress(BrokenPipeError, ConnectionResetError):  # its end is seen when its answer is read
            self._connection.send((step, window, apart))

    def check(self) -> None:
        while self._connection.poll():
            self._receive()

    def wait(self) -> None:
        self._copy.result()
        if self._writing:
            self._receive()

    def _receive(self) -> None:
        self._writing = False
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise TrainingError(
                expected="a checkpoint from the process that writes them",
                found=f"its end, with exit code {self._process.exitcode} (-9: killed, often for want of memory)",
                where=f"checkpoint writer, process {self._process.pid}, of {self._writer.run.folder}",
                next="the checkpoints before it are whole: run the same command again; or --no-async-save",
            ) from None
        if answer is not None:
            raise answer


def make_saver(writer: CheckpointWriter, state: TrainState, lock: Lock | None) -> Saver:
    """Not async: where it is not wanted, of many processes, and with matrices in 4 bits, which need the model."""
    config = writer.run.config
    if not config.async_save or state.world.size > 1 or config.trained == "qlora":
        return Saver(writer, state)
    assert lock is not None
    return AsyncSaver(writer, state, lock)


def _fixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    apart = growing(tensors)
    return {name: tensor for name, tensor in tensors.items() if name not in apart}


def _serve(writer: CheckpointWriter, snapshot: "Snapshot", lock: Lock, trainer: Connection) -> None:
    """The life of the writer: a checkpoint for each word that the snapshot is complete, until the trainer is gone.

    Args:
        lock: held by having it.
    """
    if writer.run.config.num_threads:
        torch.set_num_threads(writer.run.config.num_threads)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            step, window, apart = trainer.recv()
            tensors = {**snapshot.tensors, **{name: torch.from_numpy(values) for name, values in apart.items()}}
            trainer.send(_error_of(writer, tensors, step, window))


def _error_of(writer: CheckpointWriter, tensors: Mapping[str, Tensor], step: int, window: Window) -> ManipiError | None:
    try:
        writer.write(inference_weights(tensors), partial(save_tensors, tensors), step, window)
    except ManipiError as error:
        return error
    return None


# The copy ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """What is copied: the state itself or, on an accelerator with room, a first copy that is ordered with its steps."""

    tensors: Mapping[str, Tensor]
    ready: torch.cuda.Event | None


class Snapshot:
    """One copy of a training state in memory that processes share, allocated once; pinned where the state is on CUDA.

    Raises:
        StorageError: there is no memory for it.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        layout, size = {}, 0
        for name, tensor in tensors.items():
            assert type(tensor) in (Tensor, torch.nn.Parameter), f"{name}: a {type(tensor)} is no plain memory"
            layout[name] = (tensor.dtype, tuple(tensor.shape), size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        try:
            self._map(nameless_file(size), layout)
        except OSError as error:
            raise StorageError(
                expected=f"{size / 1e6:,.0f} MB of memory for a copy of the training state",
                found=os.strerror(error.errno or errno.ENOMEM),
                where="TrainConfig.async_save",
                next="--no-async-save writes checkpoints without a copy, and training waits for them",
            ) from error
        self._device = max((t.device for t in tensors.values()), key=lambda device: device.type == "cuda")
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)
            first = next(iter(self.tensors.values()))
            runtime: Any = torch.cuda.cudart()
            torch.cuda.check_error(int(runtime.cudaHostRegister(first.data_ptr(), size, 0)))

    def _map(self, descriptor: int, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...], int]]) -> None:
        self._descriptor, self._layout = descriptor, layout
        weakref.finalize(self, os.close, descriptor)
        # Page faults now, in one go, rather than in the first copy.
        memory = mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        self.tensors = {
            name: torch.frombuffer(memory, dtype=dtype, count=torch.Size(shape).numel(), offset=place).view(shape)
            for name, (dtype, shape, place) in layout.items()
        }

    def __reduce__(self) -> tuple:
        return _attach, (DupFd(self._descriptor), self._layout)

    def source(self, tensors: Mapping[str, Tensor]) -> Source:
        if self._device.type != "cuda":
            return Source(tensors, None)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if torch.cuda.mem_get_info(self._device)[0] > 1.1 * size:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        return Source(tensors, ready)

    @torch.no_grad()
    def copy(self, source: Source) -> None:
        """Fill it. The source must not change until this returns."""
        if source.ready is None:
            for name, tensor in source.tensors.items():
                self.tensors[name].copy_(tensor)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(source.ready)
            for name, tensor in source.tensors.items():
                self.tensors[name].copy_(tensor, non_blocking=True)
        self._stream.synchronize()


def _attach(descriptor: Any, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...], int]]) -> Snapshot:
    snapshot = Snapshot.__new__(Snapshot)
    snapshot._map(descriptor.detach(), layout)
    return snapshot
