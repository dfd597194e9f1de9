"""What our model computes for a recorded case, under the names that the reference gave its arrays."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from golden import Case
from openpi_trees import to_openpi_tree
from torch import Tensor

from manipi.model import VLA, ModelInput
from manipi.model.attention import attention_mask, joined
from manipi.model.autoregressive import prompt_output
from manipi.model.config import Pi0FastConfig
from manipi.model.flow import interpolate, timestep_embedding
from manipi.model.gemma import KVCache
from manipi.model.siglip import embed_patches

Quantities = dict[str, Tensor]


def quantities(case: Case, model: VLA, names: list[str]) -> Quantities:
    """Ours for the recorded names; without those that we do not know."""
    groups = fast_groups(case, model) if isinstance(case.config, Pi0FastConfig) else flow_groups(case, model, names)
    found: Quantities = {}
    for pattern, compute in groups:
        if any(re.match(pattern, name) for name in names):
            found |= compute()
    return found


Group = tuple[str, Callable[[], Quantities]]


def flow_groups(case: Case, model: VLA, names: list[str]) -> Iterator[Group]:
    yield "siglip", partial(image_tokens, case, model)
    yield "(?!siglip|grad|kv_cache|extra|actions|traj)", partial(joint_forward, case, model)
    yield "kv_cache", partial(keys_values, case, model)
    yield "extra_v_t", partial(extra_velocity, case, model)
    for steps in sorted({name.split("/")[0].split("_")[1] for name in names if re.match(r"(actions|traj)_\d+", name)}):
        yield f"(actions|traj)_{steps}", partial(sampling, case, model, int(steps))
    yield "grad", partial(gradients, case, model)


def fast_groups(case: Case, model: VLA) -> Iterator[Group]:
    yield "siglip", partial(image_tokens, case, model)
    yield "(?!siglip|grad|masked_image|decode|eos)", partial(sequence, case, model, "")
    yield "masked_image/", partial(sequence, case, model, "masked_image/")
    for name in ("decode", "decode_masked_image", "eos_batch1", "eos_in_batch"):
        yield f"{name}/", partial(decoding, case, model, name)
    yield "grad", partial(gradients, case, model)


@torch.no_grad()
def image_tokens(case: Case, model: VLA) -> Quantities:
    images = case.batch().images
    tokens = model.embed_images(images).unflatten(1, (len(case.cameras), -1))
    found = {f"siglip/{camera}": tokens[:, index] for index, camera in enumerate(case.cameras)}
    vision = model.vision
    for index, camera in enumerate(case.cameras):
        encoded = found[f"siglip_with_posemb/{camera}"] = embed_patches(
            images[:, index], vision.patch_size, vision.patch_embedding, vision.position_embedding
        )
        for block in model.vision.blocks:
            encoded = block(encoded, model.dtype)
        found[f"siglip_encoded/{camera}"] = model.vision.final_norm(encoded)
    return found


def gradients(case: Case, model: VLA) -> Quantities:
    model.zero_grad()
    draws = () if isinstance(case.config, Pi0FastConfig) else (case.tensor("noise"), case.tensor("time"))
    model(case.batch(), *draws).loss.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    tree = {path: torch.from_numpy(grad) for path, grad in to_openpi_tree(grads, case.config).items()}
    norms = {path: torch.linalg.vector_norm(grad.double()) for path, grad in tree.items()}
    trained = [norm for path, norm in norms.items() if path not in case.frozen]
    whole = {"grad_global_norm": list(norms.values()), "grad_global_norm_trainable": trained}
    return (
        {f"grad/{path}": grad for path, grad in tree.items()}
        | {f"grad_norm/{path}": norm for path, norm in norms.items()}
        | {name: torch.stack(parts).norm() for name, parts in whole.items()}
    )


# ---- flow


@torch.no_grad()
def joint_forward(case: Case, model: VLA) -> Quantities:
    batch, noise, time = case.batch(), case.tensor("noise"), case.tensor("time")
    x, u = interpolate(noise[:, None], batch.actions, time[:, None])
    prefix, suffix = model.embed_prefix(batch), model.head.suffix(batch.state, x, time[:, None], model.dtype)
    # The reference's have not been cast to the compute dtype yet.
    float32 = model.head.suffix(batch.state, x, time[:, None], torch.float32)
    first = prefix.follow(())
    whole = joined((first, suffix.follow((first,))))
    out = model.gemma({"vlm": prefix, "action": suffix})
    loss = model(batch, noise, time)
    found = {
        "prefix_tokens": prefix.tokens_BTD,
        "prefix_mask": prefix.valid_BT,
        "prefix_ar_mask": prefix.starts_block_BT[0],
        "suffix_tokens": float32.tokens_BTD,
        "suffix_mask": suffix.valid_BT,
        "suffix_ar_mask": suffix.starts_block_BT[0],
        "time_posemb": timestep_embedding(time, suffix.tokens_BTD.shape[-1]),
        "x_t": x[:, 0],
        "u_t": u[:, 0],
        "attn_mask": attention_mask(whole, whole),
        "positions": whole.position,
        "prefix_out": out["vlm"],
        "suffix_out": out["action"],
        "v_t": model.head.velocity(out["action"], 1, case.config.action_horizon)[:, 0],
        "loss": loss.per_step,
        "mean_loss": loss.loss,
    }
    return found if suffix.cond is None else found | {"adarms_cond": float32.cond.rows_BCD[:, 0]}


@torch.no_grad()
def keys_values(case: Case, model: VLA) -> Quantities:
    cache = KVCache()
    model.gemma({"vlm": model.embed_prefix(case.batch())}, cache, commit=True)
    pairs = [cache.layers[layer] for layer in range(len(cache.layers))]
    return {f"kv_cache/{name}": torch.stack([pair[i].transpose(1, 2) for pair in pairs]) for i, name in enumerate("kv")}


@torch.no_grad()
def extra_velocity(case: Case, model: VLA) -> Quantities:
    """The recorded times are as many draws on one prefix."""
    batch, times_BK = case.batch(), case.tensor("extra_times").T
    noise = case.tensor("noise")[:, None].expand(-1, times_BK.shape[1], -1, -1)
    x, _ = interpolate(noise, batch.actions, times_BK)
    suffix = model.head.suffix(batch.state, x, times_BK, model.dtype)
    out = model.gemma({"vlm": model.embed_prefix(batch), "action": suffix})["action"]
    return {"extra_v_t": model.head.velocity(out, times_BK.shape[1], case.config.action_horizon).transpose(0, 1)}


def sampling(case: Case, model: VLA, steps: int) -> Quantities:
    """The result of `sample`, and what went into and came out of the head on the way."""
    with recorded_calls(model.head, "suffix") as suffixes, recorded_calls(model.head, "velocity") as velocities:
        actions = model.sample(case.batch(), case.tensor("init_noise"), steps)
    states = [arguments[1][:, 0] for arguments, _ in suffixes]
    return {
        f"actions_{steps}": actions,
        f"traj_{steps}/x": torch.stack([*states, actions]),
        # Time after the last step is read by nobody.
        f"traj_{steps}/time": torch.stack([arguments[2][0, 0] for arguments, _ in suffixes]),
        f"traj_{steps}/v": torch.stack([velocity[:, 0] for _, velocity in velocities]),
    }


# ---- FAST


@torch.no_grad()
def sequence(case: Case, model: VLA, masks: str) -> Quantities:
    """Training on whole sequences; `masks` names other camera masks, and what comes of them."""
    batch = case.batch(masks=masks)
    span = model.embed_prefix(batch, training=True)
    layout = span.follow(())
    pre_logits = prompt_output(model.gemma, span, span.tokens_BTD.shape[1])
    logits = model.gemma.logits(pre_logits[:, -(batch.tokens.shape[1] - 1) :])
    loss = model(batch)
    found = {
        "input_tokens": span.tokens_BTD,
        "input_mask": span.valid_BT,
        "ar_mask": span.starts_block_BT,
        "attn_mask": attention_mask(layout, layout),
        "pre_logits": pre_logits,
        "logits": logits,
        "target_logp": logits.log_softmax(-1).gather(-1, batch.tokens[:, 1:, None])[..., 0],
        "loss": loss.per_sample,
        "mean_loss": loss.loss,
    }
    return {masks + name: value for name, value in found.items()}


def decoding(case: Case, model: VLA, name: str) -> Quantities:
    """Greedy tokens, and the logits and positions that `decode_tokens` went through."""
    expected = case.outputs[f"{name}/tokens"]
    batch = decoding_batch(case, name)
    with recorded_calls(model.gemma, "logits") as logits, recorded_calls(model.gemma, "forward") as forwards:
        tokens = model.decode_tokens(batch, expected.shape[1])
    logits_BTV = torch.stack([value for _, value in logits], dim=1)
    best = logits_BTV.topk(2).values
    found = {
        "tokens": tokens,
        "logits": logits_BTV,
        "top2_margin": best[..., 0] - best[..., 1],
        # The first call reads the prompt, and nobody reads the last token.
        "positions": torch.cat([spans["vlm"].position_BT for (spans, *_), _ in forwards[1:]], dim=1),
        "prefill_len": model.embed_prefix(batch).valid_BT.sum(1),
    }
    return {f"{name}/{key}": value for key, value in found.items()}


def decoding_batch(case: Case, name: str) -> ModelInput:
    """The prompts of a decoding case, whose causal tokens and losses do not matter."""
    masks = "masked_image/" if name == "decode_masked_image" else ""
    batch = case.batch("decode/", masks=masks)
    prompt = {"decode": "decode", "decode_masked_image": "decode", "eos_batch1": "eos", "eos_in_batch": "eos_in_batch"}
    ids, valid = (case.tensor(f"{prompt[name]}/tokenized_prompt{end}") for end in ("", "_mask"))
    if ids.ndim == 2:
        return replace(batch, tokens=ids.long(), token_valid=valid, token_causal=None, token_loss=None)
    row = slice(int(case.inputs["eos/sample_index"]), int(case.inputs["eos/sample_index"]) + 1)
    pictures = {"images": batch.images[row], "image_valid": batch.image_valid[row], "state": batch.state[row]}
    return ModelInput(**pictures, tokens=ids[None].long(), token_valid=valid[None])


@contextmanager
def recorded_calls(owner: torch.nn.Module, method: str) -> Iterator[list[tuple[tuple, Tensor]]]:
    """Arguments and result of every call of a method, which goes on as before."""
    original, calls = getattr(owner, method), []

    def call(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append((args, result))
        return result

    setattr(owner, method, call)
    try:
        yield calls
    finally:
        delattr(owner, method)


def as_numpy(value: Tensor) -> np.ndarray:
    value = value.detach()
    return (value.float() if value.is_floating_point() and value.dtype != torch.float64 else value).numpy()
