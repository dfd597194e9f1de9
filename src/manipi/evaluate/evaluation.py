"""An evaluation: a policy server drives the trials of a suite, every result is kept, and a kill loses none.

DIR/evaluation.json    what was asked for and of whom: another checkpoint or setting needs another folder
DIR/trials.jsonl       a line per trial as it ends; the same command goes on with those that are missing
DIR/result.json        all of it in order, with the success rate; written when the last trial is there
DIR/report.html, films/

manipi eval ── request, result ──▶ K worker processes (`manipi_client.trials`) ── websocket ──▶ manipi serve
                                   here, or on the hosts of a Ray cluster
"""

import contextlib
import itertools
import json
import os
import platform
import queue
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

import manipi
from manipi.errors import ConfigError, ServeError, SimulatorError, quoted, shown
from manipi.evaluate.statistics import SuccessRate, success_rate
from manipi.evaluate.suites import Suite
from manipi.processes import Remote, cluster_size
from manipi.records import json_bytes, read_object, to_json
from manipi.robots.robot import Gripper, LinkageGripper, Robot
from manipi.storage import Lock, atomic_write, storage_errors
from manipi.transforms.observation import Mode
from manipi_client import WebsocketPolicy
from manipi_client.realtime import JOINS
from manipi_client.trials import TrialResult, TrialSpec

HANG_SECONDS = 120.0
"""How long a simulator may take for its start, or for a step, before it counts as hung."""

METADATA = {
    "robot": Mapping,
    "candidates": Mapping,
    "image_size": int,
    "action_horizon": int,
    "control_hz": (int, float),
}
"""What an evaluation reads of a server's metadata."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides an evaluation beside suite and policy; every trial is a function of these and its index."""

    trials: int
    seed: int = 0
    execute_steps: int = 8
    """Steps of each chunk that are executed."""
    join: str = "synchronous"
    """How chunks are joined: one of `manipi_client.realtime.JOINS`."""
    delay: int = 0
    """Control steps from an observation to its answer."""
    control: str | None = None
    """One of `manipi_client.trials.CONTROLS`; None: the policy as it is."""
    num_steps: int | None = None
    temperature: float | None = None
    mode: str | None = None
    subtask_every: int = 0
    candidates: int | None = None
    """Chunks that are drawn for each answer; None: what the server does of its own."""
    selector: str | None = None
    gate: float | None = None

    def __post_init__(self) -> None:
        joins, temperature = ", ".join(JOINS), 0 if self.temperature is None else self.temperature
        require("--trials", self.trials, self.trials >= 1, "a trial or more", "200")
        require("--execute-steps", self.execute_steps, self.execute_steps >= 1, "a step of each chunk or more", "8")
        require("--join", self.join, self.join in JOINS, f"one of {joins}", "synchronous")
        require("--delay", self.delay, self.delay >= 0, "control steps, from 0", "2")
        require("--num-steps", self.num_steps, self.num_steps is None or self.num_steps >= 1, "a step or more", "10")
        modes = get_args(Mode)
        require("--mode", self.mode, self.mode in (None, *modes), f"one of {', '.join(modes)}", "tokens")
        require("--subtask-every", self.subtask_every, self.subtask_every >= 0, "a number of answers, from 0", "1")
        require("--temperature", self.temperature, 0 <= temperature <= 100, "a temperature from 0 to 100", "1")

        n, rest = self.candidates, self.join == "real_time" or self.selector != "coherence"
        require("--candidates", n, n is None or n >= 1, "a candidate or more", "8")
        require("--selector", self.selector, n is not None or self.selector is None, "--candidates beside it", "medoid")
        require("--gate", self.gate, n is not None or self.gate is None, "--candidates beside it", "0.3 --candidates 8")
        require("--selector", self.selector, rest, "--join real_time, which knows a previous chunk", "medoid")

    def trial(self, suite: Suite, index: int) -> TrialSpec:
        settings = asdict(self)
        del settings["trials"]
        return suite.trial(settings.pop("seed"), index, **settings)


def require(flag: str, value: object, fits: bool, expected: str, example: str) -> None:
    """ConfigError where the value of a flag does not fit; it names one that does."""
    if not fits:
        raise ConfigError(expected=expected, found=shown(value), where=flag, next=f"{flag} {example}")


class Evaluation:
    """The trials of one policy in a suite, in a folder. Use it in a `with`: worker processes end with it.

    Args:
        folder: made, or gone on with where it holds some of these trials.
        url: of the policy server.
        policy: how people call the policy.
        server: what is known of the server beside its metadata, for the record.
        workers: simulators side by side; 0: one, or on a cluster one for each of its processors.
        ray: they run on a Ray cluster, whose hosts have the simulator's Python at the same path.

    Raises:
        ConfigError: the folder holds trials of another checkpoint, suite or setting; or the settings do not fit the
            policy; or other hosts of the cluster cannot reach the server.
        SimulatorError: the suite is for another robot.
        PolicyServerError: no policy server answers at the address.
    """

    def __init__(
        self,
        folder: Path,
        suite: Suite,
        settings: Settings,
        url: str,
        *,
        policy: str,
        server: Mapping[str, Any] | None = None,
        workers: int = 1,
        ray: bool = False,
    ):
        self.folder, self.suite, self.settings, self.policy, self._url = folder, suite, settings, policy, url
        self._ray, self._workers = ray, list[Worker | Remote]()
        self._num_workers = _places(url, workers) if ray else max(workers, 1)
        with WebsocketPolicy(url, None, os.environ.get("MANIPI_TOKEN")) as client:
            told = client.metadata
        # A server that is not ours says nothing of this, or means something else by it.
        self.metadata = {k: v for k, v in told.items() if k not in METADATA or isinstance(v, METADATA[k])}
        require_fit(self.metadata, suite, settings)
        self.provenance = {
            "suite": suite.name,
            "robot": suite.robot,
            "settings": {key: value for key, value in asdict(settings).items() if key != "trials"},
            "options": self._options,
            "candidates": self._candidates,
            "checkpoint": self.metadata.get("checkpoint"),
            "step": self.metadata.get("step"),
            "server": {**(server or {}), **({"device": device} if (device := self.metadata.get("device")) else {})},
            "versions": {"manipi": manipi.__version__, "python": platform.python_version()},
        }
        self.rows: dict[int, dict[str, Any]] = {}
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = Lock(folder / ".lock", wait=False)
            except BlockingIOError:
                raise ConfigError(
                    expected="one evaluation at a time in a folder",
                    found="another that runs there now, or the same policy twice in a comparison",
                    where=str(folder),
                    next="wait for its end, or name another folder with manipi eval --dir",
                ) from None
        try:
            self._claim()
        except BaseException:
            self._lock.close()
            raise

    @property
    def _options(self) -> dict[str, Any]:
        size = self.metadata.get("image_size") if self.suite.policy_image_size else None
        return {**self.suite.options, **({} if size is None else {"image_size": size})}

    @property
    def _candidates(self) -> dict[str, Any] | None:
        """How each answer is chosen, by the settings or else by the server; None: there is nothing to choose."""
        own = {"n": self.settings.candidates, "selector": self.settings.selector, "gate": self.settings.gate}
        told = dict(self.metadata.get("candidates") or {})
        if own["selector"] not in (None, told.get("selector")):
            told.pop("source", None)  # of the selector that is not used
        both = {**told, **{key: value for key, value in own.items() if value is not None}}
        return both if both.get("n", 1) > 1 else None

    def _claim(self) -> None:
        """Read what the folder holds of this evaluation, or make it."""
        path, log = self.folder / "evaluation.json", self.folder / "trials.jsonl"
        if not path.exists():
            found = [name for name in ("trials.jsonl", "result.json", "report.html") if (self.folder / name).exists()]
            if found:
                raise self._not_ours(f"a folder with {', '.join(found)}, and without evaluation.json")
            atomic_write(path, json_bytes(self.provenance))
        before = read_object(path, ConfigError)
        defaults = {f.name: f.default for f in fields(Settings) if f.default is not MISSING}
        before["settings"] = defaults | before.get("settings", {})  # older ones have fewer
        for key, value in json.loads(json_bytes(self.provenance)).items():
            if key != "simulator" and before.get(key) != value:
                raise ConfigError(
                    expected=f"trials with {key} {shown(value, 200)}",
                    found=f"some with {shown(before.get(key), 200)}",
                    where=str(self.folder),
                    next="move this folder away or delete it, or name another one with manipi eval --dir",
                )
        self.provenance = before
        if log.exists():
            whole, _, half = log.read_bytes().rpartition(b"\n")
            if half:  # a kill or a full disk in the middle of a line
                atomic_write(log, whole + b"\n" if whole else b"")
            for number, line in enumerate(whole.splitlines(), 1):
                try:
                    row = json.loads(line)
                    TrialResult(**row)  # it has all that a trial has
                    self.rows[row["index"]] = row
                except (ValueError, LookupError, TypeError):
                    raise self._not_ours(
                        f"{shown(line.decode(errors='replace'), 200)} in line {number} of {log.name}"
                    ) from None

    def _not_ours(self, found: str) -> ConfigError:
        return ConfigError(
            expected="a new folder, or one of an evaluation",
            found=found,
            where=str(self.folder),
            next="restore what was in it, or name another folder with manipi eval --dir",
        )

    def __enter__(self) -> "Evaluation":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            worker.close()
        self._workers = []
        self._lock.close()

    def successes(self, count: int) -> list[bool]:
        """Of the first `count` trials, in order."""
        return [self.rows[index]["success"] for index in range(count)]

    def run(self, count: int | None = None, *, show: bool = True) -> None:
        """Run those of the first `count` trials that are missing; None: all of the settings.

        Raises:
            SimulatorError: a simulator did not start, died, hung or said what is wrong. What had ended is kept.
            ServeError: the policy server ended, or answered with an error. What had ended is kept.
            ConfigError: the checkpoint was changed meanwhile.
        """
        count = self.settings.trials if count is None else count
        missing = [index for index in range(count) if index not in self.rows]
        if not missing:
            return
        while len(self._workers) < min(self._num_workers, len(missing)):
            make = partial(Remote, Worker) if self._ray else Worker
            self._workers.append(make(self.suite, self._url, self._options, os.environ.get("MANIPI_TOKEN")))
        for worker in self._workers:
            self._note_simulator(worker.ready())
        pending, ended = queue.SimpleQueue[int](), queue.SimpleQueue[dict[str, Any] | BaseException]()
        for index in missing:
            pending.put(index)
        threads = [
            threading.Thread(target=self._drive, args=(worker, pending, ended), daemon=True) for worker in self._workers
        ]
        for thread in threads:
            thread.start()
        label = self.settings.control or "drive"
        bar = tqdm(total=count, initial=count - len(missing), desc=label, unit="trial", disable=not show)
        with bar, storage_errors(self.folder / "trials.jsonl"), (self.folder / "trials.jsonl").open("ab") as log:
            for _ in missing:
                row = ended.get()
                if isinstance(row, BaseException):
                    raise row
                log.write(json.dumps(row).encode() + b"\n")
                log.flush()
                os.fsync(log.fileno())
                self.rows[row["index"]] = row
                bar.update()
                now = self.success()
                bar.set_postfix_str(f"{now.k}/{now.n}, {now.low:.0%} to {now.high:.0%}", refresh=False)

    def _drive(
        self, worker: "Worker | Remote", pending: "queue.SimpleQueue[int]", ended: "queue.SimpleQueue[Any]"
    ) -> None:
        """In a thread per worker process."""
        try:
            while True:
                spec = self.settings.trial(self.suite, pending.get_nowait())
                ended.put(worker.ask({"trial": asdict(spec)}, "result", f"trial {spec.index}"))
        except queue.Empty:
            pass
        except Exception as error:  # noqa: BLE001 - the main thread raises it.
            ended.put(error)

    def _note_simulator(self, described: Mapping[str, Any]) -> None:
        before = self.provenance.get("simulator")
        if before is None:
            self.provenance["simulator"] = dict(described)
            atomic_write(self.folder / "evaluation.json", json_bytes(self.provenance))
        elif before != described:
            raise ConfigError(
                expected=f"the simulator of the trials so far: {shown(before, 300)}",
                found=shown(dict(described), 300),
                where=str(self.folder),
                next="name another folder with --dir",
            )

    def success(self) -> SuccessRate:
        """Of the trials so far."""
        return success_rate(sum(row["success"] for row in self.rows.values()), len(self.rows))

    def result(self) -> dict[str, Any]:
        """The first trials of the settings, up to one that is missing, without the commands that the arm executed; and
        what came of them."""
        robot, rows = self._robot(), self._first_rows()
        wins = sum(row["success"] for row in rows)
        times = [ms for row in rows for ms in row["infer_ms"]]
        p50, p95 = np.percentile(times, (50, 95)).tolist() if times else (None, None)
        return {
            **self.provenance,
            "policy": self.policy,
            "seed": self.settings.seed,
            "success": to_json(success_rate(wins, len(rows))),
            "latency_ms": {"p50": p50, "p95": p95},
            "batched_trials": sum(row["batched"] > 0 for row in rows),
            "trials": [_summary(row, robot) for row in rows],
        }

    def _first_rows(self) -> list[dict[str, Any]]:
        """An earlier command may have made more, and one that was killed some beyond a gap."""
        present = itertools.takewhile(lambda index: index in self.rows, range(self.settings.trials))
        return [self.rows[index] for index in present]

    def finish(self) -> dict[str, Any]:
        """`result`, written to the folder."""
        result = self.result()
        atomic_write(self.folder / "result.json", json_bytes(result))
        return result

    def films(self, count: int) -> dict[int, np.ndarray]:
        """Pictures uint8 [T, h, w, 3] of the first failures and successes by index: half of each where there are."""
        rows = self._first_rows()
        failures, wins = ([r for r in rows if r["success"] is won] for won in (False, True))
        wins = wins[: count - min(len(failures), count // 2)]
        chosen = [*wins, *failures[: count - len(wins)]]
        found, here = {}, next((worker for worker in self._workers if isinstance(worker, Worker)), None)
        if chosen and here is None:
            here = Worker(self.suite, self._url, self._options)
            self._workers.append(here)
            here.ready()
        with tempfile.TemporaryDirectory(prefix="manipi-film-") as folder:
            for row in tqdm(chosen, desc="film", unit="trial", disable=not chosen):
                spec, path = self.settings.trial(self.suite, row["index"]), Path(folder) / f"{row['index']}.npy"
                request = {"trial": asdict(spec), "film": str(path), "actions": row["actions"]}
                assert here is not None, "made above"
                if here.ask(request, "film", f"the film of trial {spec.index}") is None:
                    break  # this simulator has no pictures for people
                found[row["index"]] = np.load(path)
        return dict(sorted(found.items()))

    def _robot(self) -> Robot | None:
        """What the server says of its robot; None where it says nothing that we know."""
        try:
            return Robot.from_json(self.metadata["robot"], "the server's metadata")
        except (KeyError, ConfigError):
            return None


def _summary(row: Mapping[str, Any], robot: Robot | None) -> dict[str, Any]:
    """A trial for the result: what two runs of one policy have in common, and nothing that depends on the clock."""
    kept = ("success", "steps", "failure", "task", "prompt", "seconds", "collisions", "path_m", "starved", "answers")
    actions = np.array(row["actions"], np.float32)
    jerk, events = _smoothness(actions, robot)
    motion = {key: row["motion"][key] for key in ("seams", "seam_jump", "step_change")}
    found = {"index": row["index"], "seed": row["scene"], **{key: row[key] for key in kept}}
    counts = {"gripper_events": events, "batched": row["batched"], "drawn": row.get("drawn", row["answers"])}
    return {**found, "jerk": jerk, **counts, **motion}


def _smoothness(actions_TA: np.ndarray, robot: Robot | None) -> tuple[float | None, int | None]:
    """The mean third difference of the commands that move no gripper, per step³; how often a gripper was opened or
    closed, by commands beyond 40 and 60 % of its way."""
    if not len(actions_TA):  # a scene that is solved as it begins
        return None, 0 if robot else None
    offset, grippers, events = 0, [], 0
    for group in robot.actions if robot else ():
        if isinstance(group, Gripper | LinkageGripper):
            grippers.append(offset)
            start, end = (group.open, group.closed) if isinstance(group, Gripper) else (0.0, 1.0)
            share = (actions_TA[:, offset] - start) / (end - start)
            sides = [value > 0.5 for value in share.tolist() if not 0.4 <= value <= 0.6]
            events += sum(a != b for a, b in itertools.pairwise(sides))
        offset += group.size
    moving = np.delete(actions_TA, grippers, axis=1)
    jerk = float(np.abs(np.diff(moving, 3, axis=0)).mean()) if len(moving) > 3 and moving.shape[1] else None
    return jerk, events if robot else None


def require_fit(metadata: Mapping[str, Any], suite: Suite, settings: Settings) -> None:
    """That a policy can be tried so.

    Args:
        metadata: of its server; what is not said there is not looked at.

    Raises:
        SimulatorError: the suite is for another robot.
        ConfigError: more steps than the policy predicts, or a join that it does not know.
    """
    robot = (metadata.get("robot") or {}).get("name")
    if robot is not None and robot != suite.robot:
        raise SimulatorError(
            expected=f"a policy for the robot {suite.robot!r}, whose suite {suite.name} is",
            found=f"one for {shown(robot)}",
            where="the policy server's metadata",
            next="choose a suite of that robot with --suite (--suite all lists them)",
        )
    horizon, delay = metadata.get("action_horizon"), 0 if settings.join == "synchronous" else settings.delay
    if horizon is not None and settings.execute_steps + delay > horizon:
        raise ConfigError(
            expected=f"steps to execute and a delay, within {horizon} together",
            found=f"{settings.execute_steps} and {delay}",
            where="--execute-steps and --delay",
            next=f"--execute-steps {horizon - delay}"
            if delay < horizon
            else f"--delay {horizon - 1} --execute-steps 1",
        )
    if settings.join == "real_time" and not metadata.get("real_time"):
        raise ConfigError(
            expected="a policy that goes on from a previous chunk",
            found="one that does not (`real_time` in its metadata)",
            where="--join real_time",
            next="--join asynchronous",
        )
    if settings.candidates is not None and "candidates" not in metadata:
        raise ConfigError(
            expected="a flow policy of a server that draws candidates",
            found="one that does not (`candidates` in its metadata)",
            where="--candidates",
            next="leave it out",
        )


def _places(url: str, workers: int) -> int:
    """How many simulators a Ray cluster takes, of which each has a processor."""
    processors, hosts = cluster_size()
    if workers > processors:
        raise ConfigError(
            expected=f"at most {processors} simulators, of which each takes a processor of the Ray cluster",
            found=str(workers),
            where="--workers",
            next=f"--workers {processors}",
        )
    name = urlsplit(url).hostname or ""
    if hosts > 1 and (name in ("localhost", "::1", "0.0.0.0", "::") or name.startswith("127.")):
        raise ConfigError(
            expected=f"a policy server that all {hosts} hosts of the Ray cluster can reach",
            found=f"one at {url}, which leads each of them to itself",
            where="--ray",
            next="--host ADDRESS, one of this computer's that the others reach; or name a server's URL",
        )
    return workers or processors


class Worker:
    """A process of `manipi_client.trials` in the simulator's Python.

    Args:
        token: of the policy server.

    Raises:
        SimulatorError: this host has no such Python.
    """

    def __init__(self, suite: Suite, url: str, options: Mapping[str, Any], token: str | None = None):
        self._suite, self._url = suite, url
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        command = [str(suite.python), "-m", "manipi_client.trials", suite.factory, "--url", url]
        command += ["--options", json.dumps(options)]
        # One thread each: many simulators side by side would otherwise wait for each other.
        environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ}
        environment |= {"MANIPI_TOKEN": token} if token else {}
        # A group of its own: Ctrl-C, and a scheduler's signal, are for the process that keeps the trials.
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log, "process_group": 0}
        try:
            process: subprocess.Popen[str] = subprocess.Popen(command, **pipes, env=environment, text=True)  # type: ignore[call-overload]
        except FileNotFoundError as error:
            raise SimulatorError(
                expected=f"the Python of suite {suite.name}, at the same path on every host",
                found=f"none on {platform.node()}",
                where=str(suite.python),
                next="build the simulator there, too, in a folder of the same path",
            ) from error
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._input, self._output = process, process.stdin, process.stdout
        self._events: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready: dict[str, Any] = {}

    def _read(self) -> None:
        for line in self._output:
            self._events.put(line)
        self._events.put(None)

    def ready(self) -> dict[str, Any]:
        """What the simulator says about itself, once it is there."""
        if not self._ready:
            self._ready = self._wait("ready", "its start")
        return self._ready

    def ask(self, request: Mapping[str, Any], kind: str, what: str) -> Any:
        """The answer to a request.

        Raises:
            SimulatorError: it died, made no step for two minutes, or said an error.
            ServeError: the policy server ended, or answered with an error.
        """
        try:
            self._input.write(json.dumps(request) + "\n")
            self._input.flush()
        except BrokenPipeError:
            pass  # it is dead, and its last words are read below
        return self._wait(kind, what)

    def _wait(self, kind: str, what: str) -> Any:
        while True:
            try:
                line = self._events.get(timeout=HANG_SECONDS)
            except queue.Empty:
                self._process.kill()
                raise self._error(what, f"no step for {HANG_SECONDS:.0f} s") from None
            if line is None:
                code = self._process.wait()
                ended = f"signal {-code}" if code < 0 else f"exit status {code}"
                raise self._error(what, f"its end with {ended}")
            event = json.loads(line)
            if event.get("error", {}).get("server"):
                raise ServeError(
                    expected=f"answers of the policy server in {what}",
                    found=f"{event['error']['kind']}\n{event['error']['text']}",
                    where=self._url,
                    next="do what it says, or start the server again; the same command then goes on",
                )
            if "error" in event:
                raise self._error(what, f"{event['error']['kind']}\n{event['error']['text']}")
            if kind in event:
                return event[kind]

    def _error(self, what: str, found: str) -> SimulatorError:
        self._log.seek(0)
        said = self._log.read().decode(errors="replace")[-1500:].strip()
        return SimulatorError(
            expected=f"the simulator of {self._suite.name} to come through {what}",
            found=found + (f"; it said:\n{said}" if said else ""),
            where=f"{quoted(self._suite.python)} -m manipi_client.trials {self._suite.factory}",
            next="mend what it says; the same command then goes on with the trials that are missing",
        )

    def close(self) -> None:
        """Ends the process: by the end of its input, or where it hangs, or is in a trial, by a signal."""
        with contextlib.suppress(BrokenPipeError):  # it is dead
            self._input.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._output.close()
        self._log.close()
