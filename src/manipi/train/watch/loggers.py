"""Where a run's numbers and pictures go: `metrics.jsonl` always, TensorBoard and Weights & Biases where asked for.

The names are openpi's: loss, grad_norm, param_norm, learning_rate, time_per_step, and the picture camera_views.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from manipi.errors import ConfigError
from manipi.records import to_json
from manipi.storage import atomic_write
from manipi.train.config import LogConfig
from manipi.train.run.folder import Run


class Logger(Protocol):
    """One place beside `metrics.jsonl`."""

    def log(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, Path]) -> None: ...
    def close(self, *, failed: bool) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/` of the run.

    Args:
        start: the step that the run goes on from; what an earlier process wrote of later steps is hidden.
    """

    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def log(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        from PIL import Image

        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        for name, path in pictures.items():
            self._writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, whose id stays in `wandb_id.txt` of the folder, so that a resumed run goes on in it.

    Steps that a resumed run does again it ignores; they would be the same.
    """

    def __init__(self, run: Run, config: LogConfig):
        wandb = importlib.import_module("wandb")
        self._id, self._picture = run.folder / "wandb_id.txt", wandb.Image
        try:
            self._run = self._init(wandb, run, config)
        except wandb.Error as error:
            raise ConfigError(
                expected="a run of Weights & Biases",
                found=str(error).splitlines()[0],
                where="TrainConfig.log.wandb",
                next="wandb login, or --log.wandb offline",
            ) from error
        atomic_write(self._id, self._run.id.encode())

    def _init(self, wandb: Any, run: Run, config: LogConfig) -> Any:
        return wandb.init(
            project=config.wandb_project,
            name=run.folder.resolve().name,
            id=self._id.read_text().strip() if self._id.exists() else None,
            resume="allow",
            mode=config.wandb,
            dir=str(run.folder),
            config=to_json(run.config),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        self._run.log({**numbers, **{name: self._picture(str(path)) for name, path in pictures.items()}}, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def require_loggers(config: LogConfig) -> None:
    """Raises ConfigError, before a run does any work, where a logger's package is absent."""
    wanted = {"tensorboard": config.tensorboard, "wandb": config.wandb != "off"}
    for package in (name for name, wanted in wanted.items() if wanted and importlib.util.find_spec(name) is None):
        raise ConfigError(
            expected=f"the package {package}",
            found="it is not installed",
            where=f"TrainConfig.log.{package}",
            next=f"pip install 'manipi[{package}]', or train without it: metrics.jsonl has every number",
        )


class RunLog:
    """The one door for what a run has to say in numbers and pictures.

    Args:
        start: the step that the run goes on from.
        lead: False in every process of a run but one: nothing is written.
    """

    def __init__(self, run: Run, start: int, *, lead: bool = True):
        self._run, self.lead, self._loggers = run, lead, list[Logger]()
        config = run.config.log
        if lead and config.tensorboard:
            self._loggers.append(TensorBoard(run.folder / "tensorboard", start))
        if lead and config.wandb != "off":
            self._loggers.append(Wandb(run, config))

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for logger in self._loggers:
            logger.close(failed=error is not None)

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """One line of training: `metrics.jsonl` takes the whole record, loggers its numbers."""
        if self.lead:
            self._run.log({"step": step, **record})
            self.show(step, record)

    def show(self, step: int, record: Mapping[str, Any], pictures: Mapping[str, Path] | None = None) -> None:
        """What has a file of its own in the run's folder: for the loggers alone."""
        numbers = {name: float(value) for name, value in record.items() if isinstance(value, (int, float))}
        for logger in self._loggers:
            logger.log(step, numbers, pictures or {})
