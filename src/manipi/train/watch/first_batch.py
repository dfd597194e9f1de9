"""What the model is about to be trained on, for people to look at: the first batch of a run, in three files.

first_batch/
├─ cameras.png      every camera of up to eight samples, with their instructions; absent cameras are crossed out
├─ batch.txt        where each token stands and what it says; ranges of states and actions, dimension by dimension
└─ pipeline.json    the first sample behind every step of the pipeline
"""

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from manipi.data.feed.loader import Batch
from manipi.data.feed.mixture import Mixture
from manipi.model.config import ModelConfig, Pi0FastConfig
from manipi.records import json_bytes
from manipi.storage import atomic_directory
from manipi.tokenizers.text import TextTokenizer
from manipi.train.data import TrainingData
from manipi.transforms.pipeline import observation_of, token_layout, trace

SHOWN = 8
"""Samples in the picture and in the token layout."""


def save_first_batch(folder: Path, batch: Batch, rows: np.ndarray, data: TrainingData) -> Path:
    """Write the folder anew. Returns the picture.

    Args:
        batch: encoded, as the model gets it.
        rows: of the run's mixture, one per sample.
    """
    shutil.rmtree(folder, ignore_errors=True)
    captions = [_caption(data.mixture, row) for row in rows[:SHOWN].tolist()]
    with atomic_directory(folder) as partial:
        draw_cameras(batch, data.config.model.cameras, captions).save(partial / "cameras.png")
        (partial / "batch.txt").write_text("\n".join(_describe(batch, captions, data)) + "\n", encoding="utf-8")
        part, row = data.mixture.part_of(int(rows[0]))
        pipeline, (frame,) = part.source.pipeline, part.source.frames(np.array([row]))
        stages = trace(pipeline, observation_of(frame, pipeline.robot))
        described = {"sample": captions[0][0], "robot": pipeline.robot, "stages": stages}
        (partial / "pipeline.json").write_bytes(json_bytes(described))
    return folder / "cameras.png"


def _caption(mixture: Mixture, row: int) -> tuple[str, str]:
    """Where a sample came from, and what the policy is told, and learns to write."""
    part, own = mixture.part_of(row)
    prompt, learned = part.source.told(own)
    return str(mixture.places(np.array([row]))[0]), f"{prompt} → {learned}" if learned else prompt


# The picture ---------------------------------------------------------------------------------------------------------

_CELL, _TEXT, _GAP, _HEAD = 224, 250, 12, 30
"""Pixels: edge of a camera's cell, width of a sample's caption, space between things, height of the heading."""
_INK, _FAINT, _REAL, _ABSENT = "#1a2b34", "#6b7b84", "#2a8a4a", "#c0392b"


def draw_cameras(batch: Batch, cameras: Sequence[str], captions: Sequence[tuple[str, str]]) -> Image.Image:
    """One row per sample: its caption, then its cameras; two rows side by side where cameras are few."""
    columns = 2 if len(cameras) <= 2 and len(captions) > 1 else 1
    width = _TEXT + len(cameras) * (_CELL + _GAP) + _GAP
    height = _CELL + _GAP
    lines = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * width, _HEAD + lines * height), "white")
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        for slot, camera in enumerate(cameras):
            left = column * width + _TEXT + slot * (_CELL + _GAP)
            draw.text((left, _HEAD - 8), camera, _INK, _font(14), anchor="ls")
    for k, caption in enumerate(captions):
        corner = (k % columns * width, _HEAD + k // columns * height)
        _draw_sample(draw, sheet, corner, {name: value[k] for name, value in batch.items()}, caption, k)
    return sheet


def _draw_sample(
    draw: ImageDraw.ImageDraw,
    sheet: Image.Image,
    corner: tuple[int, int],
    sample: Batch,
    caption: tuple[str, str],
    number: int,
) -> None:
    left, top = corner
    place, prompt = caption
    told = textwrap.wrap(prompt, 28, max_lines=6, placeholder=" …")
    facts = [
        f"sample {number}",
        *(line for part in place.split(", ") for line in textwrap.wrap(part, 34)),
        f"{sample['token_valid'].sum()} prompt tokens",
    ]
    if "action_valid" in sample:
        facts.append(f"{sample['action_valid'].sum()} of {len(sample['action_valid'])} action steps real")
    draw.multiline_text((left + _GAP, top), "\n".join(told), _INK, _font(15), spacing=4)
    below = top + 22 * len(told) + 8
    draw.multiline_text((left + _GAP, below), "\n".join(facts), _FAINT, _font(12), spacing=4)
    for slot, (picture, real) in enumerate(zip(sample["images"], sample["image_valid"])):
        x = left + _TEXT + slot * (_CELL + _GAP)
        box = (x, top, x + _CELL - 1, top + _CELL - 1)
        # Enlarged pixels stay sharp: what is seen is what the model gets.
        resample = Image.Resampling.NEAREST if len(picture) < _CELL else Image.Resampling.BILINEAR
        sheet.paste(Image.fromarray(picture).resize((_CELL, _CELL), resample), box[:2])
        if not real:
            draw.rectangle(box, "#eeeeee")
            draw.line([box[:2], box[2:]], _ABSENT)
            draw.line([(box[0], box[3]), (box[2], box[1])], _ABSENT)
            draw.text((x + _CELL // 2, top + _CELL - 14), "absent, masked", _ABSENT, _font(12), anchor="mm")
        draw.rectangle(box, outline=_REAL if real else _ABSENT, width=2)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's own copy of DejaVu, which knows more alphabets than Pillow's default."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


# The text ------------------------------------------------------------------------------------------------------------


def _describe(batch: Batch, captions: Sequence[tuple[str, str]], data: TrainingData) -> Iterator[str]:
    model = data.config.model
    yield f"the first batch: {len(batch['tokens'])} samples for a {type(model).__name__}"
    for k, (place, prompt) in enumerate(captions):
        yield f"\nsample {k}: {place}: {prompt!r}"
        sample = {name: value[k] for name, value in batch.items()}
        yield from _tokens(sample, model, data.tokenizers.text, data.config.noise_draws)
    yield "\nvalues as the model gets them, over the whole batch; outside: share beyond [-1, 1]"
    yield f"  {'':<12}{'min':>9}{'mean':>9}{'max':>9}{'outside':>9}"
    for name, values in _dimensions(batch, data):
        low, mean, high, outside = values.min(), values.mean(), values.max(), np.mean(np.abs(values) > 1)
        yield f"  {name:<12}{low:9.3f}{mean:9.3f}{high:9.3f}{outside:9.1%}"


def _tokens(sample: Batch, model: ModelConfig, text: TextTokenizer, draws: int) -> Iterator[str]:
    """Span after span of the model's sequence; the prompt's also id by id."""
    image_real = dict(zip(model.cameras, sample["image_valid"]))
    start = 0
    for span in token_layout(model):
        where = f"  {span.part}  {span.name:<24}{start:>5} to {start + span.tokens - 1:<5}"
        start += span.tokens
        if span.name in image_real:
            yield f"{where} {span.tokens} image tokens" + ("" if image_real[span.name] else ", absent: masked")
        elif span.name.startswith("prompt"):
            real = int(sample["token_valid"].sum())
            yield f"{where} {real} tokens, {span.tokens - real} of padding: masked"
            yield from _prompt(sample, text)
        elif span.name == "actions":
            repeated = f", once for each of {draws} noise draws" if draws > 1 else ""
            yield f"{where} {sample['action_valid'].sum()} steps within the episode{repeated}"
        else:
            yield where.rstrip()


def _prompt(sample: Batch, text: TextTokenizer) -> Iterator[str]:
    """The prompt's tokens, in groups that attention and loss treat alike."""
    length = int(sample["token_valid"].sum())
    causal, loss = (sample.get(name, np.zeros(length, bool)).tolist() for name in ("token_causal", "token_loss"))
    ids = sample["tokens"].tolist()
    for (hidden, learned), places in groupby(range(length), key=lambda i: (causal[i], loss[i])):
        own = [ids[i] for i in places]
        seen = "each sees what is before it" if hidden else "all see each other"
        learned = ", learned: they are in the loss" if learned else ""
        yield f"    {len(own)} tokens, {seen}{learned}: {text.decode(own)!r}"
        yield textwrap.fill(" ".join(map(str, own)), 110, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _dimensions(batch: Batch, data: TrainingData) -> Iterator[tuple[str, np.ndarray]]:
    """Each dimension's real numbers in the batch."""
    state_size = max(one.source.pipeline.robot.state_size for one in data.sets)
    for i in range(min(state_size, batch["state"].shape[1])):
        yield f"state {i}", batch["state"][:, i]
    if isinstance(data.config.model, Pi0FastConfig):
        return
    for i in np.flatnonzero(batch["action_dim_valid"].any(0)).tolist():
        real = batch["action_valid"] & batch["action_dim_valid"][:, i, None]
        yield f"actions {i}", batch["actions"][..., i][real]
