"""What each mode trains, counted by hand and seen by autograd; accumulation; precision; low-bit states."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from manipi.errors import CheckpointError, ConfigError, WeightsMismatchError
from manipi.model import VLA, ModelInput
from manipi.model.config import Adapters, GemmaSize, LoRA, Pi0FastConfig, Pi05Config, VisionSize
from manipi.policy import Policy
from manipi.recipes.registry import load_recipe
from manipi.train.config import ComputeConfig, OptimizerConfig
from manipi.train.loop import train
from manipi.train.step import state as state_module
from manipi.train.step.state import NAME, TrainState, format_table, parameter_table, trainable_parameters
from manipi.train.step.step import accumulate_gradients, train_step

RANK = 2
ADAPTERS = Adapters(attention=LoRA(rank=RANK, alpha=2.0), feed_forward=LoRA(rank=RANK, alpha=2.0))
MODES = ("full", "lora", "expert_only", "vision_frozen")
KINDS = ("pi05", "pi0", "pi0_fast")
combinations = pytest.mark.parametrize(
    ("kind", "trained"), [(k, t) for k in KINDS for t in MODES if (k, t) != ("pi0_fast", "expert_only")]
)


def adapted(tiny, kind: str, **settings):
    config = tiny(kind)
    names = ("vlm_adapters",) if kind == "pi0_fast" else ("vlm_adapters", "action_adapters")
    return replace(config, model=replace(config.model, **dict.fromkeys(names, ADAPTERS)), **settings)


def batch_for(config, size: int = 4) -> ModelInput:
    """Random inputs with ragged prompts and chunks that end with their episode."""
    model, rng = config.model, np.random.default_rng(0)
    pixels, length = model.vision.image_size, model.max_token_len
    valid = np.arange(length) < rng.integers(4, length, (size, 1))
    batch = {
        "images": rng.integers(0, 256, (size, len(model.cameras), pixels, pixels, 3), dtype=np.uint8),
        "image_valid": np.ones((size, len(model.cameras)), bool),
        "tokens": rng.integers(2, 200, (size, length)),
        "token_valid": valid,
        "state": rng.normal(size=(size, model.action_dim)),
    }
    if isinstance(model, Pi0FastConfig):
        written = valid & (np.arange(length) > 2)
        # Action codes; even ones would be neutral now and then.
        batch["tokens"] = np.where(written, model.codes.first_id + batch["tokens"] // 2 * 2 + 1, batch["tokens"])
        return ModelInput.from_numpy(batch | {"token_causal": written, "token_loss": written})
    batch["actions"] = rng.normal(size=(size, model.action_horizon, model.action_dim))
    batch["action_valid"] = np.arange(model.action_horizon) < rng.integers(1, model.action_horizon + 1, (size, 1))
    return ModelInput.from_numpy(batch)


def norm_size(width: int, adaptive: bool) -> int:
    return 3 * width * (width + 1) if adaptive else width


def layer(size: GemmaSize, adaptive: bool) -> tuple[int, int]:
    """Numbers of one expert's layer: its own, and its adapters'."""
    d, m, n, g, h = size.width, size.mlp_dim, size.num_heads, size.num_kv_heads, size.head_dim
    own = d * n * h + 2 * d * g * h + n * h * d + 3 * d * m + 2 * norm_size(d, adaptive)
    per_head = sum(heads * RANK * (d + h) for heads in (n, g, g))
    return own, per_head + RANK * n * h + n * d * RANK + 3 * RANK * (d + m)


def vision_size(size: VisionSize, out: int) -> int:
    d, m = size.width, size.mlp_dim
    block = 4 * (d * d + d) + (d * m + m) + (m * d + d) + 2 * 2 * d
    patches = 3 * size.patch_size**2 * d + d + size.num_tokens * d
    return patches + size.depth * block + 2 * d + d * out + out


def counted(model) -> dict[str, dict[str, int]]:
    """By group: all parameters, those of adapters, and those that no loss reaches, of the two kinds."""
    fast, adaptive = isinstance(model, Pi0FastConfig), isinstance(model, Pi05Config)
    own, low = layer(model.vlm, False)
    d, depth = model.vlm.width, model.vlm.depth
    vlm = model.vocab_size * d + depth * own + d
    if fast:
        return {
            "vision": {"own": vision_size(model.vision, d)},
            "vlm": {"own": vlm, "lora": depth * low},
        }
    v = model.vlm
    # The last layer's queries, output, norm and MLP, and the final norm.
    dead = 2 * v.width * v.num_heads * v.head_dim + v.width + 3 * v.width * v.mlp_dim + v.width
    kv_lora = 2 * RANK * v.num_kv_heads * (v.width + v.head_dim)
    e, a = model.action_expert, model.action_dim
    own_e, low_e = layer(e, adaptive)
    expert = depth * own_e + norm_size(e.width, adaptive)
    heads = 2 * (a * e.width) + e.width + a
    heads += (2 * e.width**2 + 2 * e.width) if adaptive else (a * e.width + e.width + 3 * e.width**2 + 2 * e.width)
    return {
        "vision": {"own": vision_size(model.vision, d)},
        "vlm": {"own": vlm, "lora": depth * low, "dead": dead, "dead_lora": low - kv_lora},
        "action_expert": {"own": expert, "lora": depth * low_e},
        "heads": {"own": heads},
    }


def by_hand(model, trained: str) -> dict[str, tuple[int, int]]:
    """Per group: what is trained, and what is not."""
    rows = {}
    for group, count in counted(model).items():
        low, dead_low = (count.get(one, 0) if model.vlm_adapters else 0 for one in ("lora", "dead_lora"))
        own, live, live_low = count["own"], count["own"] - count.get("dead", 0), low - dead_low
        trains = {
            "full": live + live_low,
            "lora": live_low if low else live,
            "expert_only": live + live_low if group in ("action_expert", "heads") else 0,
            "vision_frozen": 0 if group == "vision" else live + live_low,
        }[trained]
        rows[group] = (trains, own + low - trains)
    return rows


@combinations
def test_the_table_by_hand(kind, trained, tiny):
    config = adapted(tiny, kind, trained=trained, frozen_dtype="bfloat16")
    state = TrainState.initial(config)
    rows = parameter_table(state.model, state.parameters, config.optimizer)
    found = {
        group: (sum(r.parameters for r in rows if r.group == group and r.trained),
                sum(r.parameters for r in rows if r.group == group and not r.trained))
        for group in {r.group for r in rows}
    }  # fmt: skip
    assert found == by_hand(config.model, trained)
    assert {r.dtype for r in rows if r.trained} == {"float32"}
    assert {r.peak_lr for r in rows if r.trained} == {config.optimizer.lr}
    in_optimizer = sum(p.numel() for group in state.optimizer.param_groups for p in group["params"])
    if state.rows is not None:  # none of its rows has been read
        in_optimizer += state.parameters["gemma.token_embedding"].numel()
    assert in_optimizer == sum(t for t, _ in found.values())
    assert sum(mean.numel() for mean in state.average.values()) == sum(p.numel() for p in state.optimized.values())


@combinations
def test_a_parameter_has_a_gradient_iff_it_is_trained(kind, trained, tiny):
    config = adapted(tiny, kind, trained=trained)
    state = TrainState.initial(config)
    for parameter in state.model.parameters():
        # Adapters and adaptive norms start at zero, where no gradient flows through them yet.
        torch.nn.init.normal_(parameter, std=0.1)
    accumulate_gradients(state.model, batch_for(config), draws(config), 1)
    parameters = dict(state.model.named_parameters())
    reached = {n for n, p in parameters.items() if p.grad is not None and p.grad.to_dense().abs().max() > 0}
    assert {n for n in state.parameters.keys() ^ reached if "k_proj.bias" not in n} == set()
    assert {name for name, p in parameters.items() if p.requires_grad} == state.parameters.keys()


def draws(config, size: int = 4):
    if isinstance(config.model, Pi0FastConfig):
        return ()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(size, 2, config.model.action_horizon, config.model.action_dim, generator=generator)
    return noise, torch.rand(size, 2, generator=generator)


def test_the_released_sizes():
    """The counts of the full-size policies, from the same formulas."""
    for name, trained in (("pi0_libero", "full"), ("pi05_libero", "full"), ("pi0_libero_low_mem_finetune", "lora")):
        config = load_recipe(name)
        assert config.trained == trained
        if trained == "lora":
            config = replace(config, model=replace(config.model, vlm_adapters=ADAPTERS, action_adapters=ADAPTERS))
        with torch.device("meta"):
            model = VLA(config.policy_model)
        parameters = trainable_parameters(model, trained)
        rows = parameter_table(model, parameters, config.optimizer)
        wanted = by_hand(config.model, trained)
        assert {r.group: r.parameters for r in rows if r.trained} == {g: t for g, (t, _) in wanted.items() if t}


def test_the_table_in_the_run_folder(tiny, tmp_path, capsys):
    config = tiny(steps=1, trained="expert_only", ema_decay=0.0)
    train(config, tmp_path, show=True)
    text = (tmp_path / "parameters.txt").read_text()
    assert text in capsys.readouterr().out
    state = TrainState.initial(config)
    assert text == format_table(parameter_table(state.model, state.parameters, config.optimizer)) + "\n"
    assert [line.split()[:3:2] for line in text.splitlines()[1:-1]] == [
        ["action_expert", "yes"], ["heads", "yes"], ["vision", "no"], ["vlm", "no"]
    ]  # fmt: skip


def test_rates_by_group(tiny):
    config = tiny(optimizer=OptimizerConfig(lr=1e-3, lr_scale=replace(OptimizerConfig().lr_scale, vision=0.1)))
    state = TrainState.initial(config)
    rows = parameter_table(state.model, state.parameters, config.optimizer)
    assert {r.group: r.peak_lr for r in rows if r.trained} == {
        "vision": 1e-4, "vlm": 1e-3, "action_expert": 1e-3, "heads": 1e-3
    }  # fmt: skip
    vision = {id(p) for name, p in state.parameters.items() if name.startswith("vision.")}
    scales = {group["lr_scale"]: {id(p) for p in group["params"]} for group in state.optimizer.param_groups}
    assert scales[0.1] == vision
    assert len(scales) == 2


def test_modes_that_cannot_be(tiny):
    for kind, trained, message in (
        ("pi05", "lora", "a model without any"),
        ("pi0_fast", "expert_only", "no action expert"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny(kind, trained=trained)


# ---- accumulation


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_make_its_step(kind, tiny):
    config = tiny(kind, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0, eps=1e-3))
    found = []
    for accumulate in (1, 2, 4):
        state = TrainState.initial(config)
        metrics, _ = train_step(state, batch_for(config), replace(config, accumulate=accumulate))
        found.append({"loss": metrics["loss"], "norm": metrics["grad_norm"], **state.parameters})
    for parts in found[1:]:
        for name, wanted in found[0].items():
            torch.testing.assert_close(parts[name], wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_parts_are_weighed_by_what_is_real(tiny):
    """A mean over the means of the parts would be another loss: this batch can tell."""
    config = tiny("pi05")
    state, inputs, drawn = TrainState.initial(config), batch_for(config), draws(config)
    parts = [state.model(part, *(d[i : i + 1] for d in drawn)) for i, part in enumerate(inputs.split(4))]
    whole, _ = accumulate_gradients(state.model, inputs, drawn, 4)
    assert float(state.model.loss_weight(inputs, 2)) == sum(float(part.weight) for part in parts)
    assert float(torch.stack([part.loss.detach() for part in parts]).mean()) != pytest.approx(float(whole), rel=1e-3)
    torch.testing.assert_close(whole, state.model(inputs, *drawn).loss.detach())


def test_an_empty_batch_has_no_loss(tiny):
    config = tiny("pi05")
    inputs = replace(batch_for(config), action_valid=torch.zeros(4, config.model.action_horizon, dtype=torch.bool))
    assert float(accumulate_gradients(TrainState.initial(config).model, inputs, draws(config), 2)[0]) == 0.0


def test_a_batch_that_does_not_divide(tiny):
    with pytest.raises(ConfigError, match=r"(?s)a divisor of the batch size 4.*found 3"):
        tiny(accumulate=3)


def test_parts_save_memory(tiny):
    """Bytes that backward keeps, the weights apart: a quarter with four parts."""
    config = tiny("pi05")
    one, four = (peak_of_saved_bytes(TrainState.initial(config).model, config, parts) for parts in (1, 4))
    assert four < 0.3 * one


def peak_of_saved_bytes(model, config, parts: int) -> int:
    held, peak = 0, 0
    weights = {p.data_ptr() for p in model.parameters()}

    class Saved:
        def __init__(self, tensor):
            nonlocal held, peak
            self.tensor, self.size = tensor, 0 if tensor.data_ptr() in weights else tensor.nbytes
            held += self.size
            peak = max(peak, held)

        def __del__(self):
            nonlocal held
            held -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        accumulate_gradients(model, batch_for(config), draws(config), parts)
    return peak


# ---- rows of the token embedding


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
@pytest.mark.parametrize("optimizer", [{}, {"kind": "sgd", "lr": 0.1}])
def test_rows_that_are_never_read_need_no_state(kind, optimizer, tiny, monkeypatch):
    """Ten steps on other prompts each time equal those of a dense state: what is read late has been at rest."""
    config = tiny(kind, optimizer=OptimizerConfig(**{"lr": 1e-3, "eps": 1e-6, "warmup_steps": 2} | optimizer))
    sparse = TrainState.initial(config)
    with monkeypatch.context() as patch:
        patch.setattr(state_module, "rows_are_enough", lambda *_: False)
        dense = TrainState.initial(config)
    assert sparse.rows is not None
    assert dense.rows is None
    inputs, sizes = batch_for(config), []
    for step in range(10):
        tokens = (inputs.tokens + 7 * step) % 250
        for state in (sparse, dense):
            train_step(state, replace(inputs, tokens=tokens), config)
        sizes.append(len(sparse.rows.index))
    assert 0 < sizes[0] < sizes[-1] <= 250 < config.model.vocab_size
    ours, theirs = sparse.inference_weights(), dense.inference_weights()
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-5, atol=1e-6, msg=name)
    untouched = torch.ones(config.model.vocab_size, dtype=torch.bool)
    untouched[sparse.rows.index] = False
    for one, other in ((ours, theirs), (sparse.model.state_dict(), dense.model.state_dict())):
        assert torch.equal(one[NAME][untouched], other[NAME][untouched])
    moments = dense.optimizer.state[dense.parameters[NAME]]
    for name, moment in sparse.optimizer.state[sparse.rows.weight].items():
        if moment.ndim:
            torch.testing.assert_close(moment, moments[name][sparse.rows.index], rtol=1e-4, atol=1e-7, msg=name)
            assert not moments[name][untouched].any()


def test_rows_that_decay_are_dense(tiny):
    for kind, decay, dense in (("pi05", 1e-10, False), ("pi05", 1e-4, True), ("pi0_fast", 1e-10, True)):
        state = TrainState.initial(tiny(kind, optimizer=OptimizerConfig(lr=1e-3, weight_decay=decay)))
        assert (state.rows is None) == dense


def test_a_run_with_new_rows_resumes_exactly(tiny, tmp_path):
    config = tiny("pi0", compute=ComputeConfig(precision="pure_bf16"))
    resumes_exactly(config, tmp_path, shift=9)


@pytest.mark.parametrize("first_dense", [False, True])
def test_rows_and_a_dense_state_go_on_from_each_other(first_dense, tiny, tmp_path, monkeypatch):
    """As when a run of one process is continued by several, which reduce dense gradients."""
    config = tiny("pi0", optimizer=OptimizerConfig(lr=1e-3, eps=1e-6, warmup_steps=2))
    inputs, states = batch_for(config), []
    for dense in (first_dense, not first_dense):
        monkeypatch.setattr(state_module, "rows_are_enough", lambda *_, dense=dense: not dense)
        states.append(TrainState.initial(config))
    undisturbed, other = states
    train_step(undisturbed, inputs, config)
    undisturbed.save(tmp_path / "state")
    other.load(tmp_path / "state")
    for state in states:
        train_step(state, replace(inputs, tokens=(inputs.tokens + 40) % 250), config)
    for name, wanted in undisturbed.inference_weights().items():
        torch.testing.assert_close(other.inference_weights()[name], wanted, rtol=1e-5, atol=1e-6, msg=name)


# ---- precision


@pytest.mark.parametrize(
    ("precision", "weights", "compute"),
    [("bf16", "float32", "bfloat16"), ("fp32", "float32", "float32"), ("pure_bf16", "bfloat16", "bfloat16")],
)
def test_precision(precision, weights, compute, tiny, tmp_path):
    """What is kept and computed in which dtype, and that a resumed run is the undisturbed one."""
    config = tiny(steps=4, compute=ComputeConfig(precision=precision))
    state = TrainState.initial(config)
    assert {str(p.dtype) for p in state.model.parameters()} == {f"torch.{weights}"}
    moments = [m for moments in state.optimizer.state.values() for m in moments.values() if m.ndim]
    assert {str(m.dtype) for m in moments} == {f"torch.{weights}"}
    assert {mean.dtype for mean in state.average.values()} == {torch.float32}
    assert str(state.model.dtype) == f"torch.{compute}"
    resumes_exactly(config, tmp_path)


def resumes_exactly(config, folder, shift: int = 0) -> None:
    """Four steps equal two, a save, a load and two more, bit for bit."""
    whole, parts = TrainState.initial(config), TrainState.initial(config)
    inputs = batch_for(config)
    batches = [replace(inputs, tokens=(inputs.tokens + shift * step) % 250) for step in range(4)]
    for batch in batches:
        train_step(whole, batch, config)
    for batch in batches[:2]:
        train_step(parts, batch, config)
    parts.save(folder / "state")
    resumed = TrainState.initial(config)
    begun = {name: tensor.clone() for name, tensor in resumed._tensors().items()}
    resumed.load(folder / "state")
    for batch in batches[2:]:
        train_step(resumed, batch, config)
    left, right = whole._tensors(), resumed._tensors()
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert any(not torch.equal(left[name], begun[name]) for name in left if name.startswith("weights."))


def test_a_dtype_beside_the_precision(tiny):
    model = replace(tiny().model, dtype="float32")
    assert tiny(model=model).policy_model.dtype == "float32"
    with pytest.raises(ConfigError, match=r"--compute\.precision fp32"):
        tiny(model=model, compute=ComputeConfig(precision="bf16"))


def test_sgd_does_not_round_at_random(tiny):
    with pytest.raises(ConfigError, match=r"choose --optimizer\.kind adamw"):
        tiny(compute=ComputeConfig(precision="pure_bf16"), optimizer=OptimizerConfig(kind="sgd"))


# ---- states of 8 bits


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs manipi[low-bit]")
@pytest.mark.parametrize("precision", ["fp32", "pure_bf16"])
def test_moments_of_8_bits(precision, tiny, tmp_path):
    config = tiny(steps=4, compute=ComputeConfig(precision=precision))
    config = replace(config, optimizer=replace(config.optimizer, state_bits=8))
    state = TrainState.initial(config)
    kinds = {p.numel(): type(state.optimizer.state[p]["exp_avg"]).__name__ for p in state.parameters.values()}
    assert {kind for size, kind in kinds.items() if size >= 4096 and size % 256 == 0} == {"OptimState8bit"}
    resumes_exactly(config, tmp_path)


def test_moments_of_8_bits_without_torchao(tiny, tmp_path, without):
    without("torchao")
    config = tiny(optimizer=OptimizerConfig(state_bits=8))
    with pytest.raises(ConfigError, match=r"(?s)torchao.*pip install 'manipi\[low-bit\]'"):
        train(config, tmp_path, show=False)


def test_sgd_has_no_8_bits():
    with pytest.raises(ConfigError, match="32 for SGD"):
        OptimizerConfig(kind="sgd", state_bits=8)


# ---- a frozen base of 4 bits


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs manipi[low-bit]")
def test_a_base_of_4_bits(tiny, tmp_path):
    config = adapted(tiny, "pi05", trained="qlora", frozen_dtype="bfloat16", steps=2)
    low_rank = TrainState.initial(replace(config, trained="lora"))
    state = TrainState.initial(config)
    assert state.parameters.keys() == low_rank.parameters.keys()
    rows = parameter_table(state.model, state.parameters, config.optimizer)
    assert {r.group: r.parameters for r in rows if r.trained} == {
        group: count for group, (count, _) in by_hand(config.model, "lora").items()
    }
    v, e = config.model.vlm, config.model.action_expert
    norms = {"vlm": 2 * v.width, "action_expert": 2 * norm_size(e.width, True)}
    matrices = {
        "vlm": v.depth * (layer(v, False)[0] - norms["vlm"]),
        "action_expert": e.depth * (layer(e, True)[0] - norms["action_expert"]),
    }
    assert {r.group: r.parameters for r in rows if r.dtype == "nf4"} == matrices
    # 4 bits and a 32-bit factor for 64 of them.
    compressed = [b for n, b in state.model.named_buffers() if n.endswith(("codes", "absmax"))]
    assert sum(b.nbytes for b in compressed) == pytest.approx(sum(matrices.values()) * 4.5 / 8, rel=0.01)

    # What is computed, forth and back, is what the expanded matrices give, which are what is served.
    expanded = TrainState.initial(replace(config, trained="lora"))
    expanded.model.load_state_dict(state.inference_weights())
    inputs, drawn = batch_for(config), draws(config)
    for one in (state, expanded):
        accumulate_gradients(one.model, inputs, drawn, 1)
    for name, parameter in state.parameters.items():
        torch.testing.assert_close(parameter.grad, expanded.parameters[name].grad, msg=name)
    kept = [peak_of_saved_bytes(one.model, config, 1) for one in (state, low_rank)]
    assert kept[0] <= kept[1]
    resumes_exactly(config, tmp_path)
    Policy.load(train(config, tmp_path / "run", show=False))


def test_a_base_of_4_bits_without_bitsandbytes(tiny, tmp_path, without):
    without("bitsandbytes")
    with pytest.raises(ConfigError, match=r"(?s)bitsandbytes.*pip install 'manipi\[low-bit\]'"):
        train(adapted(tiny, "pi05", trained="qlora"), tmp_path, show=False)


# ---- weights to go on from


def test_a_run_goes_on_from_another_whatever_its_adapters(tiny, trained, tmp_path):
    plain = trained("pi0")
    low_rank = adapted(tiny, "pi0", trained="lora", init=str(plain.parents[1]), ema_decay=0.0, steps=2)
    low_rank = replace(low_rank, optimizer=OptimizerConfig(lr=0.05, warmup_steps=0))
    state = TrainState.initial(low_rank, low_rank.init)
    served = load_file(plain / "model.safetensors")
    assert all(torch.equal(state.model.state_dict()[name], value) for name, value in served.items())
    train(low_rank, tmp_path / "low_rank", show=False)
    back = TrainState.initial(tiny("pi0"), str(tmp_path / "low_rank"))
    assert not [name for name in back.parameters if "lora" in name]
    theirs = TrainState.initial(low_rank, str(tmp_path / "low_rank"))
    inputs, drawn = batch_for(low_rank), draws(low_rank)
    found, wanted = (state.model(inputs, *drawn).loss.detach() for state in (back, theirs))
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        for name, parameter in theirs.model.named_parameters():
            parameter.mul_(0.0 if name.endswith("lora_b") else 1.0)
    assert float(theirs.model(inputs, *drawn).loss.detach()) != pytest.approx(float(wanted), rel=1e-4)


def test_adapters_of_another_rank(tiny, tmp_path):
    config = adapted(tiny, "pi05", trained="lora", steps=1)
    train(config, tmp_path / "run", show=False)
    other = Adapters(attention=LoRA(rank=3, alpha=3.0), feed_forward=LoRA(rank=3, alpha=3.0))
    config = replace(config, model=replace(config.model, vlm_adapters=other))
    with pytest.raises(WeightsMismatchError, match=r"lora_a \(4, 32\) instead of \(6, 32\)"):
        TrainState.initial(config, str(tmp_path / "run"))


def test_a_run_without_a_checkpoint(tiny, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="let that run reach its first checkpoint"):
        TrainState.initial(tiny("pi05"), str(tmp_path / "run"))
