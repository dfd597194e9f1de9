"""`manipi serve`: a checkpoint over websocket."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from manipi.cli.arguments import NewFile, OnDevice, parse
from manipi.recipes.registry import load_selector
from manipi.records import to_json
from manipi.serve.access import Access, join_host, read_token, tls_context
from manipi.serve.batching import Limits
from manipi.serve.guard import GuardMode
from manipi.serve.server import PolicyServer
from manipi.storage import Lock, atomic_write


@dataclass(frozen=True, kw_only=True)
class _Serve(OnDevice):
    """Serve a checkpoint in openpi's protocol; openpi's own client drives it unchanged. Browsers get a dashboard."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, such as runs/NAME/checkpoints/STEP or runs/NAME/best."""
    robot: str | None = None
    """Which of the robots that it was trained on; the recipe's own unless named."""
    host: str = "127.0.0.1"
    """Address to listen on; your own computer only, unless there is a token or --insecure."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    token_file: Path | None = None
    """File with the token that clients must show; the environment variable MANIPI_TOKEN unless given."""
    tls_cert: Path | None = None
    """Certificate chain (PEM): clients then connect to wss://."""
    tls_key: Path | None = None
    """Its private key (PEM), unless the certificate's file has it."""
    insecure: bool = False
    """Listen where other computers can connect, without a token."""
    guard: GuardMode = "clamp"
    """Commands beyond the robot's limits and rates: moved to the nearest allowed one, refused, or let through."""
    empty_prompts: bool = False
    """Take observations whose prompt is empty also where the policy was not trained on such."""
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    """Of the noise that actions are sampled from."""
    num_steps: int | None = None
    """Integration steps of a flow policy; a request may name others. Default: the checkpoint's own number."""
    temperature: float | None = None
    """Of π0-FAST's tokens; a request may name another. Default: the likeliest are taken."""
    mode: Literal["flow", "tokens"] | None = None
    """How a policy acts that was trained on both; a request may name the other. Default: flow."""
    subtask_every: int = 0
    """Of each client at every so many answers, the policy writes what is to be done next, and follows that until then.
    0: only where a request asks for it."""
    candidates: int | None = None
    """Chunks that a flow policy draws for each answer, of which --selector chooses one; a request may name another
    number. Default: 1."""
    selector: str | None = None
    """limits, medoid, coherence, token, or FILE.py:NAME; `+token` behind it makes the last candidate the token head's
    (docs/candidates.md). Default: medoid."""
    gate: float | None = None
    """Draw more than one only where the path of the first one bends by more. Default: always."""
    compile: bool = False
    """Fuse and compile the model, and call it once for each shape to come, before the port opens."""
    quantize: Literal["none", "int8_weights", "int8", "fp8"] = "none"
    """Keep matrices in 8 bits; only after `manipi bench infer CHECKPOINT --quantize KIND --data DATASET`."""
    ready_file: NewFile | None = None
    """Write the port to this file once clients can connect."""
    while_locked: Path | None = None
    """End as soon as this file is not locked (flock) any more: with the process that locks it, however that ends."""


def main(arguments: Sequence[str]) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    args = parse(_Serve, arguments, "serve")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if args.while_locked is not None:
        threading.Thread(target=_end_when_free, args=(args.while_locked,), daemon=True).start()
    tls = tls_context(args.tls_cert, args.tls_key)
    access = Access(token=read_token(args.token_file), tls=tls, insecure=args.insecure)
    access.resolve(args.host, args.port)  # before the model is loaded
    device = args.start()

    from manipi.candidates import Choice
    from manipi.checkpoints.native import identity, require_report
    from manipi.policy import Policy

    plain = args.quantize == "none"
    if not plain:
        require_report(args.checkpoint, args.quantize)
    # The self-test is of the exact weights, in the engine where there is one; what 8 bits change, the report says.
    sampling = {"num_steps": args.num_steps, "temperature": args.temperature, "mode": args.mode}
    choice = {"n": args.candidates, "selector": args.selector, "gate": args.gate}
    choice = {name: value for name, value in choice.items() if value is not None}
    as_trained = not choice and not any(value is not None for value in sampling.values())
    compile = args.compile and plain and as_trained
    policy = Policy.load(args.checkpoint, robot=args.robot, device=device, seed=args.seed, compile=compile)
    if not as_trained:
        policy.set_sampling(**sampling)
    rule = Choice(**choice).rule
    own, source = load_selector(rule) if ":" in rule else (None, "")
    if choice:
        policy.set_candidates(Choice(**choice), own)
    if not plain:
        policy.fuse(args.quantize)
    if args.compile and not compile:
        policy.compile()
    # Clients are told every number of a command, the checkpoint's hash (its manifest has all), and what it runs on.
    told = {"action_space": to_json(policy.robot.action_space), "checkpoint": identity(args.checkpoint)}
    told["device"] = str(device)
    if source:
        told["candidates"] = {**policy.metadata["candidates"], "source": source}
    server = PolicyServer(
        policy,
        args.host,
        args.port,
        metadata={**policy.metadata, **told},
        robot=policy.robot,
        guard=args.guard,
        subtask_every=args.subtask_every,
        empty_prompts=args.empty_prompts or _was_trained_without_prompt(args.checkpoint),
        access=access,
        limits=args.limits,
    )

    def ready(host: str, port: int) -> None:
        place, s = join_host(host, port), "s" if tls else ""
        print(f"{policy.robot.name}: ws{s}://{place}   dashboard: http{s}://{place}/", flush=True)
        if args.ready_file is not None:
            atomic_write(args.ready_file, str(port).encode())

    server.serve_forever(ready)


def _end_when_free(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # it is gone with its folder, once it is free
        Lock(path).close()
    os.kill(os.getpid(), signal.SIGTERM)


def _was_trained_without_prompt(checkpoint: Path) -> bool:
    """By the recorded observation, which is one of training."""
    from manipi.checkpoints.native import read_self_test

    test = read_self_test(checkpoint)
    return test is not None and not str(test.observation.get("prompt", "?")).strip()
