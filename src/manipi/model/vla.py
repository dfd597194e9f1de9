"""A vision-language-action policy: SigLIP, Gemma and a head, put together as the config says.

    images [B, C, h, w, 3] ──SigLIP──▶ image tokens ─┐
                                                     ├─ prefix ─▶ Gemma "vlm" ────▶ next tokens    (π0-FAST)
    tokens [B, L] ──────embedding──▶ prompt tokens ──┘                │            (older states: before the prompt)
                                                           keys and values
                                                                      ▼
    state, noisy actions, timestep ────────────────── suffix ─▶ Gemma "action" ──▶ velocity       (π0, π0.5)

Shape suffixes: B batch, C camera slots, P image tokens, L prompt tokens, T all prefix tokens, K noise draws,
H action horizon, A action dimensions, D width.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor, nn

from manipi.errors import ConfigError
from manipi.model import autoregressive, flow, joint
from manipi.model.autoregressive import Allowed, TokenDraws, TokenLoss
from manipi.model.config import Adapters, ModelConfig, Pi0Config, Pi0FastConfig, Pi05Config
from manipi.model.device import fill
from manipi.model.flow import Continuation, FlowLoss, Pi0Head, Pi05Head
from manipi.model.gemma import Expert, Gemma, KVCache, Span
from manipi.model.inputs import Kept, ModelInput, everything
from manipi.model.joint import JointLoss
from manipi.model.layers import Initialised, Linear
from manipi.model.siglip import SigLIP


class VLA(nn.Module):
    """π0, π0.5 or π0-FAST, by the type of its config.

    Args:
        trim: compute no pictures and tokens that are masked; without it, all of them, to the same result.

    Parameters are created in float32 and filled by `init_weights(seed=0)`. For a large model, create it under
    `torch.device("meta")`, then `to_empty(device=…)` and load or initialise the weights.
    """

    guidable = True
    """Whether gradients pass through, for guidance by a previous chunk."""

    def __init__(self, config: ModelConfig, *, trim: bool = True):
        super().__init__()
        self.config, self.trim = config, trim
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        history = None if isinstance(config, Pi0FastConfig) else config.history
        self.vision = SigLIP(config.vision, config.vlm.width, **({"every": history.every} if history else {}))

        def adapted(adapters: Adapters) -> Adapters:
            return adapters.with_unscaled_feed_forward() if config.compat.unscaled_feed_forward_lora else adapters

        experts = {"vlm": Expert(size=config.vlm, adapters=adapted(config.vlm_adapters))}
        if not isinstance(config, Pi0FastConfig):
            experts["action"] = Expert(
                size=config.action_expert,
                adapters=adapted(config.action_adapters),
                adaptive_norm=isinstance(config, Pi05Config),
            )
            head = Pi0Head if isinstance(config, Pi0Config) else Pi05Head
            self.head = head(config.action_expert.width, config.action_dim)
        self.gemma = Gemma(experts, config.vocab_size)
        if config.past_tokens:
            self.past_state = Linear(config.action_dim, config.vlm.width)
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
    ) -> FlowLoss | TokenLoss | JointLoss:
        """The training loss, and the only way into training: sharding hooks act on this call.

        Args:
            inputs: with `actions` (flow policies) or `token_causal` and `token_loss` (π0-FAST), or all of them and
                `codes` (joint training). Rows that are `hidden` are shown none of their fixed codes. With `delay`, so
                many first steps are given clean and do not count (arXiv 2512.05964).
            noise: flow policies: standard normal; with an axis K, that many draws share one prefix.
            timestep: flow policies: in [0, 1], 1 being pure noise.
        """
        kept = self._kept(inputs)
        if isinstance(self.config, Pi0FastConfig):
            assert noise is None, "π0-FAST has no use for noise"
            assert inputs.token_loss is not None, "training needs token_loss"
            prompt = (inputs.tokens[:, : kept.prompt_len], inputs.token_loss[:, : kept.prompt_len])
            codes, shown = self.config.codes, inputs
            if codes is not None and inputs.hidden is not None:
                shown = replace(inputs, tokens=autoregressive.hide_codes(inputs.tokens, inputs.hidden, codes))
            prefix = self.embed_prefix(shown, kept, training=True)
            return autoregressive.token_loss(self.gemma, prefix, *prompt, codes)
        assert noise is not None, "a flow policy needs noise"
        assert timestep is not None, "a flow policy needs timesteps"
        draws = (noise[:, None], timestep[:, None]) if noise.ndim == 3 else (noise, timestep)
        prefix, masks = self.embed_prefix(inputs, kept), flow.action_masks(inputs, self.config)
        if self.config.joint is not None:
            return joint.joint_loss(
                self.gemma, self.head, prefix, kept.prompt_len, inputs, *draws, masks, self.config.joint
            )
        loss = flow.flow_loss(self.gemma, self.head, prefix, inputs, *draws, masks)
        return loss._replace(per_step=loss.per_step[:, 0]) if noise.ndim == 3 else loss

    def loss_weight(self, inputs: ModelInput, num_draws: int = 1) -> Float[Tensor, "*terms"]:
        """How much the batch counts in a mean over batches: the `weight` that `forward` returns, from its masks."""
        if isinstance(self.config, Pi0FastConfig):
            return torch.tensor(float(inputs.batch_size), device=inputs.tokens.device)
        step_valid_BH, dim_valid_BA = flow.action_masks(inputs, self.config)
        elements = num_draws * (step_valid_BH.sum(1) * dim_valid_BA.sum(1)).sum().float()
        return elements if self.config.joint is None else torch.stack([elements, *joint.samples_with(inputs)])

    @torch.no_grad()
    def sample(
        self, inputs: ModelInput, noise: Float[Tensor, "B *K H A"], num_steps: int = 10, max_delay: int = 0
    ) -> Float[Tensor, "B *K H A"]:
        """Action chunks by `num_steps` Euler steps from timestep 1 to 0; the prefix runs once.

        Args:
            inputs: with `delay`, `actions` and `action_valid` are what is left of the previous chunk, which the new one
                goes on from (`manipi.model.flow`).
            max_delay: the longest prefix that the weights were trained with; longer delays are met by guidance.

        Raises:
            ConfigError: the policy has no flow head.
        """
        if isinstance(self.config, Pi0FastConfig):
            raise self._wrong_policy("Pi0Config or Pi05Config", "decode_tokens")
        draws = noise[:, None] if noise.ndim == 3 else noise
        chunks = self.run(inputs, self._kept(inputs), draws, num_steps, flow.continuation(inputs, max_delay))
        return chunks[:, 0] if noise.ndim == 3 else chunks

    def run(
        self, inputs: ModelInput, kept: Kept, noise_BKHA: Tensor, num_steps: int, continuation: Continuation
    ) -> Float[Tensor, "B K H A"]:
        """All of `sample` after what was to be read on the host."""
        assert not isinstance(self.config, Pi0FastConfig), "π0-FAST samples no actions"
        cache = self.prefill(inputs, self.embed_prefix(inputs, kept), noise_BKHA.shape[1])
        _, dim_valid_BA = flow.action_masks(inputs, self.config)
        velocity = flow.velocity_field(self.gemma, self.head, cache, inputs, noise_BKHA, dim_valid_BA, self.dtype)
        return flow.sample(velocity, inputs, noise_BKHA, num_steps, continuation)

    @torch.no_grad()
    def sample_gated(
        self, inputs: ModelInput, noise_BKHA: Tensor, gate: float, executed_BH: Tensor, num_steps: int, max_delay: int
    ) -> tuple[Float[Tensor, "B k H A"], Float[Tensor, "B"]]:
        """As `sample`: the first draw, and the others after the same prefix where the path of any first one bends by
        more than `gate`, so that k is K or 1; and by how much each bends (`flow.bend`, over the executed steps).

        In an engine on a GPU its layers run one by one, since a graph cannot ask whether to go on.
        """
        assert not isinstance(self.config, Pi0FastConfig), "π0-FAST samples no actions"
        continuation, (_, dim_valid_BA) = flow.continuation(inputs, max_delay), flow.action_masks(inputs, self.config)
        cache, path = self.prefill(inputs, self.embed_prefix(inputs, self._kept(inputs))), list[Tensor]()

        def draw(cache: KVCache, noise_BKHA: Tensor) -> Tensor:
            velocity = flow.velocity_field(self.gemma, self.head, cache, inputs, noise_BKHA, dim_valid_BA, self.dtype)

            def noted(x_BKHA: Tensor, timestep: float, given_BH: Tensor | None) -> Tensor:
                path.append(velocity(x_BKHA, timestep, given_BH))
                return path[-1]

            return flow.sample(noted, inputs, noise_BKHA, num_steps, continuation)

        first_BKHA, others_BKHA = draw(cache, noise_BKHA[:, :1]), noise_BKHA[:, 1:]
        bend_B = flow.bend([one.detach()[:, 0] for one in path], executed_BH[..., None] & dim_valid_BA[:, None])
        if not bool((bend_B > gate).any()):
            return first_BKHA, bend_B
        return torch.cat([first_BKHA, draw(cache.repeated(others_BKHA.shape[1]), others_BKHA)], dim=1), bend_B

    def prefill(self, inputs: ModelInput, prefix: Span, num_draws: int = 1) -> KVCache:
        """What the suffixes of so many noise draws continue."""
        cache = KVCache()
        self.gemma({"vlm": prefix}, cache, commit=True, outputs=())
        return cache

    @torch.no_grad()
    def decode_tokens(
        self,
        inputs: ModelInput,
        max_tokens: int = 256,
        allowed: Allowed | None = None,
        draws: Sequence[TokenDraws | None] | None = None,
        eos_token: int | None = None,
    ) -> Int64[Tensor, "B max_tokens"]:
        """Decoded token ids after the prompt, the likeliest unless drawn; zeros follow a row's end.

        Args:
            allowed: restricts a row's next token by its ids so far.
            draws: how each row's tokens are drawn; None: they are the likeliest.
            eos_token: the id that ends a row; None: that of a π0-FAST's config.

        Raises:
            ConfigError: the policy does not write tokens.
        """
        if not self.config.writes:
            raise self._wrong_policy("Pi0FastConfig, or a policy with a JointConfig", "sample")
        if eos_token is None:
            assert isinstance(self.config, Pi0FastConfig), "a joint policy's end is its tokenizer's"
            eos_token = self.config.eos_token
        # With that quirk, masked pictures and padding are read after all.
        kept = None if self.config.compat.fast_contiguous_cache else self._kept(inputs)
        prefix = self.embed_prefix(inputs, kept)
        ends = {"eos_token": eos_token, "compat": self.config.compat, "allowed": allowed, "draws": draws}
        return autoregressive.decode(self.gemma, prefix, self.decoding_cache(prefix, max_tokens), max_tokens, **ends)

    def decoding_cache(self, prefix: Span, max_tokens: int) -> KVCache:
        """An empty one, for the prefix and so many tokens after it."""
        if self.config.compat.fast_contiguous_cache:
            return autoregressive.reference_cache(self.gemma, prefix, max_tokens)
        return KVCache()

    def embed_prefix(
        self, inputs: ModelInput, kept: Kept | None = None, images_BPD: Tensor | None = None, *, training: bool = False
    ) -> Span:
        """Image and prompt tokens as one span: one block, except for the causal tokens of π0-FAST.

        Args:
            kept: what to compute; None: everything.
            images_BPD: the kept image tokens, if they are there already.
            training: positions are those of training, which may differ by `Compat`.
        """
        inputs.check(self.config)
        if kept is None:
            kept = everything(inputs.image_valid, inputs.token_valid)
        if images_BPD is None:
            past = (inputs.past_images, inputs.past_valid) if self.config.past_steps else ()
            images_BPD = self.embed_images(inputs.images, kept, *past)
        tokens_BLD = self.gemma.embed(inputs.tokens[:, : kept.prompt_len], self.dtype)
        seen_BPD, seen_BP = images_BPD, inputs.image_valid.repeat_interleave(self.config.vision.num_tokens, dim=1)
        if self.config.past_tokens:
            assert inputs.past_states is not None, "checked by the input"
            assert inputs.past_valid is not None, "checked by the input"
            seen_BPD = torch.cat([seen_BPD, self.past_state(inputs.past_states).to(self.dtype)], dim=1)
            seen_BP = torch.cat([seen_BP, inputs.past_valid], dim=1)
        causal_BL = torch.zeros_like(inputs.token_valid) if inputs.token_causal is None else inputs.token_causal
        valid_BT = torch.cat([seen_BP, inputs.token_valid], dim=1)
        starts_block_BT = torch.cat([torch.zeros_like(seen_BP), causal_BL], dim=1)
        sizes = (len(self.config.cameras), self.config.vision.num_tokens, self.config.past_tokens)
        index_T = kept.token_indices(*sizes, valid_BT.device)
        padded_positions = training and self.config.compat.fast_padded_positions
        return Span(
            tokens_BTD=torch.cat([seen_BPD, tokens_BLD], dim=1),
            valid_BT=valid_BT[:, index_T],
            starts_block_BT=starts_block_BT[:, index_T],
            position_BT=index_T.expand(inputs.batch_size, -1) if padded_positions else None,
            all_valid=kept.all_valid and not self.config.past_tokens,
            one_block=kept.one_block,
        )

    def embed_images(
        self,
        images: Tensor,
        kept: Kept | None = None,
        past_images: Tensor | None = None,
        past_valid: Tensor | None = None,
    ) -> Float[Tensor, "B P D"]:
        """Image tokens of the cameras [B, C, h, w, 3] that are kept, or of all of them, camera after camera.

        Args:
            past_images: [B, k, C, h, w, 3], which the tokens then know of, where `past_valid` [B, k].
        """
        b, num_cameras = len(images), images.shape[1] if kept is None else len(kept.cameras)
        # Their frames go along with the pictures.
        seen = [images.flatten(0, 1)]
        if past_images is not None and past_valid is not None:
            seen += [past_images.transpose(1, 2).flatten(0, 1), past_valid.repeat_interleave(images.shape[1], dim=0)]
        if kept is not None and len(kept.pictures) < len(seen[0]):
            # By slices: indices would come from the host, which a CUDA graph cannot wait for.
            seen = [torch.cat([one[:0], *(one[i : i + 1] for i in kept.pictures)]) for one in seen]
        pictures = [one.float() / 255.0 * 2.0 - 1.0 if one.dtype == torch.uint8 else one for one in seen[:2]]
        encoded_NPD = self.vision(pictures[0], self.dtype, *pictures[1:], *seen[2:])
        if kept is not None and len(kept.places) < b * num_cameras:
            places_N = torch.tensor(kept.places, dtype=torch.long, device=encoded_NPD.device)
            absent = encoded_NPD.new_zeros(b * num_cameras, *encoded_NPD.shape[1:])
            encoded_NPD = absent.index_copy(0, places_N, encoded_NPD)
        return encoded_NPD.unflatten(0, (b, num_cameras)).flatten(1, 2)

    def _kept(self, inputs: ModelInput) -> Kept:
        return inputs.kept if self.trim else everything(inputs.image_valid, inputs.token_valid)

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
