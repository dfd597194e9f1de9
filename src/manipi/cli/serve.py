"""`manipi serve`: a checkpoint over websocket."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from manipi.cli.arguments import parse
from manipi.storage import atomic_write


@dataclass(frozen=True, kw_only=True)
class _Serve:
    """Serve a checkpoint in openpi's protocol; openpi's own client drives it unchanged."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, such as runs/NAME/checkpoints/STEP or runs/NAME/best."""
    robot: str | None = None
    """Which of the robots that it was trained on; the recipe's own unless named."""
    host: str = "127.0.0.1"
    """Address to listen on; your own computer only, unless --allow-public."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    allow_public: bool = False
    """Listen where other computers can connect; there is no authentication yet."""
    device: str = "cpu"
    """Where the model runs, such as cuda."""
    seed: int = 0
    """Of the noise that actions are sampled from."""
    compile: bool = False
    """Fuse and compile the model, and call it once for each shape to come, before the port opens."""
    quantize: Literal["none", "int8_weights", "int8", "fp8"] = "none"
    """Keep matrices in 8 bits; only after `manipi bench infer CHECKPOINT --quantize KIND --data DATASET`."""
    num_threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""
    ready_file: Path | None = None
    """Write the port to this file once clients can connect."""


def main(arguments: Sequence[str]) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    args = parse(_Serve, arguments, "serve")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("websockets").setLevel(logging.WARNING)

    import torch

    from manipi.checkpoints.quantized import require_report
    from manipi.policy import Policy
    from manipi.serve.server import PolicyServer

    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    if args.quantize != "none":
        require_report(args.checkpoint, args.quantize)
    exact = args.compile and args.quantize == "none"
    policy = Policy.load(args.checkpoint, robot=args.robot, device=args.device, seed=args.seed, compile=exact)
    if args.quantize != "none":
        policy.fuse(args.quantize)
    if args.compile and not exact:
        policy.compile()
    server = PolicyServer(policy, args.host, args.port, allow_public=args.allow_public)

    def ready(host: str, port: int) -> None:
        print(f"{policy.robot.name}: ws://{host}:{port}   health: http://{host}:{port}/healthz", flush=True)
        if args.ready_file is not None:
            atomic_write(args.ready_file, str(port).encode())

    server.serve_forever(ready)
