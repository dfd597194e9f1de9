"""Joint training: one language model that writes action codes and text, and an action expert beside it (π0.5).

    images │ prompt │ subtask text ┬ action codes "|" EOS       branch K+1, causal; the language model's
                                   ├ noisy actions, draw 1      branch 1; the action expert's
                                   └ noisy actions, draw K      branch K

    query ↓ sees →      images, prompt    text      codes     actions of its draw
    images, prompt      all               –         –         –
    text                all               causal    –         –
    codes               all               all       causal    –
    actions             all               all       –         all

Codes teach, the flow acts: at inference the codes are left out, and the actions do not move, since they never saw them.
With knowledge insulation (Driess et al. 2025, arXiv 2505.23705, eqs. 5 and 6) no gradient passes from the actions into
the keys and values of what came before; the two losses then train disjoint weights.

Shape suffixes: B batch, T prefix tokens, L prompt tokens, N action codes, K noise draws, H action horizon, D width.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from manipi.model.attention import chosen
from manipi.model.autoregressive import hide_codes, last_valid, per_sample
from manipi.model.config import JointConfig
from manipi.model.flow import FlowHead, noisy_suffix, velocity_error
from manipi.model.gemma import Gemma, Span
from manipi.model.inputs import ModelInput

TERMS = ("flow", "codes", "text")


class JointLoss(NamedTuple):
    """The terms of the loss, in the order of `TERMS`; a tuple, because sharding hooks look for gradients inside."""

    loss: Float[Tensor, "3"]
    """Each a mean of its own: over real elements of the velocity, over samples with codes, over samples with text."""
    per_sample: Float[Tensor, "B"]
    """The weighted sum of each sample's own means."""
    weight: Float[Tensor, "3"]
    """How many elements or samples count, to average over batches exactly."""


def joint_loss(
    gemma: Gemma,
    head: FlowHead,
    prefix: Span,
    prompt_len: int,
    inputs: ModelInput,
    noise_BKHA: Float[Tensor, "B K H A"],
    timestep_BK: Float[Tensor, "B K"],
    masks: tuple[Tensor, Tensor],
    config: JointConfig,
) -> JointLoss:
    """All terms from one forward pass; a term that is off costs nothing.

    Args:
        prefix: image and prompt tokens, text included.
        prompt_len: how many of them are the prompt's.
        inputs: with `actions`; with `codes` or `token_loss`, unless these terms are off. Rows that are `hidden` are
            shown none of their fixed codes.
        masks: `action_masks` of the inputs.
    """
    (_, num_draws, horizon, _), num_images = noise_BKHA.shape, prefix.tokens_BTD.shape[1] - prompt_len
    suffix, target_BKHA = noisy_suffix(head, inputs, noise_BKHA, timestep_BK, prefix.tokens_BTD.dtype)
    codes_BN, valid_BN = (inputs.codes, inputs.code_valid) if config.codes_weight else (None, None)
    text_BL = inputs.token_loss if config.text_weight else None
    last, spans = {"action": num_draws * horizon}, {"vlm": prefix, "action": suffix}
    if codes_BN is not None and valid_BN is not None:
        shown_BN = codes_BN[:, :-1]
        if config.codes is not None and inputs.hidden is not None:
            shown_BN = hide_codes(shown_BN, inputs.hidden, config.codes)
        spans["vlm"] = _with_codes(gemma, prefix, shown_BN, valid_BN[:, :-1], num_draws + 1)
    if codes_BN is not None or text_BL is not None:
        last["vlm"] = spans["vlm"].tokens_BTD.shape[1] - num_images  # nothing is read from the pictures
    out = gemma(spans, outputs=last, last=last, insulate=config.insulate)
    flow = velocity_error(head.velocity(out["action"], num_draws, horizon), target_BKHA, masks)
    samples = {"flow": flow.per_step.flatten(1).mean(1)} | dict.fromkeys(
        TERMS[1:], torch.zeros_like(inputs.state[:, 0])
    )
    if codes_BN is not None and valid_BN is not None:
        # The first code is predicted by the last token of the prompt, whose place differs from row to row.
        first_B1D = chosen(out["vlm"], last_valid(prefix.valid_BT) - num_images)
        out_BND = torch.cat([first_B1D, out["vlm"][:, prompt_len:]], dim=1)
        samples["codes"], _ = per_sample(gemma, out_BND, codes_BN, valid_BN, config.codes)
    if text_BL is not None:
        out_BLD = out["vlm"][:, : prompt_len - 1]
        samples["text"], _ = per_sample(gemma, out_BLD, inputs.tokens[:, 1:prompt_len], text_BL[:, 1:prompt_len])
    weight = torch.stack([flow.weight, *samples_with(inputs)])
    means = [samples[name].sum() / count.clamp(min=1) for name, count in zip(TERMS[1:], weight[1:], strict=True)]
    per_sample_B = torch.stack([one * samples[name] for name, one in zip(TERMS, config.weights, strict=True)]).sum(0)
    return JointLoss(torch.stack([flow.loss, *means]), per_sample_B, weight)


def samples_with(inputs: ModelInput) -> list[Tensor]:
    """How many samples have codes, and how many have text to learn."""
    marks = (inputs.code_valid, None if inputs.token_loss is None else inputs.token_loss[:, 1:])
    none = torch.zeros((), device=inputs.state.device)
    return [none if mark is None else mark.any(dim=1).sum().float() for mark in marks]


def _with_codes(gemma: Gemma, prefix: Span, codes_BN: Tensor, valid_BN: Tensor, branch: int) -> Span:
    """The prefix followed by codes on a branch of their own, each of which sees those before it."""
    trunk_BT = torch.zeros_like(prefix.starts_block_BT, dtype=torch.long)
    return replace(
        prefix,
        tokens_BTD=torch.cat([prefix.tokens_BTD, gemma.embed(codes_BN, prefix.tokens_BTD.dtype)], dim=1),
        valid_BT=torch.cat([prefix.valid_BT, valid_BN], dim=1),
        starts_block_BT=torch.cat([prefix.starts_block_BT, torch.ones_like(valid_BN)], dim=1),
        branch_BT=torch.cat([trunk_BT, torch.full_like(codes_BN, branch)], dim=1),
        all_valid=False,
        one_block=False,
    )
