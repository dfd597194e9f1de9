"""Every array that the reference recorded of a model, against ours: float32, bfloat16, and another LoRA factor."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import ABSENT, CASES, Arrays, Case, change_adapters, keys, keys_of, over, read_arrays
from openpi_trees import to_openpi_tree
from quantities import Quantities, as_numpy, decoding_batch, quantities, recorded_calls
from tolerances import BFLOAT16, OUTPUTS, Tolerance, tolerance_of
from torch.nn.utils.rnn import pad_sequence

from manipi.model import VLA, ModelInput
from manipi.model.config import Adapters, Compat, JointConfig, Pi05Config
from manipi.model.joint import TERMS

pytestmark = pytest.mark.skipif(not CASES, reason=ABSENT)

FILES = ("config.json", "params.npz", "inputs.npz", "outputs.npz", "outputs_bf16.npz", "outputs_alt_alpha.npz")
FOLDERS = ("ckpt_pure", "ckpt_train", "ckpt_sharded")
PARAMETERS = {"f32_params_bf16_compute": torch.float32, "bf16_params_bf16_compute": torch.bfloat16}


@cache
def ours(case: Case) -> Quantities:
    return quantities(case, case.model(), [*case.outputs, "grad"])


def look_up(name: str, found: Quantities) -> np.ndarray:
    assert name in found, f"unread golden keys: {name} is nothing that we compute"
    return as_numpy(found[name])


def parts(case: Case, name: str, found: np.ndarray, expected: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What of an array is compared, by the name that its tolerance goes by."""
    if name == "prefix_out":  # rows of masked tokens carry no meaning
        valid = case.outputs["prefix_mask"]
        return {name: (found[valid], expected[valid])}
    if name.endswith(("/time", "/positions")):  # the last one is read by nobody
        return {name: (found, expected[..., : found.shape[-1]])}
    if name == "extra_v_t":
        near = case.inputs["extra_times"].max(axis=1) < 0.05
        return {name: (found[~near], expected[~near]), f"{name} near 0": (found[near], expected[near])}
    return {name: (found, expected)}


def compare(case: Case, name: str, found: Quantities, expected: np.ndarray, measure: Callable) -> None:
    for part, (mine, theirs) in parts(case, name, look_up(name, found), expected).items():
        row = tolerance_of(part, OUTPUTS)
        measure(row.quantity, row.error(mine, theirs), row.limit)


@over("case", values=CASES)
def test_the_folder_is_read(case):
    """Files that no test knows would be skipped without a word."""
    unknown = [p.name for p in case.folder.iterdir() if p.name not in FILES + FOLDERS and p.stem[:11] != "train_trace"]
    assert not unknown
    assert (case.recorded["siglip"]["pool"], case.recorded["siglip"]["posemb"]) == ("none", "learned")
    assert case.config.cameras


@over("case", values=CASES)
def test_parameters_come_back(case, measure):
    model = case.model()
    assert sum(p.numel() for p in model.parameters()) == case.recorded["num_parameters"]
    assert len(case.params) == case.recorded["num_parameter_arrays"]
    back = to_openpi_tree(model.state_dict(), case.config)
    assert back.keys() == case.params.keys()
    measure("parameters there and back", max(np.abs(back[k] - v).max() for k, v in case.params.items()), 0)


@over("case", "file", "name", values=keys(CASES, "outputs.npz"))
def test_outputs(case, file, name, measure):
    compare(case, name, ours(case), case.outputs[name], measure)


@over("case", values=CASES)
def test_gradient_norms(case, measure):
    norms = case.recorded["grad_norm_per_parameter"]
    assert norms.keys() == case.params.keys()
    for path, expected in norms.items():
        row = tolerance_of(name := f"grad_norm/{path}", OUTPUTS)
        measure(row.quantity, row.error(look_up(name, ours(case)), np.array(expected)), row.limit)


# ---- adapters


@cache
def with_alpha(case: Case, alpha: float, names: tuple[str, ...]) -> Quantities:
    def change(adapters: Adapters) -> Adapters:
        return Adapters(**{name: lora and replace(lora, alpha=alpha) for name, lora in vars(adapters).items()})

    return quantities(case, case.model(**vars(change_adapters(case.config, change))), list(names))


@over("case", "file", "name", values=keys(CASES, "outputs_alt_alpha.npz", skip="alpha"))
def test_outputs_with_another_alpha(case, file, name, measure):
    expected = read_arrays(file)
    names = tuple(key for key in expected if key != "alpha")
    compare(case, name, with_alpha(case, float(expected["alpha"]), names), expected[name], measure)


# ---- bfloat16


@cache
def in_bfloat16(case: Case, file: Path, parameters: str) -> tuple[Arrays, Quantities]:
    names = [key.removeprefix(f"{parameters}/") for key in keys_of(file) if key.startswith(f"{parameters}/")]
    model = case.model(dtype="bfloat16").to(PARAMETERS[parameters])
    return read_arrays(file), quantities(case, model, names)


@over("case", "file", "key", values=keys(CASES, "outputs_bf16.npz"))
def test_bfloat16_is_no_farther_from_float32_than_the_reference(case, file, key, measure):
    parameters, _, name = key.partition("/")
    assert parameters in PARAMETERS, f"unread golden keys: {key}"
    recorded, found = in_bfloat16(case, file, parameters)
    exact, mine = case.outputs[name], look_up(name, found)
    absolute = Tolerance(name, BFLOAT16, "absolute", name)
    theirs = max(absolute.error(*pair[::-1]) for pair in parts(case, name, exact, recorded[key]).values())
    error = max(absolute.error(*pair) for pair in parts(case, name, mine, exact).values())
    if theirs == 0:  # one unit in the last place of bfloat16, at the scale of the values
        theirs = 2.0**-7 * float(np.abs(exact).max(initial=0.0))
    row = tolerance_of(name, OUTPUTS).quantity
    measure(f"bfloat16, times the reference's own error: {row}", error / theirs if error else 0.0, BFLOAT16)


# ---- π0-FAST without the quirks

FAST = [case for case, _, key in keys(CASES, "outputs.npz") if key == "eos_in_batch/tokens"]


@over("case", values=FAST)
def test_the_first_token_needs_no_quirk(case):
    """Quirks act on decoding steps; the prompt, with a missing camera or without, is read alike."""
    plain = case.model(compat=replace(Compat(), unscaled_feed_forward_lora=True))
    for name in {"decode", "decode_masked_image"} & {key.split("/")[0] for key in case.outputs}:
        ids = plain.decode_tokens(decoding_batch(case, name), 1)
        np.testing.assert_array_equal(ids, case.outputs[f"{name}/tokens"][:, :1])


@over("case", values=FAST)
def test_without_the_quirk_zeros_follow_eos(case):
    expected = case.outputs["eos_in_batch/tokens"].copy()
    is_eos = expected == case.recorded["eos_token"]
    expected[np.cumsum(is_eos, axis=1) - is_eos > 0] = 0
    compat = replace(case.config.compat, fast_writes_past_eos=False)
    ids = case.model(compat=compat).decode_tokens(decoding_batch(case, "eos_in_batch"), expected.shape[1])
    np.testing.assert_array_equal(ids, expected)


# ---- π0.5 with π0-FAST's weights


def joint_model(case: Case) -> VLA:
    """Language model and image encoder are the recorded ones; beside them stands an action expert of other widths."""
    config = case.config
    shared = {field.name: getattr(config, field.name) for field in fields(config) if field.name in SHARED}
    expert = replace(config.vlm, width=config.vlm.width // 2, mlp_dim=config.vlm.mlp_dim // 2)
    model = VLA(Pi05Config(**shared, action_expert=expert, joint=JointConfig(text_weight=0)))
    found = model.load_state_dict(case.model().state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all(name.startswith("head.") or ".action" in name for name in found.missing_keys)
    return model


SHARED = ("vision", "vlm", "vocab_size", "action_dim", "action_horizon", "max_token_len", "cameras", "dtype", "compat")


def joint_batch(case: Case) -> ModelInput:
    """The recorded sequences: what all see is the prompt, what is causal are the codes, padded each for itself.

    Of π0.5's own prompt "Action: " ends the trunk, where here it begins the codes; the tokens are the same ones.
    """
    batch, ids = case.batch(), case.tensor("tokenized_prompt").long()
    rows = {"tokens": batch.token_valid & ~batch.token_causal, "codes": batch.token_causal & batch.token_valid}
    found = {name: pad_sequence([ids[b, row] for b, row in enumerate(mask)], True) for name, mask in rows.items()}
    valid = {name: torch.arange(found[name].shape[1]) < mask.sum(1, keepdim=True) for name, mask in rows.items()}
    marks = {"token_valid": valid["tokens"], "code_valid": valid["codes"], "token_causal": None, "token_loss": None}
    return replace(batch, **found, **marks)


@over("case", values=FAST)
def test_a_joint_model_of_the_same_weights_says_the_same(case, measure):
    """Loss, logits and gradients of the codes, beside the flow of three noise draws; and what it decodes.

    The batch without a camera is left out: the reference counts the positions of what is masked in training, joint
    training does not.
    """
    model, draws = joint_model(case), 3
    noise = torch.randn(2, draws, case.config.action_horizon, case.config.action_dim)
    with recorded_calls(model.gemma, "logits") as logits:
        loss = model(joint_batch(case), noise, torch.rand(2, draws))
    learned = case.inputs["token_loss_mask"][:, 1:]
    assert np.array_equal(learned, (case.inputs["token_ar_mask"] * case.inputs["tokenized_prompt_mask"])[:, 1:])
    loss.loss[TERMS.index("codes")].backward()
    own = case.model().state_dict()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters() if n in own}
    assert not any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n not in own)
    tree = {path: torch.from_numpy(grad) for path, grad in to_openpi_tree(grads, case.config).items()}
    found = {f"grad/{path}": grad for path, grad in tree.items()}
    found |= {f"grad_norm/{path}": grad.double().norm() for path, grad in tree.items()}
    found |= {"mean_loss": loss.loss[TERMS.index("codes")], "logits": logits[0][1]}
    norms = {f"grad_norm/{path}": np.array(v) for path, v in case.recorded["grad_norm_per_parameter"].items()}
    expected = norms | {name: case.outputs[name] for name in case.outputs if name.startswith("grad/")}
    expected |= {"mean_loss": case.outputs["mean_loss"], "logits": case.outputs["logits"][learned]}
    for name, theirs in expected.items():
        row = tolerance_of(name, OUTPUTS)
        measure(f"joint: {row.quantity}", row.error(as_numpy(found[name]), theirs), row.limit)
    tokens = case.outputs["decode/tokens"]
    ids = model.decode_tokens(decoding_batch(case, "decode"), tokens.shape[1], eos_token=case.recorded["eos_token"])
    np.testing.assert_array_equal(ids, tokens)
