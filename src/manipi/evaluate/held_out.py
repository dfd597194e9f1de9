"""Which rows a policy has not seen: the split of its run, or a new one that the user asks for."""

from dataclasses import dataclass, replace
from pathlib import Path

from jaxtyping import Int64
from numpy import ndarray

from manipi.data.dataset import Dataset
from manipi.data.feed.sampler import split_episodes
from manipi.data.open import open_dataset
from manipi.errors import ConfigError, MissingFeatureError
from manipi.policy import Policy
from manipi.train.data import check_features, open_demonstrations, provenance_of
from manipi.train.run.folder import read_config


@dataclass(frozen=True, kw_only=True)
class Split:
    """A dataset, and on which side of the split each of its rows is."""

    dataset: Dataset
    train_rows: Int64[ndarray, "T"]
    held_out_rows: Int64[ndarray, "E"]
    origin: str
    """Whose split it is, in words."""


def run_folder(checkpoint: Path) -> Path | None:
    """runs/NAME of runs/NAME/checkpoints/STEP, when the checkpoint is still in its run."""
    folder = Path(checkpoint).resolve()
    run = folder.parent.parent
    return run if folder.parent.name == "checkpoints" and (run / "config.json").is_file() else None


def open_split(checkpoint: Path, policy: Policy, data: str | None) -> Split:
    """The split that the policy was trained with; of a mixture, that of its robot's first dataset.

    Args:
        data: where the dataset is now; None: where it was in training.

    Raises:
        ConfigError: the checkpoint stands apart from its run, the data are not those that it was trained on, or the
            run held no episodes out.
        DataError: the dataset is absent or broken.
    """
    run = run_folder(checkpoint)
    if run is None:
        raise _no_split("a checkpoint in its run's folder, runs/NAME/checkpoints/STEP", "no config.json", checkpoint)
    config = read_config(run)
    if not config.data.holdout:
        raise _no_split("a run with held-out episodes", "data.holdout 0: it trained on all of them", run)
    if data:
        config = replace(config, data=replace(config.data, path=data))
    trained_on = (policy.norm_stats.data, policy.norm_stats.rows)
    try:
        mine = [one for one in open_demonstrations(config) if one.robot.name == config.robot.name]
    except MissingFeatureError as error:
        raise _no_split(
            "the data that the policy was trained on", f"data without {error.expected}", error.where
        ) from error
    if (found := provenance_of(mine)) != trained_on:
        raise _no_split(
            f"the data that the policy was trained on ({trained_on[0][:12]}, frames {trained_on[1][:12]})",
            f"other data ({found[0][:12]}, frames {found[1][:12]})",
            mine[0].dataset.root,
        )
    origin = f"the run's own (holdout {config.data.holdout:g})"
    first = mine[0]
    return Split(dataset=first.dataset, train_rows=first.rows, held_out_rows=first.held_out, origin=origin)


def new_split(policy: Policy, data: str, *, holdout: float, seed: int) -> Split:
    """A split made now, for data that the policy was not trained on, or a checkpoint apart from its run."""
    origin = f"made now (holdout {holdout:g}, seed {seed}): the policy may have been trained on any of these episodes"
    return _split(open_dataset(data), policy, holdout, seed, origin)


def _split(dataset: Dataset, policy: Policy, holdout: float, seed: int, origin: str) -> Split:
    check_features(dataset, policy.robot)
    train, held_out = split_episodes(dataset, holdout=holdout, seed=seed)
    return Split(dataset=dataset, train_rows=train, held_out_rows=held_out, origin=origin)


def _no_split(expected: str, found: str, where: Path | str) -> ConfigError:
    return ConfigError(
        expected=expected,
        found=found,
        where=str(where),
        next="--data PATH --holdout 0.2 --seed 0  # splits the data anew; baselines know of the other 80 % only",
    )
