"""What a run tells while it goes: a progress bar, a line of its log, and the loss curve as a picture.

`metrics.jsonl` has every line; TensorBoard and Weights & Biases get the same where asked for. Names are openpi's: loss,
grad_norm, param_norm, learning_rate, time_per_step, and the picture camera_views.

MFU is how much arithmetic a step needs as a share of how much the device could do in that time. Model FLOPs (PaLM,
Chowdhery et al. 2022, appendix B): two for each multiply-add of a matrix product, forward and backward, on tokens that
are real; nothing for what is computed a second time, for padding, or for masks.

    part      rows per sample                     matrix products on each row
    vision    real pictures × patches             forward 1
    vlm       real image and prompt tokens        gradient of the weights 1, where these are trained
    action    state and K × H noisy actions       gradient of the input 1, where anything before it is trained
    draws     K timesteps
    prompt    π0-FAST's last layer: prompt tokens
    vocab     loss tokens of π0-FAST

Attention adds 4 · width · queries · keys per layer, and twice that backward.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from manipi.data.feed.loader import Batch
from manipi.errors import ConfigError
from manipi.model import VLA
from manipi.model.config import Pi0Config, Pi0FastConfig
from manipi.model.layers import AdaptedLinear, Linear
from manipi.records import to_json
from manipi.storage import atomic_write
from manipi.train.config import LogConfig
from manipi.train.run.folder import Run
from manipi.train.step.state import TrainState

if TYPE_CHECKING:
    from manipi.data.feed.mixture import Share

# Where numbers and pictures go ----------------------------------------------------------------------------------------


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
            self._run = wandb.init(
                project=config.wandb_project,
                name=run.folder.resolve().name,
                id=self._id.read_text().strip() if self._id.exists() else None,
                resume="allow",
                mode=config.wandb,
                dir=str(run.folder),
                config=to_json(run.config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(
                expected="a run of Weights & Biases",
                found=str(error).splitlines()[0],
                where="TrainConfig.log.wandb",
                next="wandb login, or --log.wandb offline",
            ) from error
        atomic_write(self._id, self._run.id.encode())

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


class RunLog(AbstractContextManager):
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


# What a log line says -------------------------------------------------------------------------------------------------


OF_THE_MACHINE = frozenset(
    ("time", "time_per_step", "samples_per_s", "data_wait", "data_wait_p95", "mfu", "peak_memory_gb")
)
"""What a log line says about this machine at this hour; the rest is the same whenever the run is repeated."""

Window: TypeAlias = Sequence[Mapping[str, Tensor | float]]
"""Metrics of consecutive steps."""


class ProgressLog(AbstractContextManager):
    """Averages the steps between two log lines; reads numbers off the device only when it writes one."""

    def __init__(
        self, log: RunLog, start: int, end: int, *, batch_size: int, every: int, show: bool, window: Window = ()
    ):
        self._log, self._every, self._batch_size = log, every, batch_size
        self._bar = tqdm(total=end, initial=start, desc="train", unit="step", disable=not show, smoothing=0.05)
        self._flops, self._peak, self._device = None, None, torch.device("cpu")
        self._begin_window()
        self._window.extend(window)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    @property
    def window(self) -> list[dict[str, float]]:
        """The steps since the last line. A checkpoint keeps them, so that a resumed run's next line is of all of its
        steps."""
        return [{name: float(value) for name, value in metrics.items()} for metrics in self._window]

    def measure(self, state: TrainState, noise_draws: int) -> None:
        """From now on say how much of the device's arithmetic the model uses, where its peak is known."""
        self._device = next(state.model.parameters()).device
        self._flops = ModelFlops(state.model, noise_draws)
        self._peak = peak_flops(self._device, state.model.dtype)
        if self._peak is None and not self._bar.disable:
            name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type
            tqdm.write(f"no MFU in the log: the peak of {name} in {state.model.dtype} is not known")
        self._started = time.perf_counter()

    def record(
        self,
        step: int,
        metrics: Mapping[str, Tensor | float],
        wait: float,
        batch: Batch | None = None,
        spike: Mapping[str, Any] | None = None,
    ) -> None:
        """Count one step.

        Args:
            wait: the time in seconds that it waited for data.
            batch: what it trained on.
            spike: what `Guards.spike` says of it.
        """
        self._window.append(metrics)
        self._waits.append(wait)
        self._spikes += [spike] if spike else []
        self._work += self._flops.of_batch(batch) if self._flops and batch else 0
        self._bar.update()
        if step % self._every == 0 or step == self._bar.total:
            self._write(step)

    def _write(self, step: int) -> None:
        count = len(self._window)
        means = {name: sum(float(m[name]) for m in self._window) / count for name in self._window[0]}
        # A joint loss's gradients are measured term by term at this step alone.
        means = {**means, **{name: float(value) for name, value in self._window[-1].items() if name not in means}}
        # Only now has the device done all of it.
        seconds, here = time.perf_counter() - self._started, len(self._waits)
        speed = {"samples_per_s": here * self._batch_size / seconds, "time_per_step": seconds / here}
        use = {"mfu": self._work / seconds / self._peak} if self._peak else {}
        use["peak_memory_gb"] = peak_memory(self._device) / 1e9
        waits = data_wait(self._waits, seconds)
        spikes = {"spikes": self._spikes} if self._spikes else {}
        self._log.log(step, {**means, **speed, **use, **waits, **spikes, "time": time.time()})
        said = f"loss {means['loss']:.4f}, {speed['samples_per_s']:.0f} samples/s"
        said += f", MFU {use['mfu']:.0%}" if "mfu" in use else ""
        wait = f"data wait {waits['data_wait']:.0%}, p95 {1e3 * waits['data_wait_p95']:.0f} ms"
        self._bar.set_postfix_str(f"{said}, {use['peak_memory_gb']:.1f} GB, {wait}")
        self._begin_window()

    def _begin_window(self) -> None:
        self._started, self._waits, self._work = time.perf_counter(), list[float](), 0.0
        self._window, self._spikes = list[Mapping[str, Tensor | float]](), list[Mapping[str, Any]]()


def peak_memory(device: torch.device) -> int:
    """The most bytes that were ever in use: of the GPU by torch, else of this process in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def data_wait(waits: Sequence[float], seconds: float) -> dict[str, float]:
    """Share of the time that steps waited for data, and the wait in seconds that one step in twenty exceeds."""
    return {"data_wait": sum(waits) / seconds, "data_wait_p95": float(np.percentile(waits, 95))}


def show_mixture(shares: Sequence[Share]) -> None:
    """What the run sees of each dataset, one line per set."""
    width = max(len(one.dataset) for one in shares)
    tqdm.write(f"{'dataset':<{width}}  share  epochs   episodes       frames  held out  left out  robot")
    for one in shares:
        numbers = f"{one.episodes:>9,} {one.frames:>12,} {one.held_out:>9,} {one.left_out:>9,}"
        tqdm.write(f"{one.dataset:<{width}} {one.share:6.1%} {one.epochs:7.2f}  {numbers}  {one.robot}")


def plot_loss(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The loss and the learning rate over the steps, as a PNG."""
    with figure(path, figsize=(7, 3.5)) as drawing:
        axis = drawing.subplots()
        metrics = [m for m in metrics if "learning_rate" in m]
        steps = [m["step"] for m in metrics]
        axis.plot(steps, [m["loss"] for m in metrics], color="#0b6e99", linewidth=1.5)
        axis.set(xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.25, which="both")
        rate = axis.twinx()
        rate.plot(steps, [m["learning_rate"] for m in metrics], color="#c46a1b", linewidth=1, linestyle=":")
        rate.set_ylabel("learning rate (dotted)", color="#c46a1b")


@contextmanager
def figure(path: Path, figsize: tuple[float, float]) -> Iterator[Any]:
    """A figure of matplotlib, which is a PNG once the block has drawn it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=figsize, dpi=110, layout="constrained")
    yield drawing
    buffer = io.BytesIO()
    FigureCanvasAgg(drawing).print_png(buffer)
    atomic_write(path, buffer.getvalue())


# How much arithmetic a step needs -------------------------------------------------------------------------------------


PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""FLOP/s of dense bfloat16 matrix products with float32 sums, by the name of the GPU: NVIDIA's data sheets."""

_UPSTREAM = {"vision": (), "past_state": (), "vlm": ("vision", "past_state"), "head": (), "action": ("head", "vlm")}
_READS_DATA = ("vision.patch_embedding", "past_state", "head.action_in", "head.state_in")


class ModelFlops:
    """Walks through a model's matrices once; a batch then costs a few sums.

    Args:
        model: as it will be trained: what is frozen does not require gradients.
        noise_draws: K.
    """

    def __init__(self, model: VLA, noise_draws: int):
        self._config, self._draws = model.config, noise_draws
        self._flow = not isinstance(model.config, Pi0FastConfig)
        self._learns = dict.fromkeys(_UPSTREAM, False)
        self._per_row = Counter[str]()
        self._with_past = (max(model.vision.temporal) + 1) / len(model.vision.blocks)
        for name, module in model.named_modules():
            self._visit(name, module)
        if self._config.writes:
            table, codes = model.gemma.token_embedding, self._config.fixed_codes
            rows = table.shape[0] if codes is None else codes.end_id - codes.first_id
            self._per_row["vocab"] = 2 * rows * table.shape[1] * (2 + table.requires_grad)

    def of_batch(self, batch: Batch) -> float:
        """Model FLOPs of one update on this batch."""
        rows = self._rows(batch)
        return float(sum(self._per_row[part] * count.sum() for part, count in rows.items()) + self._attention(rows))

    def _visit(self, name: str, module: nn.Module) -> None:
        part = _part(name)
        if isinstance(module, Linear):
            first = name in _READS_DATA or (name == "head.time_mlp_in" and not isinstance(self._config, Pi0Config))
            needed = not first and any(self._learns[p] for p in (part, *_UPSTREAM[part]))
            for size, trained in _matrices(module):
                self._per_row[self._rows_of(name, part)] += 2 * size * (1 + trained + needed)
        if part:
            self._learns[part] |= any(p.requires_grad for p in module.parameters(recurse=False))

    def _is_read_out(self, name: str) -> bool:
        """Whether it makes the language model's outputs: its last layer, but for what others read, keys and values."""
        last = f"gemma.blocks.{self._config.vlm.depth - 1}.experts.vlm."
        return name.startswith(last) and not name.endswith((".k_proj", ".v_proj"))

    def _rows_of(self, name: str, part: str) -> str:
        if self._is_read_out(name):
            return "prompt" if self._config.writes else "none"
        if name.endswith("modulation") or (name.startswith("head.time") and not isinstance(self._config, Pi0Config)):
            return "draws"
        if part == "head":
            return "state" if name.endswith("state_in") else "noisy"
        return part

    def _rows(self, batch: Batch) -> dict[str, np.ndarray]:
        """Per part the rows of each sample [B]."""
        pictures, prompt = batch["image_valid"].sum(1), batch["token_valid"].sum(1)
        image_tokens = pictures * self._config.vision.num_tokens
        if isinstance(self._config, Pi0FastConfig):
            # The last slot predicts nothing and is left out.
            prompt = np.minimum(prompt, batch["token_valid"].shape[1] - 1)
            learned, codes = batch["token_loss"][:, 1:], self._config.fixed_codes
            if codes is not None:
                learned = learned & (batch["tokens"][:, 1:] >= codes.first_id) & (batch["tokens"][:, 1:] < codes.end_id)
            read = {"prompt": prompt, "vocab": learned.sum(1)}
            return {"vision": image_tokens, "vlm": image_tokens + prompt, **read}
        past = batch["past_valid"].sum(1) if self._config.past_steps else 0 * prompt
        tokens, states = image_tokens + prompt, past if self._config.past_tokens else 0 * past
        ones, noisy = np.ones_like(prompt), np.full_like(prompt, self._draws * self._config.action_horizon)
        state = ones * isinstance(self._config, Pi0Config)
        suffix = {"action": noisy + state, "noisy": noisy, "state": state, "draws": ones * self._draws}
        if self._config.writes:
            text, codes = (batch[name].sum(1) if name in batch else 0 * ones for name in ("token_loss", "code_valid"))
            read = np.maximum(codes - 1, 0)  # the last one predicts nothing
            prompt, tokens, suffix = (
                prompt + read,
                tokens + read,
                {**suffix, "prompt": prompt + read, "vocab": text + codes},
            )
        # Older pictures leave the image encoder behind its last temporal block.
        pictures = image_tokens * (1 + self._with_past * past)
        return {"vision": pictures, "vlm": tokens + states, "past_state": states, **suffix}

    def _attention(self, rows: dict[str, np.ndarray]) -> float:
        vision, vlm = self._config.vision, self._config.vlm
        width, prefix = vlm.num_heads * vlm.head_dim, rows["vlm"].astype(float)
        passes = {part: 3 if self._learns[part] or self._learns["vision"] else 1 for part in ("vision", "vlm")}
        total = vision.depth * vision.width * passes["vision"] * (rows["vision"] * vision.num_tokens).sum()
        read_out = rows["prompt"] if self._config.writes else 0
        total += width * passes["vlm"] * (((vlm.depth - 1) * prefix + read_out) * prefix).sum()
        if self._flow:
            total += vlm.depth * width * 3 * (rows["action"] * (prefix + rows["action"])).sum()
        return 4 * total


def _part(name: str) -> str:
    if expert := re.search(r"gemma\.(?:blocks\.\d+\.experts|final_norms)\.(\w+)", name):
        return expert[1]
    top = name.partition(".")[0]
    return "vlm" if top == "gemma" else top


def _matrices(layer: Linear) -> Iterator[tuple[int, bool]]:
    """Multiply-adds per row of each matrix of a layer, and whether it is trained."""
    weight = getattr(layer, "weight", None)  # in 4 bits there is none
    yield layer.in_features * layer.out_features, weight is not None and weight.requires_grad
    if isinstance(layer, AdaptedLinear):
        yield layer.lora_a.numel(), layer.lora_a.requires_grad
        shared = 1 if layer.per_head else layer.num_heads
        yield layer.lora_b.numel() // shared, layer.lora_b.requires_grad


# The device ----------------------------------------------------------------------------------------------------------


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of matrix products: a GPU's by `PEAKS`, a processor's as measured here. None where it is not known."""
    if device.type == "cpu":
        return _measured_peak(dtype, torch.get_num_threads())
    is_listed = device.type == "cuda" and dtype == torch.bfloat16
    return listed_peak(torch.cuda.get_device_name(device)) if is_listed else None


def listed_peak(name: str) -> float | None:
    """`NVIDIA A100-SXM4-80GB` is an A100; an A10G and a laptop's RTX 4090 are other chips."""
    found = [key for key in PEAKS if re.search(rf"\b{key}\b", name)] if "Laptop" not in name else []
    return PEAKS[max(found, key=len)] if found else None


@lru_cache
def _measured_peak(dtype: torch.dtype, num_threads: int) -> float:
    """The best of a few products of square matrices, in about a tenth of a second."""
    n, seconds = 512, []
    a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
    for _ in range(4):
        began = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)
