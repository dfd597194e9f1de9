"""Bad input for a policy server: frames that are cut, swollen, deep, mistyped, misshapen, or not frames at all.

    python benchmarks/fuzz_serve.py --frames 100000

The server runs in a process of its own, with the real check of observations and the action guard. Beside the bad
clients a good one goes on asking, from a process of its own, and some senders never finish their frame. A bad frame may
be answered, be told its error, or lose its connection; what must not happen is an unforeseen error
(PolicyFailure), an error's text beyond 4,000 bytes, ten seconds without any of these, growing memory, or a good client
that is not served. Then come the frames of `hostile.py`, nearly as large as the limit of 64 MB, beside a good client
that must never wait for a second.
"""

import argparse
import contextlib
import logging
import multiprocessing
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import msgpack
import numpy as np
from harness import Measure, memory_mb, report
from hostile import frames, plain
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from manipi.robots.robot import Gripper, Joints, Robot, State
from manipi.serve import Limits, PolicyServer
from manipi.transforms.observation import ReadRobot
from manipi_client import WebsocketPolicy, wire

ROBOT = Robot(
    name="arm",
    cameras={"base": "images/base", "left_wrist": "images/wrist"},
    optional=("left_wrist",),
    state=(State("state", 7),),
    actions=(Joints(6, relative=True, low=(-3.0,) * 6, high=(3.0,) * 6), Gripper(low=(0.0,), high=(1.0,))),
    max_rates=(3.0,) * 7,
)
SLOW_SENDERS, HANG_S, MAX_MESSAGE_MB = 4, 10.0, 64.0
MAX_TEXT_BYTES = 4_000


class Checked:
    """Checks an observation as every policy does, and moves a little from its state."""

    metadata: Mapping[str, Any] = {"robot": "arm"}

    def infer(self, observation: Mapping[str, Any], noise: np.ndarray | None = None) -> Mapping[str, Any]:
        state = ReadRobot(ROBOT).encode(observation)["state"]
        return {"actions": state + np.linspace(0, 0.2, 10, dtype=np.float32)[:, None]}

    def infer_batch(self, observations: Sequence[Mapping[str, Any]], noises: Sequence[None]) -> list[Mapping[str, Any]]:
        return [self.infer(observation) for observation in observations]


def serve(sender: Connection) -> None:
    logging.getLogger("manipi").setLevel(logging.ERROR)  # which leaves unforeseen errors
    server = PolicyServer(Checked(), port=0, robot=ROBOT, limits=Limits(max_message_mb=MAX_MESSAGE_MB))
    server.serve_forever(lambda host, port: sender.send(port))


def good_observation(rng: np.random.Generator, size: int = 32) -> dict[str, Any]:
    images = {name: rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for name in ("base", "wrist")}
    return {"images": images, "state": rng.uniform(0, 1, 7).astype(np.float32), "prompt": "pick up the block"}


def good_client(port: int, stop: Connection, results: Connection) -> None:
    """Asks twenty times a second until it is told to stop. Sends a sign after its first answer, and at the end its
    latencies, or the error that ended it."""
    observation, times = good_observation(np.random.default_rng(0), size=224), []
    try:
        with WebsocketPolicy(port=port, request_timeout=HANG_S) as client:
            client.infer(observation)
            results.send("ready")
            while not stop.poll(0.05):
                began = time.perf_counter()
                client.infer(observation)
                times.append(time.perf_counter() - began)
        results.send(times)
    except Exception as error:  # noqa: BLE001 - it is the result.
        results.send(repr(error))


# ---- frames that a client sends over a proper websocket


def _array(dtype: str, shape: list[Any], data: Any) -> dict[bytes, Any]:
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}


def _replaced(rng: np.random.Generator, key: str, value: Any) -> bytes:
    return wire.pack({**good_observation(rng), key: value})


def _cut(rng: np.random.Generator) -> bytes:
    frame = wire.pack(good_observation(rng))
    return frame[: rng.integers(0, len(frame))]


def _flipped(rng: np.random.Generator) -> bytes:
    frame = bytearray(wire.pack(good_observation(rng)))
    heads = np.r_[0:90, len(frame) - 140 : len(frame)]  # where names, types and shapes are
    for place in rng.choice(heads, rng.integers(1, 6)):
        frame[place] ^= 1 << rng.integers(0, 8)
    return bytes(frame)


def _deep(rng: np.random.Generator) -> bytes:
    opening = [b"\x91", b"\x81\xa1a", b"\x91\x81\xa1a"][rng.integers(0, 3)]
    return opening * int(rng.integers(100, 50_000))


def _huge(rng: np.random.Generator) -> bytes:
    kind = rng.integers(0, 5)
    number = int(rng.integers(3_000, 300_000))
    values = ([0] * number, ["a"] * number, [{"a": 1}] * (number // 3), "x" * number, {str(i): i for i in range(3_000)})
    return wire.pack({"state": values[kind]})


def _headers_that_lie(rng: np.random.Generator) -> bytes:
    heads = (
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff",
    )
    return heads[rng.integers(0, len(heads))] + rng.bytes(20)


def _wrong_dtype(rng: np.random.Generator) -> bytes:
    dtypes = ("<f8", "<i8", "|b1", "<U3", "|S2", "<M8[s]", ">f4", "<f2", "<u4")
    key = ("state", "images")[rng.integers(0, 2)]
    value = np.ones((32, 32, 3) if key == "images" else 7).astype(dtypes[rng.integers(0, len(dtypes))])
    return _replaced(rng, key, {"base": value} if key == "images" else value)


def _wrong_shape(rng: np.random.Generator) -> bytes:
    shape = tuple(rng.integers(0, 6, rng.integers(0, 6)).tolist())
    key = ("state", "images", "prompt")[rng.integers(0, 3)]
    value = np.zeros(shape, np.uint8 if key == "images" else np.float32)
    return _replaced(rng, key, {"base": value} if key == "images" else value)


def _not_finite(rng: np.random.Generator) -> bytes:
    state = rng.uniform(0, 1, 7)
    state[rng.integers(0, 7)] = (np.nan, np.inf, -np.inf, 1e300)[rng.integers(0, 4)]
    picture = np.full((8, 8, 3), (np.nan, 2.0, -1.0)[rng.integers(0, 3)], np.float32)
    return _replaced(rng, "state", state) if rng.random() < 0.5 else _replaced(rng, "images", {"base": picture})


def _strange_array(rng: np.random.Generator) -> bytes:
    strange = (
        _array("|O", [1], b"\x80\x04N."),
        _array("f4,O", [1], b"\0" * 12),
        _array("<f4", [2**62, 2**62], b""),
        _array("<f4", [0, 2**64 - 1], b""),
        _array("<f4", [-7], b"\0" * 28),
        _array("<f4", [1] * 70, b"\0" * 4),
        _array("<U999999999", [0], b""),
        _array("<f4", [True], b"\0" * 4),
        _array("<f4", [7], [0] * 28),
        _array("<f4", 7, b"\0" * 28),  # type: ignore[arg-type]
        {b"__ndarray__": True},
        {b"__npgeneric__": True, b"data": [1], b"dtype": "<f4"},
        {b"__npgeneric__": True, b"data": "x" * 99, b"dtype": "<M8[s]"},
        {b"__npgeneric__": True, b"data": 2**63, b"dtype": "<i4"},
    )
    key = ("state", "prompt", "manipi/deadline_ms", "manipi/reset")[rng.integers(0, 4)]
    return wire.pack({**_plain(rng), key: strange[rng.integers(0, len(strange))]})


def _plain(rng: np.random.Generator) -> dict[str, Any]:
    return msgpack.unpackb(wire.pack(good_observation(rng, 4)))


def _keys(rng: np.random.Generator) -> bytes:
    observation = good_observation(rng, 4)
    observation.pop(("state", "images", "prompt")[rng.integers(0, 3)])
    extra = ("images/base", "images/wirst", "manipi/deadline_ms", "manipi/reset", "", "\0", "prompt/x")
    return wire.pack(
        {**observation, extra[rng.integers(0, len(extra))]: (None, -1, [[]], {"a": {}}, "é")[rng.integers(0, 5)]}
    )


def _prompt(rng: np.random.Generator) -> bytes:
    texts = ("", "\0", "🤖" * 300, "<script>alert(1)</script>", b"\xff\xfe", 7, None, [], np.str_("go"))
    return _replaced(rng, "prompt", texts[rng.integers(0, len(texts))])


def _too_large(rng: np.random.Generator) -> bytes:
    return bytes(int(MAX_MESSAGE_MB * 2**20) + 1) if rng.random() < 0.02 else rng.bytes(int(rng.integers(0, 2_000)))


def _text(rng: np.random.Generator) -> str:
    return ("", "hello", '{"state": [0]}', "\0" * 5_000)[rng.integers(0, 4)]


FRAMES: tuple[Callable[[np.random.Generator], "bytes | str"], ...] = (
    *(_cut, _flipped, _deep, _huge, _headers_that_lie, _wrong_dtype, _wrong_shape, _not_finite, _strange_array),
    *(_keys, _prompt, _too_large, _text),
)

# ---- what is not even a frame

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def raw(port: int, rng: np.random.Generator) -> str:
    """Bytes past the websocket library: half a handshake, a broken frame, a client that vanishes in the middle."""
    frames = (
        b"\x82\xff" + struct.pack(">Q", 2**62) + b"abcd",
        b"\xf2\x85abcdefghi",
        b"\x82\x05hello",
        b"\x02\x80abcd" * 50,
        b"\x89\xfe\xff\xff" + b"x" * 40,
        b"\x82\xfe\x20\x00abcd" + rng.bytes(int(rng.integers(0, 8_000))),
    )
    broken = (rng.bytes(200), b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\n\r\n", HANDSHAKE + frames[rng.integers(0, 6)])
    with socket.create_connection(("127.0.0.1", port), timeout=HANG_S) as connection:
        connection.sendall(broken[rng.integers(0, 4)])
        if rng.random() < 0.5:  # reset instead of a proper end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return "raw bytes"


def slow_sender(port: int) -> socket.socket:
    """Half of a frame, whose end never comes."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(HANDSHAKE + b"\x82\xff" + struct.pack(">Q", 1_000_000) + b"abcd" + b"x" * 500_000)
    return connection


class Fuzzer:
    """Sends bad frames and keeps count of what comes back."""

    def __init__(self, port: int, seed: int):
        self._port, self._rng = port, np.random.default_rng(seed)
        self._connection: ClientConnection | None = None
        self.outcomes: Counter[str] = Counter()
        self.unplanned: list[str] = []

    def step(self) -> None:
        kind = self._rng.integers(0, len(FRAMES) + 1)
        try:
            outcome = raw(self._port, self._rng) if kind == len(FRAMES) else self.send(FRAMES[kind](self._rng))
        except (ConnectionClosed, ConnectionError):
            outcome = "disconnected"
        if not outcome.startswith(("answered", "raw")):
            self.close()
        self.outcomes[outcome] += 1

    def send(self, frame: "bytes | str") -> str:
        """What the server made of a frame."""
        if self._connection is None:
            self._connection = connect(
                f"ws://127.0.0.1:{self._port}", compression=None, max_size=None, proxy=None, ping_interval=None
            ).__enter__()
            self._connection.recv(HANG_S)
        self._connection.send(frame)
        answer = self._connection.recv(HANG_S)
        if isinstance(answer, bytes):
            return "answered"
        code, num_bytes = answer.partition("\n")[0], len(answer.encode())
        if num_bytes > MAX_TEXT_BYTES:
            self.unplanned.append(f"a text of {num_bytes} bytes: {answer[:200]}")
        if code not in ("ProtocolError", "ObservationError", "ActionError"):
            self.unplanned.append(answer)
        return f"told {code}"

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(ConnectionClosed, ConnectionError):
                self._connection.close()
            self._connection = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--large-mb", type=float, default=60.0, help="size of the frames of hostile.py")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    port_receiver, port_sender = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(port_sender,), daemon=True)
    server.start()
    port = port_receiver.recv()
    try:
        slow = [slow_sender(port) for _ in range(SLOW_SENDERS)]
        alone = ask_beside(context, port, lambda: time.sleep(3))
        fuzzer, memory = Fuzzer(port, args.seed), []

        def fuzz() -> None:
            for number in range(args.frames):
                fuzzer.step()
                if number in (args.frames // 5, args.frames - 1):
                    memory.append(memory_mb(server.pid))

        def send_large() -> None:
            observation = plain(good_observation(np.random.default_rng(0), 8))
            for name, make in frames(observation, int(args.large_mb * 2**20)).items():
                try:
                    outcome = fuzzer.send(make())
                finally:
                    fuzzer.close()
                print(f"{name:36}  {outcome}, {memory_mb(server.pid):.0f} MiB")

        began = time.perf_counter()
        beside = ask_beside(context, port, fuzz)
        seconds = time.perf_counter() - began
        fuzzer.close()
        before = memory_mb(server.pid)
        beside_large = ask_beside(context, port, send_large)
        kept = memory_mb(server.pid) - before
        for connection in slow:
            connection.close()
    finally:
        server.terminate()
        server.join(30)
    say(fuzzer, args.frames / seconds)
    p50, p99 = ([float(np.quantile(times, q)) for times in (alone, beside)] for q in (0.5, 0.99))
    print(f"good client: p50 {1e3 * p50[0]:.1f} ms alone, {1e3 * p50[1]:.1f} ms beside;", end=" ")
    print(f"p99 {1e3 * p99[0]:.1f} ms alone, {1e3 * p99[1]:.1f} ms beside; {len(beside)} answers;", end=" ")
    print(f"longest wait {max(beside_large):.2f} s beside large frames")
    measures = [
        Measure(name="unplanned errors", value=len(fuzzer.unplanned), unit="", goal=0),
        Measure(name="frames without an outcome", value=args.frames - fuzzer.outcomes.total(), unit="", goal=0),
        Measure(name="memory growth", value=memory[1] - memory[0], unit="MiB", goal=32),
        Measure(name="memory kept of large frames", value=kept, unit="MiB", goal=32 + 2 * args.large_mb),
        Measure(name="server's exit code", value=abs(server.exitcode or 0), unit="", goal=0),
    ]
    if args.frames >= 10_000:  # fewer are no measurement
        measures += [
            Measure(name="good client's p50, beside / alone", value=p50[1] / p50[0], unit="x", goal=3),
            Measure(name="good client's longest wait beside large frames", value=max(beside_large), unit="s", goal=1.0),
        ]
    report(measures)


def ask_beside(context: Any, port: int, work: Callable[[], None]) -> list[float]:
    """Seconds per call of a good client while `work` is done."""
    stop_receiver, stop = context.Pipe(duplex=False)
    results, results_sender = context.Pipe(duplex=False)
    client = context.Process(target=good_client, args=(port, stop_receiver, results_sender))
    client.start()
    try:
        if (sign := results.recv()) != "ready":
            raise SystemExit(f"the good client was not served: {sign}")
        work()
    finally:
        stop.send(True)
        times = results.recv()
        client.join()
    if isinstance(times, str) or not times:
        raise SystemExit(f"the good client was not served: {times or 'no answer at all'}")
    return times


def say(fuzzer: Fuzzer, rate: float) -> None:
    for outcome, count in fuzzer.outcomes.most_common():
        print(f"{count:8}  {outcome}")
    print(f"{rate:8.0f}  frames per second")
    for text in fuzzer.unplanned[:3]:
        print(text)


if __name__ == "__main__":
    main()
