"""What the server adds to the bare policy call: three 224 px pictures, one client, loopback, two processes.

The policy answers at once with a fixed chunk, so that all of the round trip is the server's, the wire's and the
client's. The server runs in a process of its own, as it does beside a robot.
"""

import multiprocessing
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from harness import Measure, report

from manipi.serve.server import PolicyServer
from manipi_client import WebsocketPolicy

WARM_UP, CALLS = 100, 2_000


class Instant:
    """Answers with the same chunk, at once."""

    def __init__(self) -> None:
        self.metadata: Mapping[str, Any] = {}
        self._chunk = {"actions": np.zeros((50, 32), np.float32)}

    def infer(self, observation: Mapping[str, Any], noise: np.ndarray | None = None) -> Mapping[str, Any]:
        return self._chunk


def serve(sender: Connection) -> None:
    PolicyServer(Instant(), port=0).serve_forever(lambda host, port: sender.send(port))


def main() -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(sender,))
    process.start()
    rng = np.random.default_rng(0)
    pictures = {f"image_{i}": rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for i in range(3)}
    observation = {**pictures, "state": np.zeros(14, np.float32), "prompt": "reach the red block"}
    policy, times = Instant(), []
    with WebsocketPolicy(port=receiver.recv()) as client:
        for call in range(WARM_UP + CALLS):
            began = time.perf_counter()
            client.infer(observation)
            served = time.perf_counter()
            policy.infer(observation)
            bare = time.perf_counter() - served
            if call >= WARM_UP:
                times.append((served - began - bare) * 1e3)
    process.terminate()
    process.join()
    p50, p99 = np.percentile(times, (50, 99)).tolist()
    report(
        [
            Measure(name="server overhead p50", value=p50, unit="ms", goal=3.0),
            Measure(name="server overhead p99", value=p99, unit="ms", goal=3.0),
        ]
    )


if __name__ == "__main__":
    main()
