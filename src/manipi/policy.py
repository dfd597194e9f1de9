"""A policy: observation in, action chunk out, through the same pipeline that trained it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manipi.candidates import SELECTORS, Candidates, Choice, Selector, candidate_noises, choose, executed_rows
from manipi.checkpoints.native import Checkpoint, PolicyConfig, SelfTest, read_checkpoint
from manipi.errors import (
    ConfigError,
    ObservationError,
    SelfTestError,
    TokenizerError,
    WeightsMismatchError,
    shown,
    unknown_name,
)
from manipi.model import VLA, ModelInput
from manipi.model.autoregressive import TokenDraws
from manipi.model.config import Pi0FastConfig
from manipi.model.device import ran_out_of_memory, require_device
from manipi.model.inference.engine import Engine, require_compiled
from manipi.model.inference.fused import Quantization
from manipi.model.inputs import PROMPT_MULTIPLE, blank_input
from manipi.robots.robot import Robot
from manipi.tokenizers import Tokenizers
from manipi.transforms import pipeline
from manipi.transforms.model_input import code_constraint
from manipi.transforms.observation import CHUNK_KEYS, MAX_NUM_STEPS, Mode, Request, read_request
from manipi.types import NormStats, Observation, Sample
from manipi_client.keys import NUM_STEPS, WRITE_SUBTASK

SELF_TEST_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest difference in normalised units between the trainer's actions and the loaded policy's."""


MAX_TEXT = 64
"""Tokens that a policy may write before a newline."""


@dataclass(frozen=True)
class Encoded:
    """An observation on its way to the model."""

    sample: Sample
    """What the model reads, without the batch's axis."""
    seen: list[Sample]
    """What each step of the pipeline saw, to decode by."""
    request: Request
    """What the client asked for beside it: seed, integration steps, temperature."""


class Policy:
    """Model, pipeline and robot together.

    Args:
        model: in evaluation mode, on the device where it shall run.
        seed: of the noise that `infer` draws when none is given.
    """

    def __init__(
        self,
        model: VLA,
        config: PolicyConfig,
        robot: Robot,
        stats: NormStats,
        tokenizers: Tokenizers,
        *,
        seed: int = 0,
    ):
        self.model, self.config, self.robot, self.tokenizers, self.norm_stats = model, config, robot, tokenizers, stats
        self.pipeline = pipeline.build(robot, config.model, stats, tokenizers, config.norm_mode)
        self._constraint = (
            code_constraint(config.model, tokenizers, robot.model_action_size) if config.model.writes_codes else None
        )
        self._modes: tuple[Mode, ...] = ("tokens",) if isinstance(config.model, Pi0FastConfig) else ("flow",)
        if config.model.writes_codes and self._modes == ("flow",):
            self._modes = ("flow", "tokens")
        self._device = next(model.parameters()).device
        self._engine: Engine | None = None
        self.temperature, self.choice, self._selectors = 0.0, Choice(), dict(SELECTORS)
        self._seed = seed
        self.reset()

    @staticmethod
    def load(
        folder: Path, *, robot: str | None = None, device: str = "cpu", seed: int = 0, compile: bool = False
    ) -> "Policy":
        """Read a checkpoint, verify its hashes and replay its self-test.

        Args:
            robot: which of those that it was trained on; None: the recipe's own.
            compile: run it through a compiled engine, the self-test included.

        Raises:
            CheckpointError: the folder is incomplete or altered, or the self-test does not repeat.
            UnknownNameError: it was not trained on that robot.
            ConfigError: torch cannot compile here, or the device is not there or has too little memory.
        """
        checkpoint = read_checkpoint(Path(folder))
        assert checkpoint.self_test is not None
        policy = Policy.from_checkpoint(checkpoint, device=device, seed=seed)
        with _room_on(device, policy.model):
            if compile:
                policy.compile()
            policy.check(checkpoint.self_test, where=str(folder))
        if robot in (None, policy.robot.name):
            return policy
        if robot not in checkpoint.other_robots:
            known = (policy.robot.name, *checkpoint.other_robots)
            raise unknown_name(f"robot of {folder}", robot, known, next="serve it to a robot that it was trained on")
        return Policy(policy.model, policy.config, *checkpoint.other_robots[robot], policy.tokenizers, seed=seed)

    @staticmethod
    def from_checkpoint(checkpoint: Checkpoint, *, device: str = "cpu", seed: int = 0) -> "Policy":
        """The policy on `device`.

        Raises:
            WeightsMismatchError: names or shapes differ.
            ConfigError: there is no such device, or too little memory on it.
        """
        require_device(device)
        with torch.device("meta"):
            model = VLA(checkpoint.config.model)
        try:
            model.load_state_dict(dict(checkpoint.weights), strict=True, assign=True)
        except RuntimeError as error:
            raise WeightsMismatchError(
                expected=f"the tensors of {type(model.config).__name__} in this version of manipi",
                found=str(error),
                where="the checkpoint's weights",
                next="load it with the manipi version that wrote it",
            ) from error
        c = checkpoint
        with _room_on(device, model):
            model = model.to(device)
        return Policy(model.eval(), c.config, c.robot, c.norm_stats, c.tokenizers, seed=seed)

    def fuse(self, quantization: Quantization = "none") -> Engine:
        """Run through an engine from now on. It takes over the weights; `model` is the engine then.

        Raises:
            ConfigError: the device has no such quantization, or the policy repeats quirks that the engine has not, or
                it remembers the past.
        """
        assert self._engine is None, "an engine already"
        if past := self.config.model.past_steps:
            raise ConfigError(
                expected="a policy that sees the present alone, which is all that the engine computes",
                found=f"one that remembers what was {', '.join(map(str, past))} steps ago",
                where="the engine",
                next="serve it without --compile",
            )
        self.model = self._engine = Engine(self.model, self.config.num_steps, quantization)
        return self._engine

    def compile(self) -> None:
        """Compile the engine's layers and call it once for each shape to come, so that no robot waits for that.

        On a GPU that is every length of the prompt in steps of 16, each with a CUDA graph. On a processor it is two
        lengths, after which torch has code for all. Both ways to go on from a previous chunk are called too.

        Raises:
            ConfigError: torch cannot compile here; the message says why.
        """
        (self._engine or self.fuse()).compile()
        require_compiled(self._warm_up)

    def _warm_up(self) -> None:
        slots, longest = self.config.model.cameras, self.config.model.max_token_len
        lengths = (longest, longest - 1)
        if self._device.type == "cuda":
            lengths = range(PROMPT_MULTIPLE, longest + PROMPT_MULTIPLE, PROMPT_MULTIPLE)
        required = set(self.robot.cameras) - set(self.robot.optional)
        cameras = {tuple(slot in some for slot in slots) for some in (self.robot.cameras, required)}
        known, guided = self.config.max_delay, self.config.max_delay + 1
        delays = (None, guided, *([known] if known else [])) if self._real_time else (None,)
        noise = np.zeros((1, *self._noise_shape), np.float32) if "flow" in self._modes else None
        several = np.zeros((1, self.choice.n, *self._noise_shape), np.float32)
        choice = replace(self.choice, gate=None if self.choice.gate is None else 0.0)  # all are drawn
        for present, length, delay in product(cameras, lengths, delays):
            inputs = blank_input(self.config.model, present, length, delay).to(self._device)
            self.run_model(inputs, noise)
            if choice.n > 1:
                self._draw(inputs, several, None, choice, [slice(0, self.config.model.action_horizon)])

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client may know: robot, model and sizes."""
        model = self.config.model
        return {
            "robot": self.robot.to_json(),
            "model": type(model).__name__,
            "action_horizon": model.action_horizon,
            "action_dim": self.robot.action_size,
            "control_hz": self.robot.control_hz,
            "image_size": model.vision.image_size,
            "step": self.config.step,
            "real_time": self._real_time,
            "modes": list(self._modes),
            "writes_text": self.config.model.writes_text,
            # How many control steps ago the older observations are that it remembers (`manipi/past`).
            "past_steps": list(self.config.model.past_steps),
            "max_delay": self.config.max_delay,
            # What holds where a request says nothing else; None: it draws no candidates.
            "candidates": asdict(self.choice) if self._heads["flow"] else None,
        }

    @property
    def _real_time(self) -> bool:
        """Whether it can go on from a previous chunk. π0-FAST cannot, and no gradient passes through 8 bits."""
        return "flow" in self._modes and self.model.guidable

    def reset(self) -> None:
        """Begin a new episode: the noise starts from the seed again."""
        self._generator = torch.Generator().manual_seed(self._seed)

    @property
    def _noise_shape(self) -> tuple[int, int]:
        return self.config.model.action_horizon, self.config.model.action_dim

    def draw_noise(self, seed: int | None = None) -> np.ndarray:
        """Standard normal noise [H, A of the model], the policy's next or that of a seed."""
        generator = self._generator if seed is None else torch.Generator().manual_seed(seed)
        return torch.randn(self._noise_shape, generator=generator).numpy()

    def noise_stream(self) -> Iterator[np.ndarray]:
        """Noise [H, A of the model] for an episode, without end: from the seed on, whoever else draws."""
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield torch.randn(self._noise_shape, generator=generator).numpy()

    def infer(self, observation: Observation, noise: np.ndarray | None = None) -> dict[str, Any]:
        """One observation in the robot's keys -> `actions` float32 [H, A], commands in the robot's own units.

        Args:
            observation: may also hold what `manipi.transforms.observation` lists.
            noise: [H, A of the model]; drawn from the policy's generator when None. With an axis before, [N, H, A], so
                many chunks [N, H, A] come out, which share the work on pictures and prompt. π0-FAST uses none.

        Raises:
            ObservationError: the observation does not match the robot; it names the key.
        """
        return self.infer_batch([observation], [noise])[0]

    def infer_batch(
        self, observations: Sequence[Observation], noises: Sequence[np.ndarray | None] | None = None
    ) -> list[dict[str, Any]]:
        """What `infer` answers to each, from one call of the model: equal up to rounding.

        Those that go on from a previous chunk are a batch of their own.

        Raises:
            ObservationError: for the first observation that does not match the robot, before the model is called.
                `encode` finds out which of them do.
        """
        started = time.perf_counter()
        return self.answer([self.encode(one) for one in observations], noises, started=started)

    def encode(self, observation: Observation) -> Encoded:
        """The model's input for one observation. Raises ObservationError where it does not match the robot."""
        model = self.config.model
        size = {"action_size": self.robot.action_size, "horizon": model.action_horizon}
        can = {"modes": self._modes, "writes_text": model.writes_text, "past": len(model.past_steps)}
        request = read_request(observation, **size, real_time=self._real_time, **can)
        if self._engine is not None and request.num_steps not in (None, self.config.num_steps):
            raise ObservationError(
                expected=f"{self.config.num_steps} integration steps, for which the engine was made",
                found=str(request.num_steps),
                where=f"observation key {NUM_STEPS!r}",
                next="serve without --compile, or with that --num-steps",
            )
        if request.choice or self.choice.n > 1:
            steps = request.num_steps or self.config.num_steps
            self._choice(request).check(self._selectors, **self._heads, num_steps=steps, error=ObservationError)
        if request.write_subtask:  # first the question: `answer` writes the text, and encodes once more
            return Encoded(*self.pipeline.encode({**request.asked, WRITE_SUBTASK: np.ones(1, bool)}), request)
        told = {"subtask": request.subtask} if request.subtask else {}
        return Encoded(*self.pipeline.encode({**request.asked, **told}), request)

    def answer(
        self,
        encoded: Sequence[Encoded],
        noises: Sequence[np.ndarray | None] | None = None,
        *,
        started: float | None = None,
    ) -> list[dict[str, Any]]:
        """The second half of `infer_batch`, for observations that `encode` let pass.

        Args:
            started: `time.perf_counter` at the beginning of what `infer_ms` measures; None: now.

        Raises:
            ConfigError: noises of different or wrong shapes.
        """
        started = time.perf_counter() if started is None else started
        noise = self._stack_noises(encoded, noises or [None] * len(encoded))
        chunks: dict[int, np.ndarray] = {}
        encoded, told = self._with_subtasks(encoded)
        # Those that the model reads in the same fields, integrates in as many steps, and draws as often are one batch.
        alike: dict[tuple[frozenset[str], int | None, Choice, Mode], list[int]] = {}
        for number, one in enumerate(encoded):
            key = frozenset(one.sample), one.request.num_steps, self._choice(one.request), one.request.mode
            alike.setdefault(key, []).append(number)
        for (_, num_steps, choice, mode), members in alike.items():
            inputs = self.model_input([encoded[i] for i in members])
            if mode == "tokens":
                outputs = self.run_model(inputs, None, draws=[self._draws(encoded[i].request) for i in members])
            else:
                assert noise is not None, "a flow policy draws noise"
                if choice.n > 1 and noise.ndim == 3:
                    chosen = self._chosen([encoded[i] for i in members], inputs, noise[members], num_steps, choice)
                    for i, (chunk, said) in zip(members, chosen, strict=True):
                        chunks[i], told[i]["candidates"] = chunk, said
                    continue
                outputs = self.run_model(inputs, noise[members], num_steps)
            for i, output in zip(members, outputs, strict=True):
                chunks[i] = self.pipeline.decode(output, encoded[i].seen)
        timing = {"infer_ms": (time.perf_counter() - started) * 1e3}
        return [{"actions": chunks[i], "policy_timing": dict(timing), **told[i]} for i in range(len(encoded))]

    def _with_subtasks(self, encoded: Sequence[Encoded]) -> tuple[list[Encoded], list[dict[str, Any]]]:
        """The subtasks that are to be written are, and the actions then follow them; and what the answers say of it.

        Where the text does not end, the client's last subtask stays, and the answer says why.

        Raises:
            TokenizerError: the text does not end, and there is no last one.
        """
        told: list[dict[str, Any]] = [
            {"subtask": one.request.subtask} if one.request.subtask else {} for one in encoded
        ]
        encoded, asking = list(encoded), [i for i, one in enumerate(encoded) if one.request.write_subtask]
        for i, text in zip(asking, self.write([encoded[i] for i in asking]) if asking else (), strict=True):
            request = encoded[i].request
            if isinstance(text, TokenizerError):
                if not request.subtask:
                    raise text
                told[i]["subtask_error"], text = str(text), request.subtask
            told[i]["subtask"] = text
            encoded[i] = Encoded(*self.pipeline.encode({**request.asked, "subtask": text}), request)
        return encoded, told

    @torch.no_grad()
    def write(self, questions: Sequence[Encoded]) -> list[str | TokenizerError]:
        """What the model writes behind each prompt, the likeliest tokens up to a newline.

        An error stands for a text that does not end within the prompt's room, or that has no words.
        """
        inputs, tokenizer = self.model_input(questions), self.tokenizers.text
        (*_, end), found = tokenizer.encode("\n"), list[str | TokenizerError]()
        room = min(MAX_TEXT, self.config.model.max_token_len - int(inputs.token_valid.sum(1).max()))
        ids_BT = self.model.decode_tokens(inputs, max(room, 1), eos_token=end).tolist()
        for ids in ids_BT:
            text = tokenizer.decode(ids[: ids.index(end)]).strip() if end in ids else ""
            found.append(text or self._no_text(ids, end, room))
        return found

    def _no_text(self, ids: Sequence[int], end: int, room: int) -> TokenizerError:
        return TokenizerError(
            expected=f"a text that ends within {room} tokens",
            found="no words" if end in ids else shown(self.tokenizers.text.decode(list(ids)), 100),
            where="what the model wrote behind its prompt",
            next="train it longer on text, or leave it room (max_token_len); the actions need no subtask",
        )

    def _choice(self, request: Request) -> Choice:
        return replace(self.choice, **request.choice)

    @property
    def _heads(self) -> dict[str, bool]:
        return {"flow": "flow" in self._modes, "tokens": self._constraint is not None}

    def _chosen(
        self, encoded: Sequence[Encoded], inputs: ModelInput, noise: np.ndarray, num_steps: int | None, choice: Choice
    ) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Of each observation the best of its candidates [H, A], and what the answer says of it."""
        horizon, size = self.config.model.action_horizon, self.robot.model_action_size
        samples = [one.sample for one in encoded]
        left = [one["actions"][one["action_valid"], :size] if "delay" in one else None for one in samples]
        given = [0 if some is None else min(int(one["delay"]), len(some)) for one, some in zip(samples, left)]
        rows = [executed_rows(horizon, first, choice.execute_steps) for first in given]
        noise_BNHA = np.stack([candidate_noises(one, choice.n) for one in noise])
        drawn_BNHA, bends = self._draw(inputs, noise_BNHA, num_steps, choice, rows)
        proposals: Sequence[np.ndarray | None] = [None] * len(encoded)
        if (choice.proposes or choice.rule == "token") and drawn_BNHA.shape[1] > 1:
            proposals = self.propose_tokens(encoded)
        for i, one in enumerate(encoded):
            gated = {} if bends is None else {"bend": float(bends[i])}
            n = choice.n if bends is None or bends[i] > choice.gate else 1
            if choice.proposes and n > 1:  # behind what is committed, which the token head does not know
                drawn_BNHA[i, -1, given[i] :, :size] = proposals[i][given[i] :]  # type: ignore[index] - see above
                drawn_BNHA[i, -1, : given[i], :size] = drawn_BNHA[i, 0, : given[i], :size]
            commands = self.pipeline.decode(drawn_BNHA[i, :n], one.seen)
            if n == 1:
                yield commands[0], {"n": 1, "chosen": 0, **gated}
                continue
            candidates = Candidates(
                observation={key: v for key, v in one.request.asked.items() if key not in CHUNK_KEYS},
                robot=self.robot,
                state=one.seen[1]["state"],
                actions=commands,
                normalised=drawn_BNHA[i, :, :, :size],
                executed=rows[i],
                previous=left[i],
                proposal=proposals[i],
            )
            best, said = choose(choice.selector, self._selectors[choice.rule], candidates)
            yield commands[best], {**said, **gated}

    def _draw(
        self, inputs: ModelInput, noise_BNHA: np.ndarray, num_steps: int | None, choice: Choice, rows: Sequence[slice]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Chunks [B, N or 1, H, A] on one prefix; and with a gate how much the paths of the first bend [B]."""
        if choice.gate is None:
            return self.run_model(inputs, noise_BNHA, num_steps), None
        executed_BH = torch.zeros(len(rows), noise_BNHA.shape[2], dtype=torch.bool)
        for executed_H, some in zip(executed_BH, rows, strict=True):
            executed_H[some] = True
        noise, steps = torch.from_numpy(noise_BNHA).to(self._device), num_steps or self.config.num_steps
        settings = (executed_BH.to(self._device), steps, self.config.max_delay)
        drawn_BNHA, bend_B = self.model.sample_gated(inputs, noise, choice.gate, *settings)
        return drawn_BNHA.float().cpu().numpy(), bend_B.cpu().numpy()

    def propose_tokens(self, encoded: Sequence[Encoded]) -> list[np.ndarray]:
        """What the token head writes for each, decoded greedily under its constraint: normalised actions [H, A]."""
        ids = self.run_model(self.model_input(encoded), None)
        return [self.pipeline.normalised(row, one.seen) for row, one in zip(ids, encoded, strict=True)]

    def model_input(self, encoded: Sequence[Encoded]) -> ModelInput:
        """The batch of these observations, on the model's device."""
        batch = {key: np.stack([np.asarray(one.sample[key]) for one in encoded]) for key in encoded[0].sample}
        return ModelInput.from_numpy(batch, self._device)

    def _stack_noises(self, encoded: Sequence[Encoded], noises: Sequence[np.ndarray | None]) -> np.ndarray | None:
        if "flow" not in self._modes:
            return None
        drawn = [
            self.draw_noise(one.request.seed) if noise is None else np.asarray(noise, np.float32)
            for one, noise in zip(encoded, noises, strict=True)
        ]
        shape, shapes = self._noise_shape, {n.shape for n in drawn}
        if len(shapes) > 1 or any(s[-2:] != shape or len(s) > 3 for s in shapes):
            raise ConfigError(
                expected=f"noise of shape {shape}, or (N, {shape[0]}, {shape[1]}) with one N for the whole batch",
                found=", ".join(map(str, sorted(shapes))),
                where="the noise of Policy.infer",
                next="draw it with Policy.draw_noise",
            )
        return np.stack(drawn)

    def _draws(self, request: Request) -> TokenDraws | None:
        """How an answer of π0-FAST is drawn; None where it is the likeliest."""
        temperature = self.temperature if request.temperature is None else request.temperature
        if not temperature:
            return None
        seed = request.seed
        if seed is None:
            seed = int(torch.randint(2**31, (), generator=self._generator))
        return TokenDraws(temperature, seed)

    @torch.no_grad()
    def run_model(
        self,
        inputs: ModelInput,
        noise: np.ndarray | None,
        num_steps: int | None = None,
        draws: Sequence[TokenDraws | None] | None = None,
    ) -> np.ndarray:
        """What the model answers to a batch, for `pipeline.decode`: chunks [B, (K,) H, A], or the ids of codes [B, T].

        Args:
            noise: [B, (K,) H, A of the model]; None: the actions are written as codes.
            num_steps: of the integration; None: the policy's own number.
            draws: of each row's codes; None: the likeliest.
        """
        if noise is None:
            model, constraint = self.config.model, self._constraint
            assert constraint is not None, "a policy that writes codes"
            longest, eos = (
                (model.max_token_len, None)
                if isinstance(model, Pi0FastConfig)
                else (
                    model.joint.max_code_len,  # type: ignore[union-attr] - who writes codes has it
                    self.tokenizers.text.eos_id,
                )
            )
            return self.model.decode_tokens(inputs, longest, constraint.allowed, draws, eos).cpu().numpy()
        noise_BKHA = torch.from_numpy(noise).to(self._device)
        answer = self.model.sample(inputs, noise_BKHA, num_steps or self.config.num_steps, self.config.max_delay)
        return answer.float().cpu().numpy()

    def set_sampling(
        self, *, num_steps: int | None = None, temperature: float | None = None, mode: Mode | None = None
    ) -> None:
        """Answer so from now on, where a request says nothing else. Call it before `compile` or `fuse`.

        Raises:
            ConfigError: integration steps of a policy that writes tokens, a temperature of one that does not, or a
                value beyond what a request may ask for.
        """
        expected, found = "", f"{num_steps}, {temperature}"
        if num_steps is not None and ("flow" not in self._modes or not 1 <= num_steps <= MAX_NUM_STEPS):
            expected = f"a flow policy, and from 1 to {MAX_NUM_STEPS} integration steps"
        elif temperature is not None and not ("tokens" in self._modes and 0 <= temperature <= 100):
            expected = "a policy that writes tokens, and a temperature from 0 to 100"
        elif mode not in (None, *self._modes):
            expected, found = f"a policy that acts by {mode}", f"one that acts by {' or '.join(self._modes)}"
        elif self._engine is not None:
            expected, found = "a policy without an engine, which is made for one number of steps", "one with an engine"
        if expected:
            where = f"the sampling of {type(self.config.model).__name__}"
            raise ConfigError(expected=expected, found=found, where=where, next="leave the flag out")
        self.config = replace(self.config, num_steps=num_steps or self.config.num_steps)
        self.temperature = self.temperature if temperature is None else temperature
        self._modes = tuple(sorted(self._modes, key=lambda one: one != mode))

    def set_candidates(self, choice: Choice, own: Selector | None = None) -> None:
        """Choose so from now on, where a request says nothing else. Call it before `compile`.

        Args:
            own: the selector that `choice` names, where it is none of `manipi.candidates.SELECTORS`; requests may name
                it too.

        Raises:
            ConfigError: the policy cannot choose so.
        """
        known = self._selectors | ({} if own is None else {choice.rule: own})
        choice.check(known, **self._heads, num_steps=self.config.num_steps, error=ConfigError)
        self.choice, self._selectors = choice, known

    def check(self, test: SelfTest, *, where: str) -> None:
        """Replay a recorded observation. Raises SelfTestError where other actions come out."""
        actions = self.infer(test.observation, test.noise)["actions"]
        scale = np.abs(self.norm_stats.actions.max - self.norm_stats.actions.min).max() / 2
        error = float(np.abs(actions - test.actions).max()) if actions.shape == test.actions.shape else np.inf
        tolerance = SELF_TEST_TOLERANCE[self.config.model.dtype] * max(scale, 1e-6)
        if not error <= tolerance:
            raise SelfTestError(
                expected=f"the trainer's action chunk within {tolerance:.2g}",
                found=f"a largest difference of {error:.3g}",
                where=where,
                next="run it with the manipi and torch versions that trained it; do not put it on a robot",
            )


@contextmanager
def _room_on(device: str, model: VLA) -> Iterator[None]:
    """Around what takes memory there for good. Raises ConfigError where there is too little."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 2**30
        raise ConfigError(
            expected=f"room for {weights:.2f} GiB of weights on {device}, and for what is computed with them",
            found=shown(str(error).splitlines()[0], 200),
            where=f"device {device}",
            next="end what else is on it (nvidia-smi), choose another --device, or keep matrices in 8 bits "
            "(manipi bench infer CHECKPOINT --quantize int8_weights --data DATASET)",
        ) from error


def self_test_for(policy: Policy, observation: Mapping[str, Any]) -> SelfTest:
    """Record what the policy answers to `observation` now."""
    noise = policy.draw_noise()
    return SelfTest(dict(observation), noise, policy.infer(observation, noise)["actions"])
