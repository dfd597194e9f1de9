"""A policy server for the tests of a robot's code: a real websocket, actions from a function."""

from __future__ import annotations

import threading
import time
import traceback
from typing import Any, Callable, Mapping

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from manipi_client import wire


class FakePolicyServer:
    """Serves `infer` on a free port of this computer, in threads, from `with` to its end.

        with FakePolicyServer(lambda observation: {"actions": np.zeros((10, 7), np.float32)}) as server:
            policy = WebsocketPolicy(port=server.port)

    It does what openpi's server does: when `infer` raises, the client receives the traceback and is disconnected.

    Args:
        infer: the action chunk for an observation; must be safe to call from several threads if several clients come.
        metadata: sent to every client first.
        port: where to listen; 0: a free port.
        delay_s: seconds until an answer leaves, or a function of the number of observations so far.

    Attributes:
        port: where it listens.
        observations: what the clients sent, in order.
    """

    def __init__(
        self,
        infer: Callable[[dict[str, Any]], Mapping[str, Any]],
        metadata: Mapping[str, Any] | None = None,
        *,
        port: int = 0,
        delay_s: float | Callable[[int], float] = 0.0,
    ) -> None:
        self._infer, self._metadata, self._delay_s = infer, dict(metadata or {}), delay_s
        self._connections: set[ServerConnection] = set()
        self.observations: list[dict[str, Any]] = []
        self._server = serve(self._handle, "127.0.0.1", port, compression=None, max_size=None)
        self.port: int = self._server.socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="fake-policy-server", daemon=True)

    def __enter__(self) -> FakePolicyServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self.disconnect_all()
        self._thread.join()

    def disconnect_all(self) -> None:
        """Close every connection, as when the network fails; clients may connect again."""
        for connection in list(self._connections):
            connection.close()

    def _handle(self, connection: ServerConnection) -> None:
        self._connections.add(connection)
        try:
            connection.send(wire.pack(self._metadata))
            while True:
                frame = connection.recv()
                try:
                    observation = wire.unpack(frame)  # type: ignore[arg-type]
                    self.observations.append(observation)
                    seconds = self._delay_s(len(self.observations)) if callable(self._delay_s) else self._delay_s
                    time.sleep(seconds)
                    timing = {"infer_ms": seconds * 1000}
                    answer: str | bytes = wire.pack({**self._infer(observation), "server_timing": timing})
                except Exception:  # noqa: BLE001 - whatever a test's function raises is the answer.
                    answer = traceback.format_exc()
                connection.send(answer)
                if isinstance(answer, str):
                    connection.close(1011, "Internal server error. Traceback included in previous frame.")
        except ConnectionClosed:
            pass
        finally:
            self._connections.discard(connection)
