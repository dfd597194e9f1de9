"""Our checkpoints in other projects' layouts, or as one `torch.export` program.

Beside weights in their layout are their norm stats, and a description that imports them back whole.

openpi-jax     params/ (Orbax), assets/<robot>/norm_stats.json
openpi-torch   model.safetensors, config.json, assets/…
lerobot        model.safetensors, config.json, policy_preprocessor.json and policy_postprocessor.json with norm stats
adapters       adapters.safetensors: the low-rank updates alone, and the hash of the weights that they belong to
manipi         our own, for merging adapters into the matrices
program        program.pt2    torch.export.load(…).module()(images, tokens, token_valid, state, noise) → actions
               contract.json  their names, shapes and dtypes; CONTRACT says which version of this agreement

The program, for those who run a policy without manipi, is the engine's `sample` for one observation, with all pictures
of the robot and the prompt padded to its full length. What stands before and after (resizing, normalisation, tokenizer)
is the pipeline's, and is not in it.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import torch
from torch import Tensor, nn

from manipi.checkpoints.initial import is_adapter, read_adapters, without_adapters, write_adapters
from manipi.checkpoints.native import Checkpoint, identity, read_checkpoint, write_description
from manipi.errors import CheckpointError, ConfigError
from manipi.exchange.certificate import Certificate, answer_of_foreign, answer_of_weights, certify, write_streamed
from manipi.exchange.lerobot import DESCRIPTION, policy_config, relative_settings, write_processors
from manipi.model import ModelInput
from manipi.model.config import GEMMA_2B, GEMMA_300M, ModelConfig, Pi0FastConfig
from manipi.model.inference.engine import Engine
from manipi.model.inputs import Kept
from manipi.policy import Policy
from manipi.records import write_json
from manipi.storage import atomic_directory, require_absent, require_room
from manipi.transforms.normalize import save_norm_stats
from manipi.weights.layouts import open_weights
from manipi.weights.names import LEROBOT, OPENPI_JAX, OPENPI_TORCH, arrays, stack_layer
from manipi.weights.stores import ArrayInfo, bytes_of, write_safetensors, write_tree

# Their PyTorch files name the tied embedding by the output matrix.
_LAYOUTS = {"openpi-jax": OPENPI_JAX} | {one.name: one.with_embedding(one.lm_head) for one in (OPENPI_TORCH, LEROBOT)}
_VARIANTS = {GEMMA_2B: "gemma_2b", GEMMA_300M: "gemma_300m"}
"""openpi has names for these sizes alone."""
CONTRACT = 1
"""Changes when names, shapes or meanings do."""

PROGRAM_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Between the program's and the policy's normalised actions, by compute dtype."""
Target: TypeAlias = Literal["openpi-jax", "openpi-torch", "lerobot", "adapters", "manipi"]


def export_checkpoint(
    folder: Path, to: Target, target: Path, *, dtype: torch.dtype | None = None, merge: bool = False
) -> Certificate:
    """Write the checkpoint in another layout; on any error nothing is left behind.

    Args:
        dtype: of the weights written; None keeps each tensor's own.
        merge: put adapters into the matrices first.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: the layout has no place for the policy or its adapters.
        SelfTestError: the policy answers otherwise than before.
        StorageError: `target` exists, or the disk is full.
    """
    checkpoint = read_checkpoint(folder)
    exported = without_adapters(checkpoint) if merge else checkpoint
    _require_place(exported.config.model, to, folder)
    if to == "lerobot":
        relative_settings(exported.robot)  # or nothing is computed first
    written = {name: ArrayInfo(tuple(w.shape), dtype or w.dtype) for name, w in exported.weights.items()}
    require_absent(target)
    if to != "openpi-jax":  # which is compressed, to a size that is not known before
        alone = {name: info for name, info in written.items() if to != "adapters" or is_adapter(name)}
        require_room(target, bytes_of(alone))
    before = answer_of_weights(checkpoint)
    with atomic_directory(target) as partial:
        if to == "adapters":
            write_adapters(partial, exported, dtype)
            after = answer_of_weights(read_adapters(partial, exported))
        elif to == "manipi":
            tensors = ((name, w.to(written[name].dtype)) for name, w in exported.weights.items())
            write_streamed(partial, exported, written, tensors)
            after = answer_of_weights(read_checkpoint(partial))
        else:
            _write_foreign(partial, exported, to, dtype)
            after = answer_of_foreign(open_weights(partial), exported)
        read = [w.dtype for w in checkpoint.weights.values()]
        return certify(str(folder), target, to, before, after, model=exported.config.model, read=read, written=written)


def _require_place(model: ModelConfig, to: Target, folder: Path) -> None:
    adapted = bool(model.vlm_adapters) or (not isinstance(model, Pi0FastConfig) and bool(model.action_adapters))
    if adapted and to in ("openpi-torch", "lerobot"):
        raise ConfigError(
            expected=f"plain weights: {to} has no place for low-rank adapters",
            found="a policy with adapters",
            where=str(folder),
            next="add --merge to put them into the matrices, or export --to openpi-jax or adapters",
        )
    if not adapted and to == "adapters":
        raise ConfigError(
            expected="a policy with low-rank adapters", found="none", where=str(folder), next="export it whole"
        )
    if model.past_steps and to in _LAYOUTS:
        raise ConfigError(
            expected=f"a policy that sees the present alone, which is all that code for {to} shows it",
            found=f"one that remembers what was {', '.join(map(str, model.past_steps))} steps ago",
            where=str(folder),
            next="export --to manipi, or serve it: manipi serve CHECKPOINT",
        )
    if isinstance(model, Pi0FastConfig) and to == "openpi-torch":
        raise ConfigError(
            expected="π0 or π0.5: openpi has no π0-FAST in PyTorch",
            found=type(model).__name__,
            where=str(folder),
            next="export --to openpi-jax or lerobot",
        )


def _write_foreign(folder: Path, checkpoint: Checkpoint, to: str, dtype: torch.dtype | None) -> None:
    """The weights in another project's layout, what it has beside them, and all that it cannot say."""
    model, weights, layout = checkpoint.config.model, checkpoint.weights, _LAYOUTS[to]
    tree = arrays(model, layout)
    infos = {path: ArrayInfo(a.shape, dtype or weights[a.names[0][0]].dtype) for path, a in tree.items()}

    def layers() -> Iterator[tuple[str, int | None, Tensor]]:
        for path, array in tree.items():
            for layer in range(len(array.names)):
                values = stack_layer(array, layer, weights)
                yield path, layer if len(array.names) > 1 else None, values.to(dtype or values.dtype)

    if layout.is_jax:
        if strange := {str(info.dtype).removeprefix("torch.") for info in infos.values()} - {"float32", "bfloat16"}:
            raise ConfigError(
                expected="weights in float32 or bfloat16, as openpi-jax has them",
                found=", ".join(sorted(strange)),
                where=str(folder),
                next="--dtype float32, or bfloat16",
            )
        (folder / "params").mkdir()
        write_tree(folder / "params", infos, layers())
    else:
        unused: dict[str, Tensor] = {}
        if not isinstance(model, Pi0FastConfig):
            # The action expert's own output matrix is never used, but openpi's loader asks for it.
            shape, like = (model.vocab_size, model.action_expert.width), weights["head.action_in.weight"]
            unused[layout.expert_lm_head] = torch.zeros((), dtype=dtype or like.dtype).expand(shape)
        infos |= {name: ArrayInfo(tuple(zeros.shape), zeros.dtype) for name, zeros in unused.items()}
        tensors = chain(((path, values) for path, _, values in layers()), unused.items())
        write_safetensors(folder / "model.safetensors", infos, tensors, {"format": "pt"})
    if to == "openpi-torch":
        assert not isinstance(model, Pi0FastConfig)
        config = {
            "action_dim": model.action_dim,
            "action_horizon": model.action_horizon,
            "paligemma_variant": _VARIANTS.get(model.vlm),
            "action_expert_variant": _VARIANTS.get(model.action_expert),
            "precision": str(infos[layout.expert_lm_head].dtype).removeprefix("torch."),
        }
        write_json(folder / "config.json", config)
    elif to == "lerobot":
        config = policy_config(checkpoint)
        write_json(folder / "config.json", config)
        write_processors(folder, checkpoint, config)
    assets = folder / "assets" / checkpoint.robot.name
    assets.mkdir(parents=True)
    save_norm_stats(checkpoint.norm_stats, assets / "norm_stats.json")
    (folder / DESCRIPTION).mkdir()
    write_description(folder / DESCRIPTION, checkpoint)


# ---- one program


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
    engine, inputs = policy.fuse(), policy.model_input([policy.encode(test.observation)])
    assert inputs.action_dim_valid is not None, "the pipeline says which dimensions the robot has"
    cameras = {slot: number for number, slot in enumerate(policy.config.model.cameras) if slot in policy.robot.cameras}
    slots = list(cameras.values())
    arguments = {
        "images": inputs.images[:, slots],
        "tokens": inputs.tokens,
        "token_valid": inputs.token_valid,
        "state": inputs.state,
        "noise": torch.from_numpy(test.noise)[None],
    }
    sampler = _Sampler(engine, slots, inputs.action_dim_valid.reshape(1, -1)).eval().requires_grad_(False)
    expected = policy.run_model(inputs, test.noise[None])
    program = torch.export.export(sampler, (), kwargs=arguments, strict=False)
    with atomic_directory(target) as folder:
        with (folder / "program.pt2").open("wb") as file:
            torch.export.save(program, kept := _Kept(file))  # type: ignore[arg-type]
            if kept.error is not None:
                raise kept.error
        found = torch.export.load(folder / "program.pt2").module()(**arguments)
        difference = float((found - torch.from_numpy(expected)).abs().max())
        limit = PROGRAM_TOLERANCE[getattr(torch, policy.config.model.dtype)]
        if not difference <= limit:
            raise CheckpointError(
                expected=f"a program that repeats the policy's actions within {limit:g}",
                found=f"a largest difference of {difference:.3g}",
                where=str(checkpoint),
                next="report it with the version of torch; nothing was written",
            )
        *described, actions = (
            {"name": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            for name, value in {**arguments, "actions": found}.items()
        )
        contract = {
            "contract": CONTRACT,
            "model": type(policy.config.model).__name__,
            "checkpoint": identity(checkpoint),
            "torch": torch.__version__,
            "num_steps": policy.config.num_steps,
            "cameras": list(cameras),
            "inputs": described,
            "outputs": [actions],
        }
        write_json(folder / "contract.json", contract)
    shapes = {one["name"]: f"{one['dtype']} {one['shape']}" for one in described}
    return ProgramReport(folder=str(target), inputs=shapes, difference=difference)
