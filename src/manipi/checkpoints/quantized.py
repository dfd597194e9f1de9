"""What 8 bits cost a checkpoint's actions, measured on a dataset: `CHECKPOINT.KIND.json`, beside the folder.

It names the checkpoint by the hash of its manifest, which names every file: it belongs to those weights alone.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from manipi.checkpoints.native import MANIFEST
from manipi.errors import CheckpointError, quoted
from manipi.records import from_json, read_json, write_json

LARGEST_DIFFERENCE = 0.02
"""Of the travel, in the mean over dimensions: more, and a quantized policy is not served."""


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
