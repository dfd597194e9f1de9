"""How far a quantized policy's actions are from the plain one's, and both from what was recorded."""

from pathlib import Path

import numpy as np

from manipi.checkpoints.quantized import QuantizationReport, identity
from manipi.data.action_error import chunk_error, evenly_spaced, recorded_chunks, travel_of
from manipi.data.dimensions import command_names
from manipi.data.open import open_dataset
from manipi.evaluate.open_loop import infer_rows
from manipi.model.inference.quantize import Quantization
from manipi.policy import Policy
from manipi.train.data import check_features


def measure_quantization(
    checkpoint: Path, quantization: Quantization, data: str, *, frames: int, device: str = "cpu", show: bool = True
) -> QuantizationReport:
    """Both policies on so many frames, evenly spaced over a dataset, from the same noise.

    Raises:
        DataError: the dataset lacks what the policy's robot names, or cannot be read.
        ConfigError: the device has no such quantization.
    """
    policy, dataset = Policy.load(checkpoint, device=device), open_dataset(data)
    check_features(dataset, policy.robot)
    robot, every = policy.robot, np.arange(dataset.num_frames)
    rows = evenly_spaced(every, frames)
    recorded, valid = recorded_chunks(robot, dataset, rows, policy.config.model.action_horizon)
    plain = infer_rows(policy, dataset, rows, show=show)
    policy.fuse(quantization)
    quantized = infer_rows(policy, dataset, rows, show=show)
    travel = travel_of(robot, dataset, every)
    difference = chunk_error(quantized, plain, valid, travel)
    return QuantizationReport(
        quantization=quantization,
        checkpoint=identity(checkpoint),
        dataset=dataset.name,
        frames=len(rows),
        difference=difference.share_of_travel,
        per_dimension=dict(zip(command_names(robot, dataset), difference.per_dimension.tolist(), strict=True)),
        error=chunk_error(quantized, recorded, valid, travel).share_of_travel,
        plain_error=chunk_error(plain, recorded, valid, travel).share_of_travel,
    )
