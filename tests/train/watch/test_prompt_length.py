"""The longest prompt of a run's data: as long as the longest that is written out, and known before the first step."""

import json
from dataclasses import replace

import numpy as np
import pytest

from manipi.data.dataset import Feature
from manipi.data.feed.mixture import EncodedDataset, Part
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.errors import ConfigError, TrainingError
from manipi.model.config import Compat
from manipi.robots import Joints, Robot, State
from manipi.tokenizers import ByteTokenizer, SentencePieceTokenizer, Tokenizers
from manipi.train import loop
from manipi.train.config import DatasetConfig
from manipi.train.data import longest_prompt, prepare
from manipi.train.loop import train
from manipi.transforms import pipeline

KINDS = {
    "π0": ("pi0", {}),
    "π0.5": ("pi05", {}),
    "FAST": ("pi0_fast", {"action_tokenizer": "fit"}),
    "DCT": ("pi0_fast", {}),
    "binning": ("pi0_fast", {"action_tokenizer": "binning"}),
}
TASKS = ("reach it", "reach the other one, and do not hurry", "wave", "put the red cube into the box beside the plate")


def arm(states: int) -> Robot:
    return Robot(name="arm", cameras={"base": "i"}, state=(State("s", states),), actions=(Joints(2),), action_key="a")


def write_arm(root, states: int, tasks=TASKS) -> str:
    """Episodes of 6 frames, whose states and commands spread far beyond 1 and 99 of 100 of them."""
    features = {
        "i": Feature(kind="image", shape=(16, 16, 3), dtype="video"),
        "s": Feature(kind="vector", shape=(states,), dtype="float32"),
        "a": Feature(kind="vector", shape=(2,), dtype="float32"),
    }
    rng = np.random.default_rng(states)
    with LeRobotWriter(root, fps=10, features=features, robot_type="arm") as writer:
        for task in tasks:
            values = {key: rng.standard_cauchy((6, *features[key].shape)) for key in ("s", "a")}
            writer.add_episode({"i": np.zeros((6, 16, 16, 3), np.uint8), **values}, task=task)
    return str(root)


@pytest.fixture
def roomy(tiny):
    """`tiny` with more prompt tokens than any prompt here takes."""

    def make(kind, **changes):
        config = tiny(kind, **changes)
        others = {"codes": None} if "action_tokenizer" in changes else {}
        return replace(config, model=replace(config.model, max_token_len=400, action_dim=5, **others))

    return make


def written_out(parts) -> int:
    """Tokens of the longest prompt, frame by frame as in training."""
    samples = [s for part in parts for s in part.source.samples(np.arange(part.source.dataset.num_frames))]
    return max(int(sample["token_valid"].sum()) for sample in samples)


@pytest.mark.parametrize("states", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_as_long_as_the_longest_that_is_written_out(kind, states, roomy, tmp_path):
    """Of two datasets and robots, with held-out episodes, where each may have the longest."""
    name, changes = KINDS[kind]
    config = roomy(name, **changes)
    mine = DatasetConfig(path=config.data.path)
    other = DatasetConfig(path=write_arm(tmp_path / "arm", states), robot=arm(states))
    mixture = replace(config.data, path="", mixture=(mine, other))
    data = prepare(replace(config, data=mixture), tmp_path / "run")
    for sets in (data.sets, data.sets[:1], data.sets[1:]):
        longest = longest_prompt(sets)
        assert longest.tokens == written_out(sets)
        part = next(one for one in sets if one.source.dataset.name == longest.dataset)
        dataset = part.source.dataset
        (row,) = [row for row in range(dataset.num_frames) if dataset.locate(row) == longest.place]
        (sample,) = part.source.samples(np.array([row]))
        assert (int(sample["token_valid"].sum()), dataset.prompt(row)) == (longest.tokens, longest.instruction)
        assert longest.of_actions == (int(sample["token_loss"].sum()) if "token_loss" in sample else 0)


class PairTokenizer(ByteTokenizer):
    """Two equal numbers that follow each other are one token: lengths are no sum over the numbers."""

    def encode(self, text):
        ids = super().encode(text)
        return [id for i, id in enumerate(ids) if not (i and id == ids[i - 1] and i % 2)]


@pytest.mark.parametrize("text", ["pairs", "sentencepiece"])
def test_it_is_exact_with_other_tokenizers(text, roomy, tmp_path, shared_datasets):
    if text == "pairs":
        tokenizer = PairTokenizer()
    else:
        tokenizer = SentencePieceTokenizer(shared_datasets.parent / "golden/tokenizer/small_sp.model")
    config = roomy("pi05")
    config = replace(config, robot=arm(5), data=replace(config.data, path=write_arm(tmp_path / "arm", 5)))
    data = prepare(config, tmp_path / "run")
    steps = pipeline.build(arm(5), config.model, data.stats["arm"], Tokenizers(tokenizer), config.norm_mode)
    source = EncodedDataset(dataset=data.main.source.dataset, pipeline=steps, action_horizon=4)
    part = Part(source=source, rows=data.main.rows, held_out=data.main.held_out)
    assert longest_prompt([part]).tokens == written_out([part])


@pytest.mark.parametrize("kind", KINDS)
def test_too_long_a_prompt_stops_a_run_before_its_first_checkpoint(kind, roomy, tmp_path):
    """The longest instruction is that of one episode, which the first steps need not see."""
    name, changes = KINDS[kind]
    config = roomy(name, steps=1, save_every=1, **changes)
    config = replace(config, robot=arm(3), data=replace(config.data, path=write_arm(tmp_path / "arm", 3)))
    needed = prepare(config, tmp_path / "needed").longest.tokens
    short = replace(config, model=replace(config.model, max_token_len=needed - 1))
    place = rf"{needed} tokens.*\n.*arm, episode \d, frame \d.*\n.*--model.max-token-len {needed},"
    with pytest.raises(ConfigError, match=place):
        train(short, tmp_path / "run", show=False)
    assert not (tmp_path / "run/checkpoints").exists()
    fitting = replace(config, model=replace(config.model, max_token_len=needed))
    assert train(fitting, tmp_path / "run", show=False).name == "1"
    cut = replace(short, model=replace(short.model, compat=Compat(truncated_prompts=True)))
    assert "the rest is cut off" in str(prepare(cut, tmp_path / "cut").longest)


def test_what_is_advised_is_allowed_until_the_first_step(tiny, tmp_path, monkeypatch):
    config = tiny("pi05", steps=1, save_every=1)
    longer = replace(config, model=replace(config.model, max_token_len=config.model.max_token_len + 1))
    with monkeypatch.context() as patch:  # dies after its first checkpoint, that of step 0
        patch.setattr(loop, "train_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path / "run", show=False)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["0"]
    for other in ({"seed": 1}, {"model": replace(longer.model, vocab_size=2048)}):
        with pytest.raises(TrainingError, match="was started with"):
            train(replace(longer, **other), tmp_path / "run", show=False)
    assert train(longer, tmp_path / "run", show=False).name == "1"
    with pytest.raises(TrainingError, match=r"model\.max_token_len was"):
        train(config, tmp_path / "run", show=False)


def test_it_is_looked_for_once(tiny, tmp_path, monkeypatch):
    """Every process of a run asks, and every resume; another state of the data asks anew."""
    config, calls = tiny("pi05"), []
    monkeypatch.setattr("manipi.train.data.longest_prompt", lambda sets: calls.append(1) or longest_prompt(sets))
    first = prepare(config, tmp_path / "run").longest
    assert (prepare(config, tmp_path / "run").longest, len(calls)) == (first, 1)
    other = replace(config, model=replace(config.model, max_token_len=config.model.max_token_len + 1))
    assert (prepare(other, tmp_path / "run").longest.limit, len(calls)) == (first.limit + 1, 2)


@pytest.mark.parametrize("damage", ["", "null", "{}", '{"of": ', '{"of": OF, "longest": {"type": "LongestPrompt"}}'])
def test_what_is_kept_of_it_is_found_again_where_it_is_damaged(tiny, damage, tmp_path):
    longest = prepare(tiny(), tmp_path).longest
    kept = tmp_path / "longest_prompt.json"
    whole = kept.read_text()
    kept.write_text(damage.replace("OF", json.dumps(json.loads(whole)["of"])))
    assert prepare(tiny(), tmp_path).longest == longest
    assert kept.read_text() == whole
