"""Checkpoints, written by a process of their own while training goes on.

    trainer   update │save│ forward, backward │join│ update, forward, backward, update …
    copier           └── state into shared memory ─┘
    writer                                         └── self-test, files, hashes, one rename ──┘

The weights change in the optimizer's step alone, so that the copy may go on until the next one. A save waits for the
one before it. The writer outlives a killed trainer for as long as it takes to finish the copy in hand; `.writer.lock`
keeps others out until then.
"""

import errno
import mmap
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manipi.checkpoints.native import Checkpoint, write_checkpoint
from manipi.errors import ManipiError, StorageError, TrainingError
from manipi.model.device import Sharding, local, shard_from, sharding
from manipi.policy import Policy, self_test_for
from manipi.processes import nameless_file, start_helper
from manipi.records import read_json, write_json
from manipi.storage import Lock, require_room, storage_errors
from manipi.train.parallel import Companions, World, peer_errors
from manipi.train.run.folder import Run
from manipi.train.step.state import TrainState, growing, inference_weights, save_tensors
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

    def write_together(
        self,
        world: World,
        weights: Mapping[str, Tensor],
        save_state: Callable[[Path], object],
        step: int,
        window: Window,
    ) -> None:
        """The same in all of many processes, each of which saves its part of the training state."""
        if world.size == 1:
            self.write(weights, save_state, step, window)
            return
        parts = self.run.checkpoints / f".{step}.parts.partial"
        try:
            with storage_errors(self.run.checkpoint(step)):
                save_state(parts)
            world.once(lambda: self.write(weights, parts.rename, step, window))
        except ManipiError:
            if world.leads:
                shutil.rmtree(parts, ignore_errors=True)
            raise

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


class Saver(AbstractContextManager):
    """Writes checkpoints while training waits; `AsyncSaver` while it goes on.

    with make_saver(writer, state, lock) as saver:
        train_step(state, …)
        saver.check()
        saver.save(window)
    """

    def __init__(self, writer: CheckpointWriter, state: TrainState):
        self._writer, self._state = writer, state

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def save(self, window: Window) -> None:
        """The state as it is now. Raises StorageError, and before anything is written where there is no room.

        Of many processes all have to call it.
        """
        self._state.world.once(lambda: self._writer.require_room(self._state))
        self._write(window)

    def _write(self, window: Window) -> None:
        state = self._state
        self._writer.write_together(state.world, state.inference_weights(), state.save, state.step, window)

    def check(self) -> None:
        """Raise what went wrong with a checkpoint meanwhile."""

    def wait(self) -> None:
        """Until every checkpoint stands, or raise why one does not."""


class AsyncSaver(Saver):
    """The one that the drawing above shows; for the thread that trains.

    Of many processes each has a copier and a writer, for its part of the state. The writers are a group of their own,
    and end with the first of them that does.

    Args:
        lock: what the writer process holds until it ends; None but on rank 0.

    Raises:
        StorageError: from `save` or `check`: see `CheckpointWriter.write`, or no memory for the copy.
        TrainingError: likewise: the writer died.
    """

    def __init__(self, writer: CheckpointWriter, state: TrainState, lock: Lock | None):
        super().__init__(writer, state)
        fixed, writers = _fixed(state._tensors()), Companions.of(state.world, writer.run.config)
        self._snapshot = Snapshot({name: local(tensor) for name, tensor in fixed.items()})
        shardings = {name: sharding(tensor) for name, tensor in fixed.items()}
        self._process, self._connection = start_helper(_serve, writer, self._snapshot, shardings, writers, lock)
        with self._alive():
            writers.introduce(state.world, self._connection)
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
        fixed = {name: local(tensor) for name, tensor in _fixed(tensors).items()}
        source = self._snapshot.source(fixed)
        rows = {name: tensor.clone() for name, tensor in growing(tensors).items()}
        self._writing, self._copies_state = True, source.tensors is fixed
        self._copy = self._copier.submit(self._hand_over, source, rows, self._state.step, window)

    def _before_update(self) -> None:
        if self._copies_state:
            self._copy.result()

    def _hand_over(self, source: "StateToCopy", rows: Mapping[str, Tensor], step: int, window: Window) -> None:
        """Of the token embedding's rows there are few, and their number grows: they go with the word.

        As bytes, since NumPy has no bfloat16.
        """
        apart = {name: (tensor.dtype, tensor.cpu().view(torch.uint8).numpy()) for name, tensor in rows.items()}
        self._snapshot.copy(source)
        with suppress(BrokenPipeError, ConnectionResetError):  # its end is seen when its answer is read
            self._connection.send((step, window, apart))

    def check(self) -> None:
        # One of many processes must not stop before the others, which would see its end and not the reason.
        while self._state.world.size == 1 and self._connection.poll():
            self._receive()

    def wait(self) -> None:
        self._copy.result()
        if self._writing:
            self._receive()

    def _receive(self) -> None:
        self._writing = False
        with self._alive():
            answer = self._connection.recv()
        if answer is not None:
            raise answer

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Around words to the writer and from it. Raises TrainingError where it has ended."""
        try:
            yield
        except (EOFError, OSError):
            self._process.join()
            raise TrainingError(
                expected="a checkpoint from the process that writes them",
                found=f"its end, with exit code {self._process.exitcode} (-9: killed, often for want of memory)",
                where=f"checkpoint writer, process {self._process.pid}, of {self._writer.run.folder}",
                next="the checkpoints before it are whole: run the same command again; or --no-async-save",
            ) from None


def make_saver(writer: CheckpointWriter, state: TrainState, lock: Lock | None) -> Saver:
    """Not async: where it is not wanted, and with matrices in 4 bits, which need the model."""
    config = writer.run.config
    if not config.async_save or config.trained == "qlora":
        return Saver(writer, state)
    return AsyncSaver(writer, state, lock)


def _fixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    apart = growing(tensors)
    return {name: tensor for name, tensor in tensors.items() if name not in apart}


def _serve(
    writer: CheckpointWriter,
    snapshot: "Snapshot",
    shardings: Mapping[str, Sharding | None],
    writers: Companions,
    lock: Lock | None,
    trainer: Connection,
) -> None:
    """The life of the writer: a checkpoint for each word that the snapshot is complete, until the trainer is gone.

    Args:
        shardings: of the shards in the snapshot.
        lock: held by having it.
    """
    if writer.run.config.num_threads:
        torch.set_num_threads(writer.run.config.num_threads)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError), writers.meet(trainer) as world:
        state = {name: shard_from(part, shardings[name], world.mesh) for name, part in snapshot.tensors.items()}
        while True:
            step, window, apart = trainer.recv()
            tensors = state | {name: torch.from_numpy(raw).view(dtype) for name, (dtype, raw) in apart.items()}
            save_state, failed = partial(save_tensors, tensors, no_dist=world.size == 1), None
            try:
                with peer_errors():
                    writer.write_together(world, inference_weights(tensors, world), save_state, step, window)
            except ManipiError as error:
                failed = error
            trainer.send(failed)


# The copy ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateToCopy:
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
            with torch.cuda.device(self._device):
                self._stream = torch.cuda.Stream()
                first = next(iter(self.tensors.values()))
                runtime: Any = torch.cuda.cudart()
                torch.cuda.check_error(int(runtime.cudaHostRegister(first.data_ptr(), size, 0)))

    def _map(self, descriptor: int, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...], int]]) -> None:
        self._descriptor, self._layout = descriptor, layout
        weakref.finalize(self, os.close, descriptor)
        # Page faults now, in one go, rather than in the first copy.
        memory = mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        self.tensors = {
            name: torch.frombuffer(memory, dtype=dtype, count=count, offset=place).view(shape)
            if (count := torch.Size(shape).numel())
            else torch.empty(shape, dtype=dtype)  # a shard of a tensor that has fewer rows than there are processes
            for name, (dtype, shape, place) in layout.items()
        }

    def __reduce__(self) -> tuple:
        return _attach, (DupFd(self._descriptor), self._layout)

    def source(self, tensors: Mapping[str, Tensor]) -> StateToCopy:
        if self._device.type != "cuda":
            return StateToCopy(tensors, None)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if torch.cuda.mem_get_info(self._device)[0] > 1.1 * size:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        return StateToCopy(tensors, ready)

    @torch.no_grad()
    def copy(self, source: StateToCopy) -> None:
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
