"""Every tensor that the reference implementation recorded, against ours. One case per folder of golden/models.

Tolerances are those of golden/README.md.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from manipi.checkpoints.openpi_names import from_openpi_tree, openpi_arrays, to_openpi_tree
from manipi.model import VLA, ModelInput
from manipi.model.attention_mask import attention_mask
from manipi.model.autoregressive import prompt_output
from manipi.model.config import Compat, GemmaSize, Pi0Config, Pi0FastConfig, Pi05Config, VisionSize
from manipi.model.flow import interpolate, timestep_embedding
from manipi.model.gemma import KVCache

SHARED = Path(os.environ.get("MANIPI_SHARED", Path(__file__).parents[2].parent / "shared"))
GOLDEN = SHARED / "golden"
KINDS = {"pi0": Pi0Config, "pi05": Pi05Config, "pi0_fast": Pi0FastConfig}
RECORDED = {path.parent: json.loads(path.read_text()) for path in sorted(GOLDEN.glob("models/*/config.json"))}

pytestmark = pytest.mark.skipif(not RECORDED, reason=f"no golden models under {GOLDEN}; set MANIPI_SHARED")


def folders(*kinds: str) -> list[Path]:
    return [folder for folder, recorded in RECORDED.items() if recorded["kind"] in kinds]


@dataclass(frozen=True)
class Case:
    """One folder: the recorded arrays, and the model with the recorded weights."""

    folder: Path
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    params: dict[str, np.ndarray]
    cameras: tuple[str, ...]
    config: Pi0Config | Pi05Config | Pi0FastConfig

    def model(self, **changes) -> VLA:
        model = VLA(replace(self.config, **changes))
        model.load_state_dict(from_openpi_tree(self.params, self.config))
        return model

    def batch(self, prefix="", **changes) -> ModelInput:
        names = {"tokens": "tokenized_prompt", "token_valid": "tokenized_prompt_mask"}
        if self.inputs.keys() >= {f"{prefix}token_ar_mask"}:
            names |= {"token_causal": "token_ar_mask", "token_loss": "token_loss_mask"}
        arrays = {ours: self.inputs[prefix + theirs] for ours, theirs in names.items()}
        arrays |= {"state": self.inputs["state"], "actions": self.inputs["actions"]}
        for ours, theirs in (("images", "image"), ("image_valid", "image_mask")):
            arrays[ours] = np.stack([self.inputs[f"{theirs}/{camera}"] for camera in self.cameras], axis=1)
        return ModelInput.from_numpy(arrays | changes)

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.inputs[name])

    def close(self, found: torch.Tensor, name: str, atol: float, where=...) -> None:
        expected = self.outputs[name]
        np.testing.assert_allclose(
            found.detach().float().numpy()[where], expected[where], atol=atol, rtol=0, err_msg=name
        )


def load(folder: Path) -> Case:
    recorded = RECORDED[folder]
    inputs, outputs, params = (dict(np.load(folder / f"{name}.npz")) for name in ("inputs", "outputs", "params"))
    cameras = tuple(name.removeprefix("image/") for name in inputs if name.startswith("image/"))
    vision = {key: recorded["siglip"][key] for key in VisionSize.__dataclass_fields__}
    fields = {key: recorded[key] for key in ("vocab_size", "action_dim", "action_horizon", "max_token_len")}
    fields |= {"vision": VisionSize(**vision), "vlm": GemmaSize(**recorded["vlm"])}
    if recorded["action_expert"] is not None:
        fields["action_expert"] = GemmaSize(**recorded["action_expert"])
    # The recorded inputs have no action masks; the FAST quirks are what the reference does.
    quirks = {name: True for name in Compat.__dataclass_fields__ if name.startswith("fast_")}
    compat = Compat(unmasked_loss=True, **quirks)
    config = KINDS[recorded["kind"]](**fields, cameras=cameras, dtype="float32", compat=compat)
    return Case(folder, inputs, outputs, params, cameras, config)


@pytest.fixture(scope="module", params=folders("pi0", "pi05", "pi0_fast"), ids=lambda folder: folder.name)
def case(request):
    return load(request.param)


@pytest.fixture(scope="module", params=folders("pi0", "pi05"), ids=lambda folder: folder.name)
def flow(request):
    return load(request.param)


@pytest.fixture(scope="module", params=folders("pi0_fast"), ids=lambda folder: folder.name)
def fast(request):
    return load(request.param)


@pytest.fixture(scope="module")
def spans(flow):
    """The model, the reference's noisy actions, and the two spans of the joint forward."""
    model, batch = flow.model(), flow.batch()
    timestep = flow.tensor("time")[:, None]
    x, u = interpolate(flow.tensor("noise")[:, None], batch.actions, timestep)
    with torch.no_grad():
        prefix = model.embed_prefix(batch)
        suffix = model.head.suffix(batch.state, x, timestep, torch.float32)
    return model, x, u, prefix, suffix


# ---- every kind


@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: folder.name)
def test_the_folder_is_compared(folder):
    kind = RECORDED[folder]["kind"]
    if kind == "pi0_lora":
        pytest.skip("the model has no adapters yet")
    assert kind in KINDS


def test_image_tokens(case):
    model, batch = case.model(), case.batch()
    with torch.no_grad():
        tokens = model.embed_images(batch.images).unflatten(1, (len(case.cameras), -1))
        patches = model.vision.embed_patches(batch.images[:, 0])
        encoded = patches
        for block in model.vision.blocks:
            encoded = block(encoded)
    for index, camera in enumerate(case.cameras):
        case.close(tokens[:, index], f"siglip/{camera}", 2e-5)
    if "siglip_encoded/base_0_rgb" in case.outputs:
        case.close(patches, "siglip_with_posemb/base_0_rgb", 2e-5)
        case.close(model.vision.final_norm(encoded), "siglip_encoded/base_0_rgb", 2e-5)


def test_gradients(case):
    model = case.model()
    arguments = () if isinstance(case.config, Pi0FastConfig) else (case.tensor("noise"), case.tensor("time"))
    model(case.batch(), *arguments).loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    norm = torch.stack([grad.double().norm() for grad in grads.values()]).norm()
    np.testing.assert_allclose(norm, case.outputs["grad_global_norm"], rtol=1e-3)

    tree, norms = to_openpi_tree(grads, case.config), RECORDED[case.folder]["grad_norm_per_parameter"]
    assert tree.keys() == norms.keys()
    for name, expected in norms.items():
        np.testing.assert_allclose(np.linalg.norm(tree[name]), expected, rtol=1e-3, atol=1e-6, err_msg=name)
    compared = [name.removeprefix("grad/") for name in case.outputs if name.startswith("grad/")]
    assert compared
    for name in compared:
        expected = case.outputs[f"grad/{name}"]
        np.testing.assert_allclose(tree[name], expected, atol=1e-3 * np.abs(expected).max(), rtol=0, err_msg=name)


def test_parameters_come_back(case):
    back = to_openpi_tree(case.model().state_dict(), case.config)
    assert back.keys() == case.params.keys()
    for name, value in case.params.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_full_size_trees(kind):
    """Names, shapes and number of the parameters of the released sizes, and the default settings."""
    tree = json.loads((GOLDEN / "trees" / f"{kind}.json").read_text())
    config = KINDS[kind]()
    with torch.device("meta"):
        model = VLA(config)
    assert sum(p.numel() for p in model.parameters()) == tree["num_parameters"]
    shapes = {name: tuple(array["shape"]) for name, array in tree["parameters"].items()}
    assert {name: array.shape for name, array in openpi_arrays(config).items()} == shapes
    defaults = {key: getattr(config, key) for key in tree["defaults"]}
    assert defaults == tree["defaults"]


# ---- flow


def test_prefix_and_suffix(flow, spans):
    _, x, u, prefix, suffix = spans
    flow.close(prefix.tokens_BTD, "prefix_tokens", 2e-5)
    np.testing.assert_array_equal(prefix.valid_BT, flow.outputs["prefix_mask"])
    assert not prefix.starts_block_BT.any()
    assert not flow.outputs["prefix_ar_mask"].any()
    flow.close(x[:, 0], "x_t", 1e-6)
    flow.close(u[:, 0], "u_t", 1e-6)
    flow.close(suffix.tokens_BTD, "suffix_tokens", 3e-4)
    np.testing.assert_array_equal(suffix.valid_BT, flow.outputs["suffix_mask"])
    np.testing.assert_array_equal(suffix.starts_block_BT[0], flow.outputs["suffix_ar_mask"])
    if "adarms_cond" in flow.outputs:
        flow.close(suffix.cond_BCD[:, 0], "adarms_cond", 3e-4)
    flow.close(timestep_embedding(flow.tensor("time"), suffix.tokens_BTD.shape[-1]), "time_posemb", 3e-4)


def test_mask_and_positions(flow, spans):
    *_, prefix, suffix = spans
    first = prefix.follow(None)
    whole = first.then(suffix.follow(first))
    np.testing.assert_array_equal(attention_mask(whole, whole), flow.outputs["attn_mask"])
    np.testing.assert_array_equal(whole.position, flow.outputs["positions"])


def test_joint_forward(flow, spans):
    model, *_, prefix, suffix = spans
    with torch.no_grad():
        out = model.gemma({"vlm": prefix, "action": suffix})
        velocity = model.head.velocity(out["action"], 1, flow.config.action_horizon)
    flow.close(out["vlm"], "prefix_out", 2e-5, where=flow.outputs["prefix_mask"])
    flow.close(out["action"], "suffix_out", 3e-4)
    flow.close(velocity[:, 0], "v_t", 3e-4)


def test_cache(flow, spans):
    model, *_, prefix, _ = spans
    cache = KVCache()
    with torch.no_grad():
        model.gemma({"vlm": prefix}, cache, commit=True)
    for index, name in enumerate(("kv_cache/k", "kv_cache/v")):
        for layer, keys_values in cache.layers.items():
            expected = flow.outputs[name][layer]
            np.testing.assert_allclose(keys_values[index].numpy(), expected, atol=2e-5, rtol=0, err_msg=name)


def test_flow_loss(flow):
    with torch.no_grad():
        loss = flow.model()(flow.batch(), flow.tensor("noise"), flow.tensor("time"))
    flow.close(loss.per_step, "loss", 3e-4)
    flow.close(loss.loss, "mean_loss", 3e-4)


def test_velocity_at_extreme_times(flow, spans):
    model, *_, prefix, _ = spans
    batch, times = flow.batch(), flow.tensor("extra_times")
    noise = flow.tensor("noise")[:, None].expand(-1, len(times), -1, -1)  # the times as draws on one prefix
    timestep = times.T
    with torch.no_grad():
        x, _ = interpolate(noise, batch.actions, timestep)
        out = model.gemma({"vlm": prefix, "action": model.head.suffix(batch.state, x, timestep, torch.float32)})
        velocity = model.head.velocity(out["action"], len(times), flow.config.action_horizon).transpose(0, 1)
    flow.close(velocity, "extra_v_t", 3e-4)
    flow.close(velocity, "extra_v_t", 2e-5, where=1)


@pytest.mark.parametrize("num_steps", [10, 4])
def test_sampled_actions(flow, num_steps):
    actions = flow.model().sample(flow.batch(), flow.tensor("init_noise"), num_steps)
    flow.close(actions, f"actions_{num_steps}", 3e-4)


@pytest.mark.parametrize("params", ["f32_params", "bf16_params"])
def test_bfloat16_is_no_farther_from_float32_than_the_reference(flow, params):
    recorded = np.load(flow.folder / "outputs_bf16.npz")
    model, batch = flow.model(dtype="bfloat16"), flow.batch()
    if params == "bf16_params":
        model = model.to(torch.bfloat16)
    with torch.no_grad():
        found = {
            "siglip/base_0_rgb": model.embed_images(batch.images)[:, : flow.config.vision.num_tokens],
            "loss": model(batch, flow.tensor("noise"), flow.tensor("time")).per_step,
            "actions_10": model.sample(batch, flow.tensor("init_noise"), 10),
            "actions_4": model.sample(batch, flow.tensor("init_noise"), 4),
        }
    for name, value in found.items():
        exact = flow.outputs[name]
        theirs = np.abs(recorded[f"{params}_bf16_compute/{name}"] - exact).max()
        ours = np.abs(value.float().numpy() - exact).max()
        assert ours <= 1.5 * theirs, f"{name}: {ours:.4f} off, the reference {theirs:.4f}"


# ---- FAST


def logits_of(model: VLA, batch: ModelInput) -> torch.Tensor:
    with torch.no_grad():
        prefix = model.embed_prefix(batch, training=True)
        return model.gemma.logits(prompt_output(model.gemma, prefix, batch.tokens.shape[1]))


def with_masked_image(case: Case) -> dict[str, np.ndarray]:
    name = "masked_image/image_mask/"
    columns = [case.inputs.get(name + camera, case.inputs[f"image_mask/{camera}"]) for camera in case.cameras]
    return {"image_valid": np.stack(columns, axis=1)}


def test_fast_sequence(fast):
    model, batch = fast.model(), fast.batch()
    with torch.no_grad():
        span = model.embed_prefix(batch, training=True)
        out = prompt_output(model.gemma, span, batch.tokens.shape[1])
    layout = span.follow(None)
    fast.close(span.tokens_BTD, "input_tokens", 2e-5)
    np.testing.assert_array_equal(span.valid_BT, fast.outputs["input_mask"])
    np.testing.assert_array_equal(span.starts_block_BT, fast.outputs["ar_mask"])
    np.testing.assert_array_equal(attention_mask(layout, layout), fast.outputs["attn_mask"])
    np.testing.assert_allclose(out, fast.outputs["pre_logits"][:, -out.shape[1] :], atol=2e-5, rtol=0)


def test_fast_logits_and_loss(fast):
    model, batch = fast.model(), fast.batch()
    logits = logits_of(model, batch)
    fast.close(logits, "logits", 1e-4)
    fast.close(logits.log_softmax(-1).gather(-1, batch.tokens[:, 1:, None])[..., 0], "target_logp", 1e-4)
    with torch.no_grad():
        loss = model(batch)
    fast.close(loss.per_sample, "loss", 3e-4)
    fast.close(loss.loss, "mean_loss", 3e-4)


def test_fast_with_a_missing_camera(fast):
    model, batch = fast.model(), fast.batch(**with_masked_image(fast))
    fast.close(logits_of(model, batch), "masked_image/logits", 1e-4)
    with torch.no_grad():
        fast.close(model(batch).per_sample, "masked_image/loss", 3e-4)


@pytest.mark.parametrize("name", ["decode", "decode_masked_image"])
def test_greedy_tokens(fast, name):
    changes = with_masked_image(fast) if name == "decode_masked_image" else {}
    expected = fast.outputs[f"{name}/tokens"]
    ids = fast.model().decode_tokens(fast.batch("decode/", **changes), expected.shape[1])
    np.testing.assert_array_equal(ids, expected)


def test_the_first_token_needs_no_quirk(fast):
    """Quirks act on decoding steps; the prompt, with a missing camera or without, is read alike."""
    plain = fast.model(compat=Compat())
    for name, changes in (("decode", {}), ("decode_masked_image", with_masked_image(fast))):
        ids = plain.decode_tokens(fast.batch("decode/", **changes), 1)
        np.testing.assert_array_equal(ids, fast.outputs[f"{name}/tokens"][:, :1])


def test_eos_ends_a_batch_of_one(fast):
    row = int(fast.inputs["eos/sample_index"])
    whole = fast.batch("decode/")
    one = ModelInput(
        images=whole.images[row : row + 1],
        image_valid=whole.image_valid[row : row + 1],
        state=whole.state[row : row + 1],
        tokens=fast.tensor("eos/tokenized_prompt")[None].long(),
        token_valid=fast.tensor("eos/tokenized_prompt_mask")[None],
    )
    expected = fast.outputs["eos_batch1/tokens"]
    np.testing.assert_array_equal(fast.model().decode_tokens(one, expected.shape[1]), expected)


@pytest.mark.parametrize("writes_past_eos", [True, False])
def test_eos_in_a_batch(fast, writes_past_eos):
    prompt = {
        "tokens": fast.inputs["eos_in_batch/tokenized_prompt"],
        "token_valid": fast.inputs["eos_in_batch/tokenized_prompt_mask"],
    }
    batch = replace(fast.batch("decode/", **prompt), token_causal=None)
    expected = fast.outputs["eos_in_batch/tokens"].copy()
    compat = replace(fast.config.compat, fast_writes_past_eos=writes_past_eos)
    if not writes_past_eos:
        after_eos = np.cumsum(expected == fast.config.eos_token, axis=1) - (expected == fast.config.eos_token) > 0
        assert after_eos.any()
        expected[after_eos] = 0
    np.testing.assert_array_equal(fast.model(compat=compat).decode_tokens(batch, expected.shape[1]), expected)
