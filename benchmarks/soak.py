"""Many clients for a long time: no error, no growth of memory.

    python benchmarks/soak.py --minutes 10 --clients 32 [--hz 4]

Server and clients are two processes on loopback. Each client sends three 224 px pictures at its own rate, as a robot
does that asks for a new chunk every so often, and checks that the actions are the answer to its own observation. Now
and then one resets, leaves in the middle of a request, or sends what is refused. Memory is the server's, from the end
of the first fifth on.
"""

import argparse
import logging
import multiprocessing
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from harness import Measure, memory_mb, report
from websockets.sync.client import connect

from manipi.errors import ObservationError
from manipi.serve import Limits, PolicyServer
from manipi_client import RemoteInferenceError, WebsocketPolicy, wire

COMPUTE_S = 0.005


class Echo:
    """Answers a batch with its states, after the time that a small model takes."""

    metadata: Mapping[str, Any] = {}

    def infer(self, observation: Mapping[str, Any], noise: np.ndarray | None = None) -> Mapping[str, Any]:
        return self.infer_batch([observation], [noise])[0]

    def infer_batch(self, observations: Sequence[Mapping[str, Any]], noises: Sequence[Any]) -> list[Mapping[str, Any]]:
        time.sleep(COMPUTE_S)
        return [{"actions": np.repeat(self._state(observation), 50, axis=0)} for observation in observations]

    def _state(self, observation: Mapping[str, Any]) -> np.ndarray:
        if "state" not in observation:
            raise ObservationError(expected="a state", found="none", where="the observation", next="send one")
        return observation["state"][None]


def serve(sender: Connection) -> None:
    logging.getLogger("manipi").setLevel(logging.ERROR)
    server = PolicyServer(Echo(), port=0, limits=Limits(max_waiting=64))
    server.serve_forever(lambda host, port: sender.send(port))


class Robot(threading.Thread):
    """A client that asks at its rate until `stop`."""

    def __init__(self, number: int, port: int, hz: float, stop: threading.Event):
        super().__init__(name=f"robot-{number}")
        self._number, self._port, self._period_s, self._ending = number, port, 1 / hz, stop
        self.latencies_s: list[float] = []
        self.errors: list[str] = []

    def run(self) -> None:
        try:
            self._drive()
        except Exception as error:  # noqa: BLE001 - it is what is counted.
            self.errors.append(f"{self.name}: {error!r}")

    def _drive(self) -> None:
        rng = np.random.default_rng(self._number)
        pictures = {f"image_{i}": rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for i in range(3)}
        step = 0
        with WebsocketPolicy(port=self._port) as client:
            while not self._ending.wait(self._period_s * rng.uniform(0.5, 1.5)):
                step += 1
                state = np.array([self._number, step], np.float32)
                observation = {**pictures, "state": state, "prompt": "go", "manipi/reset": step % 50 == 0}
                began = time.perf_counter()
                actions = client.infer(observation)["actions"]
                self.latencies_s.append(time.perf_counter() - began)
                if not np.array_equal(actions[-1], state):
                    self.errors.append(f"{self.name}: another one's actions at step {step}")
                if step % 40 == 0:
                    self._misbehave(client, observation)

    def _misbehave(self, client: WebsocketPolicy, observation: Mapping[str, Any]) -> None:
        if self._number % 2:
            try:
                client.infer({"prompt": "no state"})
                self.errors.append(f"{self.name}: an answer without a state")
            except RemoteInferenceError as refused:
                if refused.code != "ObservationError":
                    self.errors.append(f"{self.name}: {refused.code}")
        else:  # leaves in the middle of a request
            with connect(f"ws://127.0.0.1:{self._port}", compression=None, proxy=None) as leaving:
                leaving.recv()
                leaving.send(wire.pack(dict(observation)))
                leaving.socket.shutdown(socket.SHUT_RDWR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--hz", type=float, default=4.0)
    args = parser.parse_args()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(sender,), daemon=True)
    server.start()
    port, stop = receiver.recv(), threading.Event()
    robots = [Robot(number, port, args.hz, stop) for number in range(args.clients)]
    for robot in robots:
        robot.start()
    memory = watch(server.pid, args.minutes * 60)
    stop.set()
    for robot in robots:
        robot.join()
    server.terminate()
    server.join(30)
    latencies, errors = (
        [s for robot in robots for s in robot.latencies_s],
        [e for robot in robots for e in robot.errors],
    )
    for error in errors[:5]:
        print(error)
    p50, p99 = (1e3 * np.quantile(latencies, (0.5, 0.99))).tolist()
    rate = len(latencies) / args.minutes / 60
    print(f"{len(latencies):,} answers, {rate:.0f} per second; p50 {p50:.1f} ms, p99 {p99:.1f} ms in all")
    print("memory in MiB:", " ".join(f"{m:.0f}" for m in memory))
    report(
        [
            Measure(name="errors", value=len(errors), unit="", goal=0),
            Measure(name="memory growth", value=memory[-1] - memory[len(memory) // 5], unit="MiB", goal=16),
            Measure(name="server's exit code", value=abs(server.exitcode or 0), unit="", goal=0),
        ]
    )


def watch(pid: int | None, seconds: float, samples: int = 20) -> list[float]:
    """Memory, in MiB, at even times."""
    memory = []
    for _ in range(samples):
        time.sleep(seconds / samples)
        memory.append(memory_mb(pid))
    return memory


if __name__ == "__main__":
    main()
