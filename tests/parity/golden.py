"""The recorded cases of the reference: folders of the shape that `golden/README.md` describes.

    <golden>/models/<any name>/     config.json, params.npz, inputs.npz, outputs*.npz, train_trace*.npz, ckpt_*/
    <golden>/{trees,tokenizer,wire,transforms,policy}/

Nothing of one case is written here or in the tests: sizes, cameras, adapters and settings are read from its files.
"""

import json
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openpi_trees import from_openpi_tree

from manipi.model import VLA, ModelInput
from manipi.model.config import (
    NO_ADAPTERS,
    REFERENCE,
    Adapters,
    GemmaSize,
    LoRA,
    ModelConfig,
    Pi0Config,
    Pi0FastConfig,
    Pi05Config,
    VisionSize,
)
from manipi.train.step.state import trainable_parameters
from manipi.weights.names import openpi_arrays

SHARED = Path(os.environ.get("MANIPI_SHARED", Path(__file__).parents[2].parent / "shared"))
GOLDENS = [Path(folder) for folder in os.environ.get("MANIPI_GOLDEN", str(SHARED / "golden")).split(":")]
assert "MANIPI_GOLDEN" not in os.environ or all(folder.is_dir() for folder in GOLDENS), f"no such folder in {GOLDENS}"
KINDS = {"pi0": Pi0Config, "pi05": Pi05Config, "pi0_fast": Pi0FastConfig}
ABSENT = f"no golden cases under {', '.join(map(str, GOLDENS))}; set MANIPI_SHARED or MANIPI_GOLDEN"

Arrays = dict[str, np.ndarray]


def find(pattern: str) -> list[Path]:
    """Every file or folder that matches, in all golden folders."""
    return [path for golden in GOLDENS for path in sorted(golden.glob(pattern))]


def name_of(path: Path) -> str:
    """A case id: the path within its golden folder, after that folder's name where there are several."""
    golden = next(golden for golden in GOLDENS if path.is_relative_to(golden))
    relative = path.relative_to(golden).with_suffix("").as_posix()
    return relative if len(GOLDENS) == 1 else f"{golden.parent.name}/{golden.name}/{relative}"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_arrays(path: Path) -> Arrays:
    with np.load(path) as file:
        return dict(file)


def keys_of(path: Path) -> list[str]:
    """The names in an `.npz`, without reading its arrays."""
    with np.load(path) as file:
        return list(file.files)


@dataclass(frozen=True)
class Case:
    """One model folder."""

    folder: Path

    @cached_property
    def recorded(self) -> dict[str, Any]:
        return read_json(self.folder / "config.json")

    @cached_property
    def inputs(self) -> Arrays:
        return read_arrays(self.folder / "inputs.npz")

    @cached_property
    def outputs(self) -> Arrays:
        return read_arrays(self.folder / "outputs.npz")

    @cached_property
    def params(self) -> Arrays:
        return read_arrays(self.folder / "params.npz")

    @cached_property
    def frozen(self) -> frozenset[str]:
        """Tree paths that the reference's own rule leaves untrained."""
        return frozenset(self.recorded["frozen_parameters_by_default_filter"])

    @cached_property
    def cameras(self) -> tuple[str, ...]:
        """In the order of their tokens, which the recorded prefix shows whatever order the names have."""
        names = [name.removeprefix("image/") for name in self.inputs if name.startswith("image/")]
        if not all(f"siglip/{name}" in self.outputs for name in names):
            return tuple(names)
        prefix = self.outputs["input_tokens" if "input_tokens" in self.outputs else "prefix_tokens"]
        slots = np.split(prefix[:, : len(names) * self.num_tokens], len(names), axis=1)
        tokens = {name: self.outputs[f"siglip/{name}"] for name in names}
        return tuple(sorted(names, key=lambda name: int(np.argmin([np.ptp(slot - tokens[name]) for slot in slots]))))

    @property
    def num_tokens(self) -> int:
        return self.outputs[next(name for name in self.outputs if name.startswith("siglip/"))].shape[1]

    @cached_property
    def config(self) -> ModelConfig:
        recorded, kind = self.recorded, self.recorded["kind"].removesuffix("_lora")
        assert kind in KINDS, f"{self.folder}: unknown kind {recorded['kind']!r}; known: {', '.join(KINDS)}"
        fields = {key: recorded[key] for key in ("vocab_size", "action_dim", "action_horizon", "max_token_len")}
        fields["vision"] = VisionSize(**{key: recorded["siglip"][key] for key in VisionSize.__dataclass_fields__})
        fields["vlm"] = GemmaSize(**recorded["vlm"])
        fields["vlm_adapters"] = read_adapters(recorded["lora"], "vlm")
        if recorded["action_expert"] is not None:
            fields["action_expert"] = GemmaSize(**recorded["action_expert"])
            fields["action_adapters"] = read_adapters(recorded["lora"], "action_expert")
        if "eos_token" in recorded:
            fields["eos_token"] = recorded["eos_token"]
        return KINDS[kind](**fields, cameras=self.cameras, dtype="float32", compat=REFERENCE)

    def model(self, **changes: Any) -> VLA:
        """The model with the recorded weights, after changes of its config that leave the weights' shapes alone."""
        model = VLA(replace(self.config, **changes))
        model.load_state_dict(from_openpi_tree(self.params, self.config))
        return model

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.inputs[name])

    def batch(self, prefix: str = "", *, masks: str = "") -> ModelInput:
        """The recorded batch.

        Args:
            prefix: of the prompt's names, such as `decode/`.
            masks: of the camera masks that replace the usual ones, such as `masked_image/`.
        """
        names = {"tokens": "tokenized_prompt", "token_valid": "tokenized_prompt_mask"}
        names |= {"token_causal": "token_ar_mask", "token_loss": "token_loss_mask"}
        arrays = {ours: self.inputs[prefix + name] for ours, name in names.items() if prefix + name in self.inputs}
        # Of a state wider than the actions, which no network reads, our pipeline hands on no more than that.
        arrays |= {"state": self.inputs["state"][:, : self.config.action_dim], "actions": self.inputs["actions"]}
        valid = {name: self.inputs[f"image_mask/{name}"] for name in self.cameras}
        valid |= {name: self.inputs[key] for name in valid if (key := f"{masks}image_mask/{name}") in self.inputs}
        arrays["images"] = np.stack([self.inputs[f"image/{name}"] for name in self.cameras], axis=1)
        arrays["image_valid"] = np.stack(list(valid.values()), axis=1)
        return ModelInput.from_numpy(arrays)


def read_adapters(lora: dict[str, Any] | None, expert: str) -> Adapters:
    """`{"attn": {rank, alpha} or null, "ffn": …}` of one expert; `rslora` stands beside the experts."""
    entries = (lora or {}).get(expert) or {}
    assert entries.keys() <= {"attn", "ffn"}, f"unknown adapters of {expert}: {sorted(entries)}"

    def read(entry: dict[str, Any] | None) -> LoRA | None:
        if not entry:
            return None
        stabilized = entry.get("rslora", (lora or {}).get("rslora", False))
        return LoRA(rank=entry["rank"], alpha=entry["alpha"], rank_stabilized=stabilized)

    return Adapters(attention=read(entries.get("attn")), feed_forward=read(entries.get("ffn")))


CASES = [Case(path.parent) for path in find("models/*/config.json")]


def keys(cases: list[Case], files: str, skip: str = "(?!)") -> list[Any]:
    """Parameters `(case, file, key)` of a test: every array of the files that match, unless its name matches `skip`."""
    found = [(case, path) for case in cases for path in sorted(case.folder.glob(files))]
    return [(case, path, key) for case, path in found for key in keys_of(path) if not re.fullmatch(skip, key)]


def over(*arguments: str, values: list[Any]) -> pytest.MarkDecorator:
    """`parametrize`, with ids that name case, file and key."""

    def name(value: object) -> str:
        return name_of(value.folder) if isinstance(value, Case) else getattr(value, "stem", str(value))

    return pytest.mark.parametrize(arguments if len(arguments) > 1 else arguments[0], values, ids=name)


def change_adapters(config: ModelConfig, change: Callable[[Adapters], Adapters]) -> ModelConfig:
    """The config with the adapters of all its experts changed."""
    names = [name for name in ("vlm_adapters", "action_adapters") if hasattr(config, name)]
    return replace(config, **{name: change(getattr(config, name)) for name in names})


def require_frozen(config: ModelConfig, recorded: Collection[str]) -> None:
    """Asserts that training leaves alone what the reference does, of the arrays that the loss can reach at all."""
    with torch.device("meta"):
        reached = trainable_parameters(VLA(change_adapters(config, lambda _: NO_ADAPTERS)), "full")
        trained = trainable_parameters(VLA(config), "lora")
    names = {path: {n for layer in array.names for n in layer} for path, array in openpi_arrays(config).items()}
    assert set(recorded) <= names.keys()
    frozen = {path for path, ours in names.items() if ours & reached.keys() and not ours & trained.keys()}
    assert frozen == {path for path in recorded if names[path] & reached.keys()}
