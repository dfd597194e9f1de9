"""Training on a toy dataset: it learns, it stops loudly, and a resumed run is the undisturbed one, bit for bit."""

import contextlib
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from manipi.checkpoints.native import verify
from manipi.errors import (
    BadValueError,
    CheckpointError,
    ConfigError,
    MissingFeatureError,
    StorageError,
    TokenizerError,
    TrainingError,
)
from manipi.model import ModelInput
from manipi.model.config import Adapters, LoRA, Pi0Config, Pi0FastConfig, Pi05Config
from manipi.policy import Policy
from manipi.robots import State
from manipi.train.config import OptimizerConfig, ValidationConfig
from manipi.train.data import prepare
from manipi.train.loop import train
from manipi.train.run.folder import Run, read_config
from manipi.train.step.state import TrainState, is_trained, trainable_parameters
from manipi.train.step.step import train_step
from manipi.train.watch.progress import OF_THE_MACHINE
from manipi.transforms.normalize import load_norm_stats, save_norm_stats
from manipi.weights.names import openpi_arrays

KINDS = ("pi05", "pi0", "pi0_fast")
every_kind = pytest.mark.parametrize("kind", KINDS)


def metrics(config, folder) -> list[dict]:
    return [{k: v for k, v in m.items() if k not in OF_THE_MACHINE} for m in Run(folder, config).read_metrics()]


def same_state(config, one, other) -> None:
    """Every tensor of the two training states, weights for inference and log lines are equal, bit for bit."""
    states = [TrainState.initial(config), TrainState.initial(config)]
    for state, checkpoint in zip(states, (one, other), strict=True):
        state.load(checkpoint / "train_state")
    left, right = (state._tensors() for state in states)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert metrics(config, one.parents[1]) == metrics(config, other.parents[1])


# ---- it learns, and what it saves serves


def test_the_loss_decreases(tiny, tmp_path, drawn):
    validation = ValidationConfig(every=60, samples=8)
    config = tiny(steps=60, save_every=60, batch_size=8, validation=validation)
    train(config, tmp_path, show=False)
    losses = [m["loss"] for m in metrics(config, tmp_path)]
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    for name in ("loss.png", "validation/60.png", "validation/curves.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(np.unique(np.asarray(picture))) > 100, "nothing is drawn"


@every_kind
def test_two_steps_make_a_policy(kind, trained, tiny):
    folder = trained(kind)
    assert folder.name == "2"
    policy = Policy.load(folder)
    observation = prepare(tiny(kind, steps=2), folder.parents[1]).example()
    actions = policy.infer(observation)["actions"]
    assert actions.shape == (4, 4)
    assert actions.dtype == np.float32
    assert np.isfinite(actions).all()
    assert policy.metadata["step"] == 2
    assert (folder.parents[1] / "loss.png").exists()


@every_kind
def test_exactly_the_trainable_parameters_get_a_gradient(kind, tiny, tmp_path):
    config = tiny(kind)
    state = TrainState.initial(config)
    # Adaptive modulation starts at zero, where no gradient flows through it yet.
    for parameter in state.model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with prepare(config, tmp_path).loader(0) as loader:
        _, batch, _ = next(iter(loader))
    inputs = ModelInput.from_numpy(batch)
    noise = (torch.randn(4, 4, 4), torch.rand(4)) if kind != "pi0_fast" else ()
    state.model(inputs, *noise).loss.backward()
    reached = {n for n, p in state.model.named_parameters() if p.grad is not None and p.grad.to_dense().abs().max() > 0}
    # Attention does not feel a bias that all keys share; rounding decides whether it is zero.
    assert reached - set(state.parameters) == set()
    assert {n for n in set(state.parameters) - reached if "k_proj.bias" not in n} == set()


def test_without_averaging_the_raw_weights_are_served(tiny, tmp_path):
    config = tiny(steps=2, ema_decay=0.0)
    folder = train(config, tmp_path, show=False)
    state = TrainState.initial(config)
    assert state.average == {}
    state.load(folder / "train_state")
    served = load_file(folder / "model.safetensors")
    assert all(torch.equal(served[name], value) for name, value in state.model.state_dict().items())


def test_the_average_follows_the_raw_weights(tiny, trained):
    config = tiny("pi05", steps=2)
    folder = trained("pi05")
    state = TrainState.initial(config)
    state.load(folder / "train_state")
    served = load_file(folder / "model.safetensors")
    moved = [n for n, v in state.parameters.items() if not torch.equal(served[n], v)]
    assert moved
    whole = {name: average for name, average in state.inference_weights().items() if name in state.average}
    assert all(torch.equal(served[name], average) for name, average in whole.items())


def test_sgd_trains_and_resumes(tiny, tmp_path):
    config = replace(tiny(steps=4), optimizer=OptimizerConfig(kind="sgd", schedule="rsqrt", lr=0.05, warmup_steps=1))
    whole = train(config, tmp_path / "whole", show=False)
    train(config, tmp_path / "parts", stop_at=2, show=False)
    same_state(config, whole, train(config, tmp_path / "parts", show=False))


# ---- what adapters leave frozen

LORA = Adapters(attention=LoRA(rank=2, alpha=2.0), feed_forward=LoRA(rank=2, alpha=2.0))


@pytest.mark.parametrize(
    ("kind", "adapted"),
    [("pi0", ("vlm",)), ("pi0", ("action",)), ("pi0", ("vlm", "action")), ("pi05", ("vlm",)), ("pi0_fast", ("vlm",))],
)
def test_only_adapters_of_an_adapted_expert_move(kind, adapted, tiny, tmp_path):
    model = replace(tiny(kind).model, **{f"{name}_adapters": LORA for name in adapted})
    settings = {"model": model, "trained": "lora", "frozen_dtype": "bfloat16", "ema_decay": 0.0}
    config = tiny(kind, steps=5, save_every=5, **settings)
    state = TrainState.initial(config)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    state.load(train(config, tmp_path, show=False) / "train_state")
    moved = {name for name, p in state.model.named_parameters() if not torch.equal(p, before[name])}
    owned = {n for n in before if any(f".{e}." in n or (e == "vlm" and n.endswith("token_embedding")) for e in adapted)}
    frozen = {name for name in owned if "lora_" not in name}
    assert frozen
    assert moved.isdisjoint(frozen)
    assert {name for name in owned - frozen if name in state.parameters} <= moved
    assert any(name.startswith("vision.") for name in moved)
    assert {before[name].dtype for name in frozen} == {torch.bfloat16}
    assert {p.dtype for name, p in before.items() if name not in frozen} == {torch.float32}
    Policy.load(tmp_path / "checkpoints/5")
    everything = replace(config, trained="full")
    assert set(trainable_parameters(state.model, "full")) == set(TrainState.initial(everything).parameters)
    assert not set(state.parameters) & frozen


GOLDEN = Path(os.environ.get("MANIPI_SHARED", Path(__file__).parents[2].parent / "shared")) / "golden"
TREES = sorted(GOLDEN.glob("trees/*.json"))
CONFIGS = {"pi0": Pi0Config, "pi05": Pi05Config, "pi0_fast": Pi0FastConfig}


@pytest.mark.skipif(not TREES, reason=f"no golden parameter trees under {GOLDEN}; set MANIPI_SHARED")
@pytest.mark.parametrize("path", TREES, ids=lambda path: path.stem)
def test_frozen_as_the_reference_freezes(path):
    tree = json.loads(path.read_text())
    model = CONFIGS[path.stem.removesuffix("_lora")]()
    if path.stem.endswith("_lora"):
        model = replace(model, vlm_adapters=LORA, action_adapters=LORA)
    arrays = openpi_arrays(model)
    assert set(arrays) == set(tree["parameters"])
    ours = {
        name
        for name, array in arrays.items()
        for layer in array.names
        for part in layer
        if not is_trained(part, model, "lora")
    }
    assert ours == set(tree["frozen_parameters_by_default_filter"])


# ---- where weights and statistics begin


@every_kind
def test_a_run_begins_with_the_weights_of_init(kind, trained, tiny, tmp_path):
    source = Path(shutil.copytree(trained(kind), tmp_path / "source"))
    config = tiny(kind, steps=2, init=str(source))
    train(config, tmp_path / "run", stop_at=1, show=False)
    begun = load_file(tmp_path / "run/checkpoints/0/model.safetensors")
    served = load_file(source / "model.safetensors")
    assert begun.keys() == served.keys()
    assert all(torch.equal(begun[name], value) for name, value in served.items())
    shutil.rmtree(source)
    assert train(config, tmp_path / "run", show=False).name == "2"  # the run has its own weights by now


def test_released_weights_are_trained_with_their_own_tokenizer_alone(trained, tiny, tmp_path):
    (tmp_path / "released").mkdir()
    for source, refused in ((tmp_path / "released", True), (trained("pi05"), False)):
        config = tiny(init=str(source))
        config = replace(config, model=replace(config.model, vocab_size=257_152))
        expected = pytest.raises(TokenizerError, match=r"(?s)PaliGemma's tokenizer.*found a byte tokenizer")
        with expected if refused else contextlib.nullcontext():
            prepare(config, tmp_path / f"run_{refused}")


def test_a_run_in_the_scale_of_another(trained, tiny, toy_dataset, tmp_path):
    """The statistics are those of the folder; the run is tied to its own data all the same."""
    folder = trained("pi05")
    other = load_norm_stats(folder / "norm_stats.json")
    scaled = replace(other, state=replace(other.state, mean=other.state.mean + 1), data="another dataset")
    save_norm_stats(scaled, tmp_path / "assets/norm_stats.json")
    config = tiny()
    config = replace(config, data=replace(config.data, norm_stats=str(tmp_path / "assets")))
    prepare(config, tmp_path)
    data = prepare(config, tmp_path)
    np.testing.assert_array_equal(data.stats["tabletop"].state.mean, other.state.mean + 1)
    assert data.stats["tabletop"].data == other.data


# ---- resuming


@every_kind
def test_a_resumed_run_equals_an_undisturbed_one(kind, tiny, undisturbed, tmp_path):
    config = tiny(kind)
    whole = undisturbed(config) / "checkpoints/6"
    stopped = train(config, tmp_path / "parts", stop_at=3, show=False)
    assert stopped.name == "3"
    resumed = train(config, tmp_path / "parts", show=False)
    assert resumed.name == "6"
    assert [m["step"] for m in metrics(config, tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
    same_state(config, whole, resumed)


def test_workers_make_no_difference(tiny, undisturbed, tmp_path):
    config = tiny()
    other = replace(config, data=replace(config.data, num_workers=2, cache="raw"), save_every=6)
    folders = undisturbed(config) / "checkpoints/6", train(other, tmp_path, show=False)
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]


def test_a_finished_run_stays_as_it_is(tiny, trained):
    folder = trained("pi05")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert train(tiny("pi05", steps=2), folder.parents[1], show=False) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


def test_only_the_newest_checkpoints_stay(tiny, tmp_path):
    config = tiny(steps=5, save_every=2, keep_checkpoints=2)
    train(config, tmp_path, show=False)
    assert Run(tmp_path, config).steps() == [4, 5]


def test_every_nth_checkpoint_stays_too(tiny, tmp_path):
    config = tiny(steps=5, save_every=1, keep_checkpoints=1, keep_every=2)
    train(config, tmp_path, show=False)
    assert Run(tmp_path, config).steps() == [2, 4, 5]
    with pytest.raises(ConfigError, match="keep_every"):
        tiny(keep_every=-1)


def test_a_run_may_be_made_longer(tiny, tmp_path):
    longer = replace(tiny(steps=4), keep_checkpoints=3)
    train(tiny(steps=2), tmp_path / "resumed", show=False)
    resumed = train(longer, tmp_path / "resumed", show=False)
    undisturbed = train(longer, tmp_path / "undisturbed", show=False)
    assert (resumed / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert read_config(tmp_path / "resumed") == longer


def test_other_settings_in_the_same_folder_are_refused(tiny, trained):
    config = tiny("pi05", steps=2)
    folder = trained("pi05").parents[1]
    other = replace(config, batch_size=5, model=replace(config.model, action_horizon=3))
    with pytest.raises(TrainingError) as error:
        train(other, folder, show=False)
    assert error.value.found == "batch_size was 4, now 5; model.action_horizon was 4, now 3"
    assert error.value.where == str(folder / "config.json")
    assert error.value.next.startswith("give the new run another folder (--run-dir)")


def test_a_run_that_never_began_does_not_block_its_folder(tiny, tmp_path):
    config = tiny(steps=1)
    wrong = replace(config, tokenizer=str(tmp_path / "absent.model"), data=replace(config.data, holdout=0.5))
    with pytest.raises(Exception, match=r"absent\.model"):
        train(wrong, tmp_path / "run", show=False)
    folder = train(config, tmp_path / "run", show=False)
    # Nor do the statistics of other episodes stay.
    assert Policy.load(folder).norm_stats.num_frames == len(prepare(config, tmp_path / "other").main.rows)


# ---- what goes wrong


def copy(folder, tmp_path):
    """A copy of a checkpoint's whole run; returns the run's folder."""
    return shutil.copytree(folder.parents[1], tmp_path / "copy")


def flip(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_corrupted_newest_checkpoint_is_named_with_the_one_before(tiny, trained, tmp_path):
    run = copy(trained("pi05"), tmp_path)
    weights = run / "checkpoints/2/model.safetensors"
    flip(weights)
    config = tiny("pi05", steps=2)
    with pytest.raises(CheckpointError) as error:
        train(config, run, show=False)
    assert error.value.expected == "a sound checkpoint of step 2"
    assert error.value.where == str(weights)
    assert error.value.next == "--resume-from 0 goes on from the newest sound one before it, and deletes those after"
    with pytest.raises(CheckpointError, match=r"(?s)one of this run's checkpoints: 0, 2.*leave --resume-from out"):
        train(config, run, resume_from=1, show=False)
    assert train(config, run, resume_from=0, show=False) == run / "checkpoints/2"
    verify(run / "checkpoints/2")
    with pytest.raises(CheckpointError, match=r"(?s)found a sound one \(step 2\).*leave --resume-from out"):
        train(config, run, resume_from=0, show=False)
    flip(run / "checkpoints/0/config.json")
    shutil.rmtree(run / "checkpoints/2")
    with pytest.raises(CheckpointError, match="there is no sound one before it"):
        train(config, run, show=False)


def test_a_damaged_checkpoint_is_never_offered(tiny, trained, tmp_path):
    """Whichever of three are damaged, the advice works, or says that there is nothing to go on from."""
    original, config = copy(trained("pi05"), tmp_path), tiny("pi05", steps=2)
    shutil.copytree(original / "checkpoints/0", original / "checkpoints/1")
    for damaged in ((2,), (2, 1), (2, 1, 0), (2, 0)):
        run = shutil.copytree(original, tmp_path / "-".join(map(str, damaged)))
        for step in damaged:
            flip(run / f"checkpoints/{step}/model.safetensors")
        with pytest.raises(CheckpointError, match="a sound checkpoint of step 2") as error:
            Run(run, config).newest()
        sound = sorted({0, 1} - set(damaged))
        if not sound:
            assert error.value.next == f"there is no sound one before it: delete {run / 'checkpoints'} and start again"
            continue
        offered = re.match(r"--resume-from (\d+) ", error.value.next)
        assert int(offered[1]) == sound[-1]
        Run(run, config).rewind(int(offered[1]))
        assert Run(run, config).newest() == sound[-1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [*lines[:-1], b"\0" * 300],  # a line that never reached the disk
        lambda lines: [*lines, b"\0" * 5000],
        lambda lines: [*lines[:-1], b"\0" * 40 + lines[-1]],  # a run that went on behind it
        lambda lines: [lines[0], b'{"loss": 1', b"\xff\xfe", b"[1]", b"null", b'{"step": "two"}', *lines[1:]],
    ],
)
def test_a_log_after_a_loss_of_power(tiny, once, tmp_path, capsys, damage):
    config = tiny(steps=4)
    stopped = once("stopped", lambda folder: train(config, folder / "run", stop_at=2, show=False)) / "run"
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes().splitlines()
    damaged = damage(whole)
    path.write_bytes(b"".join(line + b"\n" for line in damaged))
    train(config, tmp_path, show=False)
    there = [json.loads(line) for line in whole if any(line in one for one in damaged)]
    assert Run(tmp_path, config).read_metrics()[: len(there)] == there
    assert [line["step"] for line in Run(tmp_path, config).read_metrics()][-2:] == [3, 4]
    lost = sum(not any(line in one for line in whole) for one in damaged)
    said = f"{path}: dropped {lost} of {len(damaged)} lines, which cannot be read"
    assert (said in capsys.readouterr().out) == bool(lost)


def plant(dataset, tmp_path, column, value):
    """A copy of the dataset with one bad number, written as other recorders may have written it."""
    root = shutil.copytree(dataset, tmp_path / "dataset")
    (path,) = (root / "data").rglob("*.parquet")
    table = pq.read_table(path)
    values = np.array(table[column].to_pylist(), np.float32)
    values[20, 2] = value
    array = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    pq.write_table(table.set_column(table.column_names.index(column), column, array), path)
    return root


@pytest.mark.parametrize(("column", "value"), [("observation/state", np.nan), ("actions", np.inf)])
def test_bad_numbers_in_the_data(tiny, toy_dataset, tmp_path, column, value):
    config = tiny()
    root = plant(toy_dataset, tmp_path, column, value)
    with pytest.raises(BadValueError, match=f"{value} in dimension 2") as error:
        train(replace(config, data=replace(config.data, path=str(root))), tmp_path / "run", show=False)
    assert "episode 2, frame 1" in error.value.where
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_robot_that_the_dataset_does_not_have(tiny, tmp_path):
    config = tiny()
    for change, message in (
        ({"cameras": {"base": "observation/wrist"}}, "image 'observation/wrist'"),
        ({"state": (State("observation/state", 3),)}, "of size 3"),
        ({"action_key": "commands"}, "vector 'commands' of size 4"),
    ):
        with pytest.raises(MissingFeatureError, match=message):
            train(replace(config, robot=replace(config.robot, **change)), tmp_path, show=False)


def test_a_loss_that_is_not_finite(tiny, tmp_path):
    config = tiny(steps=20, save_every=20)
    config = replace(config, optimizer=replace(config.optimizer, lr=1e30, warmup_steps=0))
    with pytest.raises(TrainingError, match=r"loss (nan|inf)") as error:
        train(config, tmp_path, show=False)
    assert error.value.where.startswith(f"step {len(Run(tmp_path, config).read_metrics())}")
    run = Run(tmp_path, config)
    assert run.steps() == [0]
    verify(run.checkpoint(0))
    assert not list(run.checkpoints.glob(".*"))


def test_a_policy_that_answers_nan_is_not_saved(tiny, tmp_path):
    config = tiny(steps=20, save_every=1, keep_checkpoints=100)
    config = replace(config, optimizer=replace(config.optimizer, lr=1e30, warmup_steps=0))
    with pytest.raises(BadValueError, match=r"nan at step 0, dimension 0[\s\S]*robot 'tabletop'"):
        train(config, tmp_path, show=False)
    assert Run(tmp_path, config).newest() == 0


def test_a_step_that_fails_leaves_the_weights(tiny, tmp_path):
    config = tiny()
    state = TrainState.initial(config)
    with prepare(config, tmp_path).loader(0) as loader:
        _, batch, _ = next(iter(loader))
    before = {name: value.clone() for name, value in state._tensors().items()}
    spoiled = batch | {"actions": batch["actions"] * np.float32(np.inf)}
    with pytest.raises(TrainingError, match="where step 0"):
        train_step(state, ModelInput.from_numpy(spoiled), config)
    assert all(torch.equal(value, before[name]) for name, value in state._tensors().items())


@pytest.mark.parametrize("room", [0.3, 1.5], ids=["for less than the weights", "for the weights alone"])
def test_a_full_disk_leaves_the_checkpoints_before_it(tiny, mount, room):
    disk = mount(64)
    config = tiny(steps=4, keep_checkpoints=9)
    train(config, disk / "run", stop_at=2, show=False)
    run = Run(disk / "run", config)
    left = int(room * (run.checkpoint(2) / "model.safetensors").stat().st_size)
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - left))
    with pytest.raises(StorageError) as error:
        train(config, disk / "run", show=False)
    assert error.value.where == str(run.checkpoint(4))
    assert "MB free" in error.value.found
    assert run.steps() == [0, 2]
    assert not list(run.checkpoints.glob(".*"))
    assert run.newest() == 2
    filler.unlink()
    assert train(config, disk / "run", show=False) == run.checkpoint(4)
