"""Signals that end a run early, as Slurm and spot machines send them before they take the machine away."""

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Within it they are only noted, each as often as it comes; in a thread other than the main one they are not.

    with StopSignals() as stop:
        … if stop.received: …
    """

    received: str = ""
    """The name of the last one."""

    def __enter__(self) -> "StopSignals":
        main = threading.current_thread() is threading.main_thread()  # Python lets no other set handlers
        self._before = {number: signal.signal(number, self._note) for number in (SIGNALS if main else ())}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
