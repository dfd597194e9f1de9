"""Every error that manipi raises on purpose.

ManipiError                     what was expected, what was found, where, what to run next
├─ ConfigError                  a setting that cannot be (also a ValueError)
│   └─ UnknownNameError         an unknown name; carries the closest ones
├─ DataError                    a dataset that cannot be read or trusted
│   ├─ DatasetNotFoundError     nothing there, or nothing in it
│   ├─ DatasetFormatError       an unknown version, a missing file, a broken video
│   ├─ MissingFeatureError      the robot names a camera, state or action that the data lacks
│   ├─ BadValueError            NaN or infinity; names episode and frame
│   └─ NormStatsError           missing, of another robot or pipeline, or of another size
├─ ObservationError             a client's observation that does not match the robot
├─ ActionError                  an action chunk that must not reach the robot
├─ CheckpointError              a checkpoint that cannot be trusted
│   ├─ IntegrityError           a file is missing, or its hash differs
│   ├─ WeightsMismatchError     missing, unexpected and mis-shaped tensors, in full
│   └─ SelfTestError            the loaded policy does not repeat the trainer's actions
├─ FetchError                   a source that is absent, unreachable, offline, or not what was promised
├─ TokenizerError               text or codes that do not decode
├─ TrainingError                a run directory of another run, a data worker that died
│   └─ NonFiniteError           the loss or the gradient of a step is NaN or infinite
├─ SimulatorError               a simulator that is not installed, died, hung, or is another robot's
├─ StorageError                 a full disk, a folder that cannot be written
├─ ServeError                   a port in use, an address that cannot be bound, a token or certificate that is none
└─ RequestError                 an observation that the server does not answer now; its `code` is told to the client
    ├─ BusyError                "busy": too many observations wait
    └─ DeadlineError            "deadline": the answer would come too late
"""

import difflib
import shlex
from collections.abc import Iterable, Sequence
from typing import Self

# One form and one bounded `repr` for the errors of the server and the client, which cannot import this package.
from manipi_client.errors import FourPartError
from manipi_client.errors import one_line as one_line
from manipi_client.errors import shown as shown


def quoted(name: object) -> str:
    """A path or name as one word of a command that is advised, with quotes where a shell would read more in it."""
    return shlex.quote(str(name))


class ManipiError(FourPartError):
    """Base of the tree. Its text always has the same four parts, in this order.

    Args:
        expected: what should have been there.
        found: what was there instead.
        where: the file, key, episode, frame or flag concerned.
        next: what the user can run or change now.
    """

    def moved(self, where: str) -> Self:
        """The same error with another `where`, for what knows more of the place."""
        return type(self)(expected=self.expected, found=self.found, where=where, next=self.next)


class ConfigError(ManipiError, ValueError):
    """A setting that cannot be."""


class UnknownNameError(ConfigError):
    """An unknown name. Build it with `unknown_name`, which adds the closest ones."""


class DataError(ManipiError):
    """A dataset that cannot be read or trusted."""


class DatasetNotFoundError(DataError):
    """Nothing there, or nothing in it."""


class DatasetFormatError(DataError):
    """An unknown version, a missing file, a broken table or video."""


class MissingFeatureError(DataError):
    """The robot names a camera, state or action that the data lacks."""


class BadValueError(DataError):
    """NaN or infinity where a number was expected."""


class NormStatsError(DataError):
    """Norm stats that are missing, of another robot or pipeline, or of another size."""


class ObservationError(ManipiError):
    """An observation that does not match the robot."""


class ActionError(ManipiError):
    """An action chunk that must not reach the robot: NaN, or beyond the robot's limits."""


class CheckpointError(ManipiError):
    """A checkpoint that cannot be trusted."""


class IntegrityError(CheckpointError):
    """A checkpoint file is missing, or its hash differs from the manifest's."""


class WeightsMismatchError(CheckpointError):
    """Tensors that are missing, unexpected or mis-shaped."""


class SelfTestError(CheckpointError):
    """The loaded policy does not repeat the actions that the trainer recorded."""


class FetchError(ManipiError):
    """A source that is not there, cannot be reached, may not be (offline), or whose hash differs."""


class TokenizerError(ManipiError):
    """Text or action codes that do not encode or decode."""


class TrainingError(ManipiError):
    """A run that cannot start or must not go on."""


class NonFiniteError(TrainingError):
    """The loss or the gradient of a step is NaN or infinite."""

    sample_loss: Sequence[float] = ()
    """Of each sample of the batch, where it is known."""


class SimulatorError(ManipiError):
    """A simulator that is not installed, died, hung or cannot do what is asked; or that is another robot's."""


class StorageError(ManipiError):
    """A full disk, or a folder that cannot be written."""


class ServeError(ManipiError):
    """A server that cannot start, or ended while it was needed."""


class RequestError(ManipiError):
    """An observation that the server does not answer now. It may be sent again."""

    code: str


class BusyError(RequestError):
    """Too many observations wait already."""

    code = "busy"


class DeadlineError(RequestError):
    """The answer would come too late to be of use."""

    code = "deadline"


def unknown_name(kind: str, name: str, known: Iterable[str], *, next: str) -> UnknownNameError:
    """The error for an unknown name, with the closest known names first."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else next
    choice = f"one of: {', '.join(names)}" if names else "of which there is none"
    return UnknownNameError(expected=f"a {kind}, {choice}", found=shown(name), where=kind, next=hint)
