"""The first batch of a run, as people see it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from manipi.train.data import prepare
from manipi.train.watch.first_batch import save_first_batch


def with_two_cameras(config):
    """The robot has one of them."""
    return replace(config, model=replace(config.model, cameras=("base", "wrist")))


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """`saved(kind)` is the folder, the batch and its data."""

    def save(kind: str):
        folder = tmp_path_factory.mktemp(kind)
        data = prepare(with_two_cameras(tiny(kind, batch_size=10)), folder)
        with data.loader(0) as loader:
            _, batch, _ = next(iter(loader))
            save_first_batch(folder / "first_batch", batch, loader.rows(0), data)
        return folder / "first_batch", batch, data

    return save


def test_pictures(saved):
    folder, batch, _ = saved("pi05")
    sheet = np.asarray(Image.open(folder / "cameras.png"))
    shown = [k for k in range(10) if (np.abs(sheet.astype(int) - batch["images"][k, 0, 8, 8]).max(-1) < 3).sum() > 9000]
    assert shown[:8] == list(range(8))
    # The camera that is not there is crossed out, once per sample, and not shown as a black picture.
    assert (sheet == 0).all(-1).sum() == 0
    assert (sheet == (0xEE, 0xEE, 0xEE)).all(-1).sum() > 8 * 200**2


def test_tokens_and_values(saved):
    folder, batch, data = saved("pi0")
    text = (folder / "batch.txt").read_text()
    prompt = int(batch["token_valid"][0].sum())
    length = batch["tokens"].shape[1]
    for line in (
        "first batch: 10 samples for a Pi0Config",
        "base                        0 to 3     4 image tokens",
        "wrist                       4 to 7     4 image tokens, absent: masked",
        f"{prompt} tokens, {length - prompt} of padding: masked",
        f"{prompt} tokens, all see each other: 'reach it\\n'",
        " ".join(map(str, batch["tokens"][0, :prompt])),
        f"actions                 {9 + length:>5} to {12 + length:<5} {batch['action_valid'][0].sum()} steps",
        "once for each of 2 noise draws",
    ):
        assert line in text
    rows = {
        line[2:14].strip(): line[14:].split()
        for line in text.splitlines()
        if line.startswith(("  state ", "  actions "))
    }
    assert list(rows) == [f"{name} {i}" for name in ("state", "actions") for i in range(4)]
    real = batch["actions"][batch["action_valid"]][:, 2]
    assert [float(x) for x in rows["actions 2"][:3]] == pytest.approx([real.min(), real.mean(), real.max()], abs=1e-3)
    assert rows["actions 2"][3] == f"{np.mean(np.abs(real) > 1):.1%}"
    places = data.mixture.places(np.array(data.loader(0).rows(0)))
    assert f"sample 3: {places[3]}: 'reach it'" in text


def test_what_is_learned_of_the_tokens(saved):
    folder, batch, _ = saved("pi0_fast")
    text = (folder / "batch.txt").read_text()
    learned = int(batch["token_loss"][0].sum())
    assert f"{learned} tokens, each sees what is before it, learned: they are in the loss: 'Action: <code" in text
    assert "wrist                       4 to 7     4 image tokens\n" in text  # π0-FAST sees black pictures


def test_pipeline(saved):
    folder, _, data = saved("pi05")
    said = json.loads((folder / "pipeline.json").read_text())
    steps = [type(step).__name__ for step in data.main.source.pipeline.steps]
    assert [stage["step"] for stage in said["stages"]] == ["observation", *steps]
    assert said["robot"]["name"] == "tabletop"
