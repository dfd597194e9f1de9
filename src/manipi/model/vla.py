"""A vision-language-action policy: SigLIP, Gemma and a head, put together as the config says.

    images [B, C, h, w, 3] ──SigLIP──▶ image tokens ─┐
                                                     ├─ prefix ─▶ Gemma "vlm" ────▶ next tokens    (π0-FAST)
    tokens [B, L] ──────embedding──▶ prompt tokens ──┘                │
                                                           keys and values
                                                                      ▼
    state, noisy actions, timestep ────────────────── suffix ─▶ Gemma "action" ──▶ velocity       (π0, π0.5)

Shape suffixes: B batch, C camera slots, P image tokens, L prompt tokens, T all prefix tokens, K noise draws,
H action horizon, A action dimensions, D width.
"""

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor, nn

from manipi.errors import ConfigError
from manipi.model.autoregressive import AllowedNext, TokenLoss, greedy_decode, token_loss
from manipi.model.config import Adapters, ModelConfig, Pi0Config, Pi0FastConfig, Pi05Config
from manipi.model.flow import FlowHead, FlowLoss, Pi0Head, Pi05Head, flow_loss, interpolate
from manipi.model.gemma import Expert, Gemma, KVCache, Span
from manipi.model.inputs import ModelInput
from manipi.model.layers import Initialised
from manipi.model.rtc import given_steps, sample_on
from manipi.model.shards import fill
from manipi.model.siglip import SigLIP
from manipi.model.trim import Kept, everything


class VLA(nn.Module):
    """π0, π0.5 or π0-FAST, by the type of its config.

    Args:
        trim: compute no pictures and tokens that are masked; without it, all of them, to the same result.

    Parameters are created in float32 and filled by `init_weights(seed=0)`. For a large model, create it under
    `torch.device("meta")`, then `to_empty(device=…)` and load or initialise the weights.
    """

    def __init__(self, config: ModelConfig, *, trim: bool = True):
        super().__init__()
        self.config, self.trim = config, trim
        self.dtype = getattr(torch, config.dtype)
        self.vision = SigLIP(config.vision, config.vlm.width)
        experts = {"vlm": Expert(size=config.vlm, adapters=self._adapters(config.vlm_adapters))}
        if not isinstance(config, Pi0FastConfig):
            experts["action"] = Expert(
                size=config.action_expert,
                adapters=self._adapters(config.action_adapters),
                adaptive_norm=isinstance(config, Pi05Config),
            )
            head = Pi0Head if isinstance(config, Pi0Config) else Pi05Head
            self.head = head(config.action_expert.width, config.action_dim)
        self.gemma = Gemma(experts, config.vocab_size)
        self.init_weights(seed=0)

    def init_weights(self, seed: int) -> None:
        """Fill every parameter. The same seed gives the same weights on any device and over any number of processes.

        linear layers           normal, std 1/√fan_in; bias 0
        token embedding         normal, std 1/√width: unit variance after the multiplication by √width
        image position table    normal, std 1/√width
        norm scales             identity: 0 for RMS norms (their factor is 1 + scale), 1 for layer norms
        adaptive modulation     0, so that the action expert starts as the identity (adaLN-zero)
        adapters                A normal, std 1/√fan_in; B 0, so that the update starts at nothing
        """
        if next(self.parameters()).is_meta:
            return
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if module is not self and isinstance(module, Initialised):
                _init_whole(module, generator)

    def forward(
        self,
        inputs: ModelInput,
        noise: Float[Tensor, "B *K H A"] | None = None,
        timestep: Float[Tensor, "B *K"] | None = None,
    ) -> FlowLoss | TokenLoss:
        """The training loss, and the only way into training: sharding hooks act on this call.

        Args:
            inputs: with `actions` (flow policies) or `token_causal` and `token_loss` (π0-FAST). With `delay`, so many
                first steps are given clean and do not count (arXiv 2512.05964).
            noise: flow policies: standard normal; with an axis K, that many draws share one prefix.
            timestep: flow policies: in [0, 1], 1 being pure noise.
        """
        if isinstance(self.config, Pi0FastConfig):
            assert noise is None, "π0-FAST has no use for noise"
            assert inputs.token_loss is not None, "training needs token_loss"
            kept = self._kept(inputs)
            prompt = (inputs.tokens[:, : kept.prompt_len], inputs.token_loss[:, : kept.prompt_len])
            return token_loss(self.gemma, self.embed_prefix(inputs, kept, training=True), *prompt)
        assert noise is not None, "a flow policy needs noise"
        assert timestep is not None, "a flow policy needs timesteps"
        if noise.ndim == 3:
            loss, per_step, weight = self._flow_loss(inputs, noise[:, None], timestep[:, None])
            return FlowLoss(loss, per_step[:, 0], weight)
        return self._flow_loss(inputs, noise, timestep)

    def loss_weight(self, inputs: ModelInput, num_draws: int = 1) -> Float[Tensor, ""]:
        """How much the batch counts in a mean over batches: the `weight` that `forward` returns, from its masks."""
        if isinstance(self.config, Pi0FastConfig):
            return torch.tensor(float(inputs.batch_size), device=inputs.tokens.device)
        step_valid_BH, dim_valid_BA = self._action_masks(inputs)
        return num_draws * (step_valid_BH.sum(1) * dim_valid_BA.sum(1)).sum().float()

    @torch.no_grad()
    def sample(
        self, inputs: ModelInput, noise: Float[Tensor, "B *K H A"], num_steps: int = 10, max_delay: int = 0
    ) -> Float[Tensor, "B *K H A"]:
        """Action chunks by `num_steps` Euler steps from timestep 1 to 0; the prefix runs once.

        Padded dimensions follow their true velocity, which is their noise because their action is zero: the model sees
        there what it saw in training, although the loss never taught it to predict them.

        Args:
            inputs: with `delay`, `actions` and `action_valid` are what is left of the previous chunk, which the new one
                goes on from (`manipi.model.rtc`).
            max_delay: the longest prefix that the weights were trained with; longer delays are met by guidance.

        Raises:
            ConfigError: the policy has no flow head.
        """
        if noise.ndim == 3:
            return self.sample(inputs, noise[:, None], num_steps, max_delay)[:, 0]
        head = self._flow_head("decode_tokens")
        cache = KVCache()
        self.gemma({"vlm": self.embed_prefix(inputs, self._kept(inputs))}, cache, commit=True, outputs=())
        _, dim_valid = self._action_masks(inputs)

        def velocity(x_BKHA: Tensor, timestep: Tensor | float, given_BH: Tensor | None = None) -> Tensor:
            timestep_BK = torch.as_tensor(timestep, device=noise.device).expand(noise.shape[:2])
            suffix = head.suffix(inputs.state, x_BKHA, timestep_BK, self.dtype, given_BH)
            out_BTD = self.gemma({"action": suffix}, cache)["action"]
            velocity_BKHA = head.velocity(out_BTD, *noise.shape[1:3])
            return torch.where(dim_valid[:, None, None], velocity_BKHA, noise)

        if inputs.delay is not None:
            return sample_on(velocity, inputs, noise, num_steps, max_delay)
        x_BKHA, timestep = noise, torch.ones((), device=noise.device)
        for _ in range(num_steps):
            x_BKHA, timestep = x_BKHA - velocity(x_BKHA, timestep) / num_steps, timestep - 1.0 / num_steps
        return x_BKHA

    @torch.no_grad()
    def decode_tokens(
        self, inputs: ModelInput, max_tokens: int = 256, allowed_next: AllowedNext | None = None
    ) -> Int64[Tensor, "B max_tokens"]:
        """Greedily decoded token ids after the prompt; zeros follow a row's EOS.

        Args:
            allowed_next: restricts the next token by the ids so far.

        Raises:
            ConfigError: the policy does not write tokens.
        """
        if not isinstance(self.config, Pi0FastConfig):
            raise self._wrong_policy("Pi0FastConfig", "sample")
        # With that quirk, masked pictures and padding are read after all.
        kept = None if self.config.compat.fast_contiguous_cache else self._kept(inputs)
        return greedy_decode(
            self.gemma,
            self.embed_prefix(inputs, kept),
            max_tokens,
            eos_token=self.config.eos_token,
            compat=self.config.compat,
            allowed_next=allowed_next,
        )

    def embed_prefix(self, inputs: ModelInput, kept: Kept | None = None, *, training: bool = False) -> Span:
        """Image and prompt tokens as one span: one block, except for the causal tokens of π0-FAST.

        Args:
            kept: what to compute; None: everything.
            training: positions are those of training, which may differ by `Compat`.
        """
        inputs.check(self.config)
        if kept is None:
            kept = everything(inputs.image_valid, inputs.token_valid)
        images_BPD = self.embed_images(inputs.images, kept)
        tokens_BLD = self.gemma.embed(inputs.tokens[:, : kept.prompt_len], self.dtype)
        image_valid_BP = inputs.image_valid.repeat_interleave(self.config.vision.num_tokens, dim=1)
        causal_BL = torch.zeros_like(inputs.token_valid) if inputs.token_causal is None else inputs.token_causal
        valid_BT = torch.cat([image_valid_BP, inputs.token_valid], dim=1)
        starts_block_BT = torch.cat([torch.zeros_like(image_valid_BP), causal_BL], dim=1)
        index_T = kept.token_indices(len(self.config.cameras), self.config.vision.num_tokens, valid_BT.device)
        padded_positions = training and self.config.compat.fast_padded_positions
        return Span(
            tokens_BTD=torch.cat([images_BPD, tokens_BLD], dim=1),
            valid_BT=valid_BT[:, index_T],
            starts_block_BT=starts_block_BT[:, index_T],
            position_BT=index_T.expand(inputs.batch_size, -1) if padded_positions else None,
            plain=kept.plain,
        )

    def embed_images(self, images: Tensor, kept: Kept | None = None) -> Float[Tensor, "B P D"]:
        """Image tokens of the cameras [B, C, h, w, 3] that are kept, or of all of them, camera after camera."""
        b, num_cameras = len(images), images.shape[1] if kept is None else len(kept.cameras)
        images = images.flatten(0, 1)
        if kept is not None and len(kept.pictures) < len(images):
            images = images[list(kept.pictures)]
        if images.dtype == torch.uint8:
            images = images.float() / 255.0 * 2.0 - 1.0
        encoded_NPD = self.vision(images, self.dtype)
        if kept is not None and len(kept.places) < b * num_cameras:
            places_N = torch.tensor(kept.places, dtype=torch.long, device=encoded_NPD.device)
            absent = encoded_NPD.new_zeros(b * num_cameras, *encoded_NPD.shape[1:])
            encoded_NPD = absent.index_copy(0, places_N, encoded_NPD)
        return encoded_NPD.unflatten(0, (b, num_cameras)).flatten(1, 2)

    def _kept(self, inputs: ModelInput) -> Kept:
        return inputs.kept if self.trim else everything(inputs.image_valid, inputs.token_valid)

    def _adapters(self, adapters: Adapters) -> Adapters:
        unscaled = self.config.compat.unscaled_feed_forward_lora
        return adapters.with_unscaled_feed_forward() if unscaled else adapters

    def _flow_loss(self, inputs: ModelInput, noise_BKHA: Tensor, timestep_BK: Tensor) -> FlowLoss:
        head = self._flow_head("forward without noise")
        assert inputs.actions is not None, "training needs actions"
        x_BKHA, target_BKHA = interpolate(noise_BKHA, inputs.actions, timestep_BK)
        given_BH = None if inputs.delay is None else given_steps(inputs.delay, noise_BKHA.shape[2])
        if given_BH is not None:
            x_BKHA = torch.where(given_BH[:, None, :, None], inputs.actions[:, None], x_BKHA)
        suffix = head.suffix(inputs.state, x_BKHA, timestep_BK, self.dtype, given_BH)
        spans = {"vlm": self.embed_prefix(inputs, self._kept(inputs)), "action": suffix}
        out_BTD = self.gemma(spans, outputs=("action",), last=noise_BKHA.shape[1] * noise_BKHA.shape[2])["action"]
        velocity_BKHA = head.velocity(out_BTD, *noise_BKHA.shape[1:3])
        return flow_loss(velocity_BKHA, target_BKHA, *self._action_masks(inputs))

    def _action_masks(self, inputs: ModelInput) -> tuple[Tensor, Tensor]:
        """Which steps [B, H] and which dimensions [B or 1, A] are real."""
        b, h, a = inputs.batch_size, self.config.action_horizon, self.config.action_dim
        step_valid, dim_valid = inputs.action_valid, inputs.action_dim_valid
        if step_valid is None or self.config.compat.unmasked_loss:
            step_valid = torch.ones(b, h, dtype=torch.bool, device=inputs.state.device)
        if inputs.delay is not None:
            step_valid = step_valid & ~given_steps(inputs.delay, h)
        if dim_valid is None or self.config.compat.unmasked_loss:
            dim_valid = torch.ones(a, dtype=torch.bool, device=inputs.state.device)
        return step_valid, dim_valid.expand(1 if dim_valid.ndim == 1 else b, a)

    def _flow_head(self, instead: str) -> FlowHead:
        if isinstance(self.config, Pi0FastConfig):
            raise self._wrong_policy("Pi0Config or Pi05Config", instead)
        assert isinstance(self.head, FlowHead)
        return self.head

    def _wrong_policy(self, expected: str, instead: str) -> ConfigError:
        found = type(self.config).__name__
        return ConfigError(expected=expected, found=found, where="VLA.config", next=f"call {instead} instead")


def _init_whole(module: Initialised, generator: Generator) -> None:
    """Initialise a module's own parameters as plain float32 ones on the CPU, then copy what it holds of them."""
    assert isinstance(module, nn.Module)
    own = dict(module.named_parameters(recurse=False))
    for name, parameter in own.items():
        setattr(module, name, nn.Parameter(torch.empty(parameter.shape, device="cpu"), requires_grad=False))
    module.init_weights(generator)
    for name, parameter in own.items():
        fill(parameter, getattr(module, name).data)
        setattr(module, name, parameter)
