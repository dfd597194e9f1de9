"""The forecast of a step's memory against real steps: autograd's hooks, real tensors, torch's allocator."""

import re
import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tests.train.sizes import with_layers
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from manipi.errors import ConfigError, TrainingError, UnknownNameError
from manipi.model import VLA
from manipi.model.config import Adapters, LoRA, Pi0FastConfig
from manipi.records import Change, may_change, to_json
from manipi.train import loop, plan
from manipi.train.config import ComputeConfig, OptimizerConfig
from manipi.train.loop import train
from manipi.train.plan import (
    GIB,
    SAVINGS,
    SHARDED,
    find_fit,
    fits,
    forecast,
    gpu_bytes,
    in_parts,
    largest_batch,
    step_memory,
)
from manipi.train.run.folder import Run, differences
from manipi.train.step.state import TrainState
from manipi.train.step.step import draw_noise, train_step

LORA = Adapters(attention=LoRA(rank=4, alpha=4), feed_forward=LoRA(rank=4, alpha=4))


def make(tiny, kind: str, *, lora: bool = False, **changes):
    # A decay that leaves no weight as it is: every row of the token embedding has moments.
    config = with_layers(tiny(kind, optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.01), **changes), 2)
    if not lora:
        return config
    adapters = {"vlm_adapters": LORA} if kind == "pi0_fast" else {"vlm_adapters": LORA, "action_adapters": LORA}
    return replace(
        config, model=replace(config.model, **adapters), trained="lora", frozen_dtype="bfloat16", ema_decay=0.0
    )


def ragged_batch(config):
    """Prompts of several lengths, a camera that is missing here and there, a loss on some of the tokens."""
    batch = largest_batch(config)
    b, length = batch.tokens.shape
    valid = torch.arange(length)[None] < torch.linspace(length // 2, length, b).long()[:, None]
    image_valid = batch.image_valid.clone()
    image_valid[0, 0] = False
    is_fast = isinstance(config.model, Pi0FastConfig)
    late = valid & (torch.arange(length) >= length // 3) if is_fast else None
    masks = {"token_valid": valid, "image_valid": image_valid, "token_causal": late, "token_loss": late}
    return replace(batch, images=batch.images.contiguous(), **masks)


@dataclass(eq=False)
class Saved:
    """What autograd holds instead of a tensor; gone when the node that saved it is."""

    tensor: torch.Tensor


def draws(batch, config):
    if isinstance(config.model, Pi0FastConfig):
        return ()
    size = (config.model.action_horizon, config.model.action_dim)
    return draw_noise(config.seed, 0, batch.batch_size, config.noise_draws, *size)


def hooked_bytes(state, batch, config) -> int:
    """Of each storage that waits for the backward pass of a real step, once: not those that were there before."""
    held: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor):
        held.add(saved := Saved(tensor))
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = state.model(batch, *draws(batch, config)).loss
    before = [*state.model.parameters(), *(v for v in vars(batch).values() if isinstance(v, torch.Tensor))]
    there = {tensor.untyped_storage().data_ptr() for tensor in before}
    storages = {s.tensor.untyped_storage().data_ptr(): s.tensor.untyped_storage() for s in held}
    assert loss.grad_fn is not None
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in there)


CASES = [
    ("pi0", {"batch_size": 1, "noise_draws": 1}),
    ("pi0", {"batch_size": 7, "noise_draws": 3, "lora": True}),
    ("pi05", {"batch_size": 3}),
    ("pi05", {"lora": True, "noise_draws": 5}),
    ("pi0_fast", {"batch_size": 2}),
    ("pi0_fast", {"batch_size": 5, "lora": True}),
    ("joint", {"batch_size": 3}),
    ("joint", {"lora": True, "noise_draws": 2}),
]


@pytest.mark.parametrize(("kind", "changes"), CASES, ids=str)
def test_saved_bytes_are_what_autograds_hooks_count(tiny, kind, changes):
    config = make(tiny, kind, **changes)
    batch = ragged_batch(config)
    counted = hooked_bytes(TrainState.initial(config), batch, config)
    assert counted > 20_000
    # Noise and masks that the step holds are not saved: most of a percent in so small a model.
    assert forecast(config, batch).saved == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("kind", ["pi0", "pi05", "pi0_fast", "joint"])
def test_the_peak_is_that_of_a_real_step_and_of_torchs_allocator(tiny, kind):
    config = make(tiny, kind)
    batch, state = ragged_batch(config), TrainState.initial(config)
    expected, real = forecast(config, batch), step_memory(state, batch, config)
    assert expected.at_peak() == real.at_peak()
    assert expected.total.max() == real.total.max()

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_step(state, batch, config)
    events: Any = profiler.profiler
    changes = [e for e in events.kineto_results.events() if e.name() == "[memory]"]
    live = torch.tensor([e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())]).cumsum(0)
    assert expected.peak - expected.total[0] == pytest.approx(int(live.max()), rel=0.05)


def test_parts_follow_the_settings(tiny):
    plain = forecast(make(tiny, "pi0", batch_size=1, noise_draws=1))
    weights, trained = 4 * 71_220, 4 * 64_500
    assert plain.at_peak()["weights"] == weights
    assert plain.curves["gradients"].max() == plain.at_peak()["average"] == trained
    assert plain.at_peak()["optimizer"] == pytest.approx(2 * trained, rel=1e-3)
    lora = forecast(make(tiny, "pi0", lora=True, batch_size=1, noise_draws=1)).at_peak()
    assert lora["average"] == 0
    assert lora["optimizer"] < trained < plain.at_peak()["optimizer"]


def test_gpus_share_the_state_and_the_batch(tiny):
    one, two = forecast(tiny("pi0", batch_size=2)), forecast(tiny("pi0", batch_size=4), gpus=2)
    for part in SHARDED:
        assert two.curves[part].max() == one.curves[part].max() // 2
    assert two.saved == one.saved
    assert two.at_peak()["temporary"] > one.at_peak()["temporary"]
    with pytest.raises(ConfigError, match="--batch-size 6"):
        forecast(tiny("pi0", batch_size=4), gpus=3)


# ---- what fits


def test_parts_of_the_batch_come_first(tiny):
    config = tiny("pi0", batch_size=8)
    memory = forecast(config)
    four = forecast(replace(config, accumulate=2))
    capacity = (four.peak + four.reserve + memory.peak + memory.reserve) // 2
    found = find_fit(config, memory, capacity)
    assert found is not None
    assert found.config == replace(config, accumulate=2)
    assert [saving.flags for saving in found.savings] == ["--accumulate 2"]
    assert fits(found.memory, capacity)
    assert found.memory.at_peak() == four.at_peak()


def test_savings_that_are_not_needed_are_taken_back(tiny):
    # A decay that leaves no weight as it is: every row of the token embedding has moments.
    config = tiny("pi0", batch_size=1, noise_draws=1, optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.01))
    without_average = forecast(replace(config, ema_decay=0.0, compute=ComputeConfig(recompute="full")))
    found = find_fit(config, forecast(config), without_average.peak + without_average.reserve)
    assert found is not None
    assert found.savings[-1].flags in ("--ema-decay 0", "--optimizer.state-bits 8")
    assert "--compute.recompute elementwise" not in [saving.flags for saving in found.savings]


def test_nothing_fits(tiny):
    """Most of the savings are there already, each of which takes seconds to try."""
    compute = ComputeConfig(recompute="full", precision="pure_bf16")
    config = tiny("pi0", batch_size=1, ema_decay=0.0, noise_draws=1, compute=compute)
    assert find_fit(config, forecast(config), GIB) is None


SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB\nof which 1 is free."


def raising_once(function, error):
    """`function`, but for its first call."""
    calls = iter([error])

    def called(*args, **kwargs):
        for first in calls:
            raise first
        return function(*args, **kwargs)

    return called


def test_a_state_that_a_gpu_has_no_room_for(tiny, tmp_path, monkeypatch):
    """What torch would raise is raised where it would be; there is no GPU here."""
    config = tiny("pi0", batch_size=4096)
    monkeypatch.setattr(VLA, "init_weights", raising_once(VLA.init_weights, torch.OutOfMemoryError(SAID)))
    with pytest.raises(TrainingError, match=r"CUDA out of memory. Tried to allocate 2.00 GiB") as caught:
        train(config, tmp_path, show=False)
    memory = forecast(config)
    assert f"forecast of a step: {memory.peak / GIB:.2f} GiB" in caught.value.found
    assert "\n" not in caught.value.found
    flags = re.match(r"--accumulate (\d+) needs (\d+\.\d\d) GiB", caught.value.next)
    fitting = forecast(replace(config, accumulate=int(flags[1])))
    assert f"{(fitting.peak + fitting.reserve) / GIB:.2f}" == flags[2]
    assert fitting.peak + fitting.reserve < memory.peak + memory.reserve


def test_a_step_that_a_gpu_has_no_room_for(tiny, tmp_path, monkeypatch):
    """Most of the savings are there already. The folder stays sound."""
    compute = ComputeConfig(recompute="full", precision="pure_bf16")
    config = tiny("pi0", batch_size=1, ema_decay=0.0, noise_draws=1, compute=compute, steps=2)
    monkeypatch.setattr(plan, "find_fit", lambda *_, **__: None)  # as `test_nothing_fits` shows in seconds
    first, second = train_step, raising_once(train_step, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when …"))
    monkeypatch.setattr(loop, "train_step", lambda state, *rest: (second if state.step else first)(state, *rest))
    with pytest.raises(TrainingError, match=r"(?s)CUBLAS_STATUS_ALLOC_FAILED.*no settings that are known fit"):
        train(config, tmp_path, show=False)
    assert train(config, tmp_path, show=False).name == "2"


def test_the_folder_of_a_run_that_never_fitted_takes_the_settings_that_do(tiny, tmp_path, monkeypatch):
    config = tiny("pi0", steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", raising_once(train_step, torch.OutOfMemoryError(SAID)))
        patch.setattr(plan, "find_fit", lambda *_, **__: None)  # a search takes seconds
        with pytest.raises(TrainingError, match="CUDA out of memory"):
            train(config, tmp_path, show=False)
    assert Run(tmp_path, config).steps() == [0]
    fitting = replace(config, accumulate=2, ema_decay=0.0, compute=ComputeConfig(precision="pure_bf16"))
    assert train(fitting, tmp_path, show=False).name == "2"
    with pytest.raises(TrainingError, match="accumulate was 2, now 1"):
        train(replace(fitting, accumulate=1), tmp_path, show=False)


def test_every_setting_that_is_advised_may_be_set_before_the_first_step(tiny):
    config = make(tiny, "pi05", lora=True, compute=ComputeConfig(precision="fp32"), batch_size=4)
    config = replace(config, trained="full", ema_decay=0.9, frozen_dtype="float32")
    changed = {"optimizer.state_bits"}  # which is proposed where torchao is installed alone
    for saving in (*SAVINGS, in_parts(2)):
        for start in (config, replace(config, trained="lora")):
            changed |= {name for name, _ in differences(to_json(start), to_json(saving.change(start)))}
    assert changed >= {"accumulate", "compute.precision", "trained", "frozen_dtype", "noise_draws", "ema_decay"}
    assert Change.STAYS not in {may_change(config, name) for name in changed}


def test_other_errors_stay_what_they_are(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(VLA, "init_weights", raising_once(VLA.init_weights, RuntimeError("CUDA error: misaligned")))
    with pytest.raises(RuntimeError, match="misaligned"):
        train(tiny("pi0"), tmp_path, show=False)


def test_gpus_by_name_and_by_size():
    assert gpu_bytes("24GB") == gpu_bytes("24 gib") == 24 * GIB
    assert gpu_bytes("NVIDIA GeForce RTX 4090") == gpu_bytes("rtx4090") == 24_564 * 2**20
    with pytest.raises(UnknownNameError, match="did you mean rtx4090"):
        gpu_bytes("rtx-4900")
    with pytest.raises(ConfigError, match="a size in GB"):
        gpu_bytes("24MB")
