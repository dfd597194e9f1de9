"""Our checkpoint: a folder that is enough to serve, and nothing but data.

    checkpoint/
    ├─ model.safetensors    the weights for inference (the EMA weights when there are any)
    ├─ config.json          PolicyConfig: model, normalisation, sampling steps; FORMAT, the number of this layout
    ├─ robot.json           the robot it was trained for
    ├─ norm_stats.json      openpi's layout, plus provenance
    ├─ robots/NAME/         the same two files of every other robot that it was trained on
    ├─ tokenizer/           what the tokenizers need
    ├─ self_test.npz        one observation, its noise, and the action chunk that the trainer computed
    ├─ train_state/         optimizer and raw weights, where training may go on from here
    └─ manifest.json        SHA-256 of every file above

It appears by one rename or not at all, and reading it verifies every hash.

`CHECKPOINT.KIND.json` beside the folder says what 8 bits cost its actions, measured on a dataset. It names the
checkpoint by the hash of its manifest, which names every file: it belongs to those weights alone.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import manipi
from manipi.errors import CheckpointError, IntegrityError, quoted, shown
from manipi.model.config import CONFIG_TYPES, ModelConfig, NormMode
from manipi.records import from_json, read_json, read_object, to_json, write_json
from manipi.robots.robot import Robot
from manipi.storage import atomic_directory
from manipi.tokenizers import Tokenizers
from manipi.transforms.normalize import load_norm_stats, save_norm_stats
from manipi.types import NormStats, Sample
from manipi.weights.stores import ArrayInfo, write_safetensors

MANIFEST = "manifest.json"
LARGEST_DIFFERENCE = 0.02
"""Of the travel, in the mean over dimensions: more, and a quantized policy is not served."""
FORMAT = 2
"""Of the folder. 1 is what manipi 0.1.0 wrote: the same files, with no number in config.json."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What inference needs to know beside weights, robot and statistics."""

    model: ModelConfig
    norm_mode: NormMode
    num_steps: int = 10
    """Euler steps of the flow head (unused by π0-FAST)."""
    step: int
    """Optimizer steps behind these weights."""
    max_delay: int = 0
    """The most first steps of a chunk that were given in training (`TrainConfig.max_delay`)."""


@dataclass(frozen=True)
class SelfTest:
    """One observation in the robot's keys, the noise [H, A] used, and the commands [H, A] that must come out."""

    observation: Sample
    noise: np.ndarray
    actions: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that a checkpoint folder holds, training state apart."""

    weights: Mapping[str, Tensor]
    config: PolicyConfig
    robot: Robot
    norm_stats: NormStats
    tokenizers: Tokenizers
    self_test: SelfTest | None
    """None only while the trainer is still making it."""
    other_robots: Mapping[str, tuple[Robot, NormStats]] = field(default_factory=dict)
    """Those that the policy was trained on besides, by name."""


def write_checkpoint(
    target: Path, checkpoint: Checkpoint, write_train_state: Callable[[Path], None] | None = None
) -> None:
    """Write the folder in full, then give it its name.

    Args:
        write_train_state: called with the path of `train_state/`, before the manifest is made.

    Raises:
        StorageError: the disk is full, or `target` exists.
    """
    assert checkpoint.self_test is not None
    weights = checkpoint.weights
    with atomic_directory(target) as folder:
        infos = {name: ArrayInfo(tuple(w.shape), w.dtype) for name, w in weights.items()}
        write_safetensors(folder / "model.safetensors", infos, ((n, w.detach().cpu()) for n, w in weights.items()))
        write_description(folder, checkpoint)
        if write_train_state is not None:
            write_train_state(folder / "train_state")
        seal(folder)


def write_description(folder: Path, checkpoint: Checkpoint) -> None:
    """Everything but the weights, into an existing folder."""
    write_config(folder, checkpoint.config)
    _write_robot(folder, checkpoint.robot, checkpoint.norm_stats)
    for name, (robot, stats) in checkpoint.other_robots.items():
        _write_robot(folder / "robots" / name, robot, stats)
    (folder / "tokenizer").mkdir()
    checkpoint.tokenizers.save(folder / "tokenizer")
    if checkpoint.self_test is not None:
        test = checkpoint.self_test
        observation = {f"observation|{key}": np.asarray(value) for key, value in test.observation.items()}
        np.savez(folder / "self_test.npz", noise=test.noise, actions=test.actions, **observation)  # type: ignore[arg-type]


def write_config(folder: Path, config: PolicyConfig) -> None:
    """Write `config.json`, which says the format too."""
    write_json(folder / "config.json", {"format": FORMAT, **to_json(config)})


def read_config(folder: Path) -> PolicyConfig:
    """The inverse of `write_config`, and of what earlier versions wrote.

    Raises:
        CheckpointError: the format is newer than this version of manipi.
        ConfigError: not such a file.
    """
    where, data = str(folder / "config.json"), read_object(folder / "config.json")
    number = data.pop("format", 1)
    if number not in range(1, FORMAT + 1):
        raise CheckpointError(
            expected=f"a checkpoint of format 1 to {FORMAT}, which manipi {manipi.__version__} reads",
            found=f"format {shown(number)}",
            where=where,
            next="a newer manipi wrote it: pip install --upgrade manipi  # the checkpoint stays as it is",
        )
    return from_json(data, (PolicyConfig, *CONFIG_TYPES), where)


def _write_robot(folder: Path, robot: Robot, stats: NormStats) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "robot.json", robot)
    save_norm_stats(stats, folder / "norm_stats.json")


def _read_robot(folder: Path) -> tuple[Robot, NormStats]:
    path = folder / "robot.json"
    return Robot.from_json(read_json(path), str(path)), load_norm_stats(folder / "norm_stats.json")


def seal(folder: Path) -> None:
    """Write the manifest of what is in the folder."""
    write_json(folder / MANIFEST, {str(p.relative_to(folder)): _sha256(p) for p in _files(folder)})


def read_checkpoint(folder: Path) -> Checkpoint:
    """Raises CheckpointError where there is none, IntegrityError where a file is missing or altered."""
    verify(folder)
    described = read_description(folder)
    if described.self_test is None:
        raise IntegrityError(
            expected="a recorded answer, which loading replays",
            found="no self_test.npz",
            where=str(folder),
            next="write the checkpoint again; without it nothing shows that the policy is the one that was trained",
        )
    return replace(described, weights=load_file(folder / "model.safetensors"))


def read_description(folder: Path) -> Checkpoint:
    """What `write_description` wrote; the weights are empty."""
    config = read_config(folder)
    robot, stats = _read_robot(folder)
    return Checkpoint(
        weights={},
        config=config,
        robot=robot,
        norm_stats=stats,
        tokenizers=Tokenizers.load(folder / "tokenizer"),
        self_test=read_self_test(folder),
        other_robots={path.name: _read_robot(path) for path in sorted((folder / "robots").glob("*"))},
    )


def verify(folder: Path) -> None:
    """Compare every file with the manifest, both ways."""
    if not (folder / MANIFEST).is_file():
        names = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else ""
        raise CheckpointError(
            expected=f"a checkpoint folder (with a {MANIFEST})",
            found=f"only {names or 'an empty folder'}" if folder.is_dir() else "no such folder",
            where=str(folder),
            next="name a folder such as runs/NAME/checkpoints/STEP, or runs/NAME/best",
        )
    manifest = read_object(folder / MANIFEST)
    present = {str(p.relative_to(folder)) for p in _files(folder)} - {MANIFEST}
    for name in sorted(manifest.keys() | present):
        expected = manifest.get(name)
        if name not in present:
            found = "no such file"
        elif expected is None:
            found = "a file that the manifest does not name"
        elif (digest := _sha256(folder / name)) != expected:
            found = f"SHA-256 {digest[:16]}…"
        else:
            continue
        raise IntegrityError(
            expected=f"SHA-256 {str(expected)[:16]}…" if expected else "only the files of the manifest",
            found=found,
            where=str(folder / name),
            next="copy the checkpoint again, or take the one before it; an altered checkpoint is never loaded",
        )


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_self_test(folder: Path) -> SelfTest | None:
    """The recorded answer; None where there is none yet."""
    path = folder / "self_test.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as data:
        observation = {k.partition("|")[2]: data[k] for k in data.files if k.startswith("observation|")}
        return SelfTest(observation, data["noise"], data["actions"])


@dataclass(frozen=True, kw_only=True)
class CheckpointSummary:
    """A checkpoint at a glance; its hashes were verified."""

    folder: str
    num_files: int
    num_bytes: int
    config: PolicyConfig
    parameters: Mapping[str, int]
    """By part of the model."""
    robot: Robot
    norm_stats: NormStats
    tokenizers: Mapping[str, str]


def describe_checkpoint(folder: Path) -> CheckpointSummary:
    """What is in it. Weights are not loaded: their shapes stand in the file's header.

    Raises:
        CheckpointError: there is none. IntegrityError: a file is missing or altered.
    """
    verify(folder)
    described, files = read_description(folder), _files(folder)
    text, action = described.tokenizers.text, described.tokenizers.action
    tokenizers = {"text": f"{text.reference.kind}, {text.vocab_size:,} ids"}
    if action is not None:
        tokenizers["actions"] = f"{action.kind}, {action.vocab_size:,} codes"
    return CheckpointSummary(
        folder=str(folder),
        num_files=len(files),
        num_bytes=sum(path.stat().st_size for path in files),
        config=described.config,
        parameters=count_parameters(folder / "model.safetensors"),
        robot=described.robot,
        norm_stats=described.norm_stats,
        tokenizers=tokenizers,
    )


def count_parameters(weights: Path) -> dict[str, int]:
    """Numbers in a safetensors file by part: vision, token embedding, each expert of the transformer, head."""
    counts = Counter[str]()
    with safe_open(weights, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 (the file is no mapping)
            expert = re.search(r"\b(?:experts|final_norms)\.(\w+)\.", name)
            part = f"{expert.group(1)} expert" if expert else name.removeprefix("gemma.").partition(".")[0]
            counts[part.replace("_", " ")] += math.prod(file.get_slice(name).get_shape())
    return dict(counts)


# ---- what 8 bits cost


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """Action chunks of the quantized policy beside those of the plain one, from the same observations and noise."""

    quantization: str
    checkpoint: str
    """SHA-256 of its manifest."""
    dataset: str
    frames: int
    difference: float
    """Mean absolute difference between the two policies' commands, as a share of the travel."""
    per_dimension: dict[str, float]
    """The same in the robot's units, by dimension."""
    error: float
    """Mean absolute difference between the quantized policy's commands and the recorded ones, as a share of it."""
    plain_error: float
    """The plain policy's."""

    @property
    def holds(self) -> bool:
        return self.difference <= LARGEST_DIFFERENCE


def report_path(checkpoint: Path, quantization: str) -> Path:
    """Beside the folder: inside of it, it would be a file that the manifest does not name."""
    folder = Path(checkpoint).resolve()
    return folder.with_name(f"{folder.name}.{quantization}.json")


def identity(checkpoint: Path) -> str:
    """SHA-256 of the checkpoint's manifest."""
    return hashlib.sha256((Path(checkpoint) / MANIFEST).read_bytes()).hexdigest()


def write_report(checkpoint: Path, report: QuantizationReport) -> Path:
    """Write it to where `require_report` looks."""
    path = report_path(checkpoint, report.quantization)
    write_json(path, report)
    return path


def require_report(checkpoint: Path, quantization: str) -> QuantizationReport:
    """The report that lets the quantized checkpoint be served.

    Raises:
        CheckpointError: there is none, it is another checkpoint's, or its difference is too large.
    """
    path = report_path(checkpoint, quantization)
    if not path.is_file():
        raise _refusal(checkpoint, quantization, "no such file")
    report = from_json(read_json(path), (QuantizationReport,), str(path))
    if report.checkpoint != identity(checkpoint) or report.quantization != quantization:
        raise _refusal(checkpoint, quantization, f"one of {report.quantization} for {report.checkpoint[:12]}")
    if not report.holds:
        raise _refusal(checkpoint, quantization, f"a difference of {report.difference:.2%} of the travel")
    return report


def _refusal(checkpoint: Path, quantization: str, found: str) -> CheckpointError:
    return CheckpointError(
        expected=f"a report of this checkpoint's action error under {quantization}, at most {LARGEST_DIFFERENCE:.0%}",
        found=found,
        where=str(report_path(checkpoint, quantization)),
        next=f"manipi bench infer {quoted(checkpoint)} --quantize {quantization} --data DATASET"
        "  # or serve it as it is",
    )
