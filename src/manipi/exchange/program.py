"""A checkpoint's model as one `torch.export` program, for those who run it without manipi.

    TARGET/
    ├─ program.pt2      torch.export.load(…).module()(images, tokens, token_valid, state, noise) → actions
    └─ contract.json    their names, shapes and dtypes; CONTRACT says which version of this agreement

It is the engine's `sample` for one observation, with all pictures of the robot and the prompt padded to its full
length. What stands before and after (resizing, normalisation, tokenizer) is the pipeline's, and is not in it.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from manipi.checkpoints.native import read_checkpoint
from manipi.checkpoints.quantized import identity
from manipi.errors import CheckpointError, ConfigError
from manipi.model import ModelInput
from manipi.model.config import Pi0FastConfig
from manipi.model.inference.engine import Engine
from manipi.model.inputs import Kept
from manipi.policy import Policy
from manipi.storage import atomic_directory, require_absent, require_room

CONTRACT = 1
"""Changes when names, shapes or meanings do."""

LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Between the program's and the policy's normalised actions, by compute dtype."""


@dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """What `export_program` wrote."""

    folder: str
    inputs: dict[str, str]
    """Name to dtype and shape."""
    difference: float
    """Largest between the loaded program's normalised actions and the policy's, for the self-test's observation."""

    def rows(self) -> list[tuple[str, str]]:
        """For a table."""
        named = [("program", self.folder), *self.inputs.items()]
        return [*named, ("largest difference to the policy", f"{self.difference:.2g}")]


class _Sampler(nn.Module):
    def __init__(self, engine: Engine, slots: Sequence[int], dim_valid: Tensor):
        super().__init__()
        self.engine, self._slots = engine, tuple(slots)
        self.register_buffer("dim_valid", dim_valid)

    def forward(self, images: Tensor, tokens: Tensor, token_valid: Tensor, state: Tensor, noise: Tensor) -> Tensor:
        pictures = dict(zip(self._slots, images.unbind(1), strict=True))
        absent, every = torch.zeros_like(images[:, 0]), range(len(self.engine.config.cameras))
        inputs = ModelInput(
            images=torch.stack([pictures.get(slot, absent) for slot in every], dim=1),
            image_valid=torch.tensor([[slot in pictures for slot in every]], device=images.device),
            tokens=tokens,
            token_valid=token_valid,
            state=state,
            action_dim_valid=self.get_buffer("dim_valid"),
        )
        kept = Kept(
            cameras=self._slots,
            pictures=self._slots,
            places=tuple(range(len(self._slots))),
            prompt_len=tokens.shape[1],
            one_block=True,
            all_valid=False,
        )
        return self.engine.run(inputs, kept, noise[:, None], self.engine.num_steps, None)[:, 0]


class _Kept(io.RawIOBase):
    """A file whose first error is kept for later: torch's writer ends the process when one comes through it."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            if self.error is None:
                self._file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def seek(self, *_: int) -> int:
        """It is rewound when all is written, for those who would read it."""
        return 0


def export_program(checkpoint: Path, target: Path) -> ProgramReport:
    """Write the program and its contract, after the written one repeated the policy's answer to the self-test.

    Raises:
        ConfigError: π0-FAST, whose decoding asks its tokenizer after every token.
        CheckpointError: the checkpoint cannot be trusted, or the program gives other actions.
        StorageError: `target` exists, or cannot be written.
    """
    policy, test = Policy.load(checkpoint), read_checkpoint(checkpoint).self_test
    if isinstance(policy.config.model, Pi0FastConfig):
        raise ConfigError(
            expected="a policy with a flow head: π0 or π0.5",
            found="π0-FAST, which asks its tokenizer what may follow after every token",
            where="manipi export --to program",
            next="serve it: manipi serve CHECKPOINT",
        )
    assert test is not None, "loading has replayed it"
    require_absent(target)
    require_room(target, sum(p.nbytes for p in policy.model.parameters()))
    policy.fuse()
    inputs = policy.model_input([policy.encode(test.observation)])
    arguments, sampler = _arguments(policy, inputs, torch.from_numpy(test.noise)[None])
    expected = policy.run_model(inputs, test.noise[None])
    program = torch.export.export(sampler, (), kwargs=arguments, strict=False)
    with atomic_directory(target) as folder:
        with (folder / "program.pt2").open("wb") as file:
            torch.export.save(program, kept := _Kept(file))  # type: ignore[arg-type]
            if kept.error is not None:
                raise kept.error
        found = torch.export.load(folder / "program.pt2").module()(**arguments)
        difference = float((found - torch.from_numpy(expected)).abs().max())
        _require_same(difference, policy, checkpoint)
        contract = _contract(policy, checkpoint, arguments, found)
        (folder / "contract.json").write_text(json.dumps(contract, indent=2, ensure_ascii=False) + "\n")
    shapes = {one["name"]: f"{one['dtype']} {one['shape']}" for one in contract["inputs"]}
    return ProgramReport(folder=str(target), inputs=shapes, difference=difference)


def _arguments(policy: Policy, inputs: ModelInput, noise: Tensor) -> tuple[dict[str, Tensor], nn.Module]:
    slots = [index for index, slot in enumerate(policy.config.model.cameras) if slot in policy.robot.cameras]
    dims, engine = inputs.action_dim_valid, policy.model
    assert isinstance(engine, Engine)
    assert dims is not None, "the pipeline says which dimensions the robot has"
    arguments = {
        "images": inputs.images[:, slots],
        "tokens": inputs.tokens,
        "token_valid": inputs.token_valid,
        "state": inputs.state,
        "noise": noise,
    }
    return arguments, _Sampler(engine, slots, dims.reshape(1, -1)).eval().requires_grad_(False)


def _contract(policy: Policy, checkpoint: Path, arguments: dict[str, Tensor], actions: Tensor) -> dict[str, Any]:
    def described(name: str, value: Tensor) -> dict[str, Any]:
        return {"name": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}

    slots = [slot for slot in policy.config.model.cameras if slot in policy.robot.cameras]
    return {
        "contract": CONTRACT,
        "model": type(policy.config.model).__name__,
        "checkpoint": identity(checkpoint),
        "torch": torch.__version__,
        "num_steps": policy.config.num_steps,
        "cameras": slots,
        "inputs": [described(name, value) for name, value in arguments.items()],
        "outputs": [described("actions", actions)],
    }


def _require_same(difference: float, policy: Policy, checkpoint: Path) -> None:
    limit = LARGEST_DIFFERENCE[getattr(torch, policy.config.model.dtype)]
    if not difference <= limit:
        raise CheckpointError(
            expected=f"a program that repeats the policy's actions within {limit:g}",
            found=f"a largest difference of {difference:.3g}",
            where=str(checkpoint),
            next="report it with the version of torch; nothing was written",
        )
