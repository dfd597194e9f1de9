"""A model rearranged for inference: the same results as `VLA`, which stays the oracle, in fewer and larger steps.

    pictures ─▶ SigLIP, all cameras in one batch ─┐
    prompt ───▶ embedding ────────────────────────┴─▶ "vlm" layers ─▶ cache ◀─ state token (π0), once
                                                                       │
    timesteps ─▶ tables of time MLP and adaptive norms, made once      │
                                        noise ─▶ num_steps × "action" layers ─▶ actions

What every row masks is not computed (`trim`), the language model's last layer makes only keys and values, several
noises share one prefix, and no mask has queries times keys elements: a key is seen by all queries or by none, so that
one row of biases says it all.

Shape suffixes: B batch, C camera slots, P image tokens, L prompt tokens, T tokens, S key tokens, K noise draws,
H action horizon, A action dimensions, D width.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manipi.errors import ConfigError
from manipi.model.attention import MASKED
from manipi.model.config import Pi0Config, Pi0FastConfig
from manipi.model.flow import CLEAN, FlowHead, Pi0Head, Pi05Head, integrate, timestep_embedding
from manipi.model.gemma import AdaptiveRMSNorm, Block, ExpertLayer, RMSNorm, embed_tokens, rope
from manipi.model.inference.fused import FusedLayer, FusedVisionLayer, KeysValuesLayer, LayerNorms, Norm, Place, Slots
from manipi.model.inference.graphs import Graphs, compile_layers
from manipi.model.inference.quantize import Quantization, compute_dtype, maker
from manipi.model.inputs import ModelInput
from manipi.model.layers import LayerNorm, Linear
from manipi.model.rtc import Velocity, sample_after_prefix, sample_on, trained_prefix
from manipi.model.siglip import SigLIP, VisionBlock, embed_patches
from manipi.model.vla import VLA

Allowed = Callable[[Sequence[int]], np.ndarray]
"""The ids decoded so far to the ids that may follow."""


class Trimmed(NamedTuple):
    """A batch without what every row masks; tensors only, but for `places`."""

    pictures: Tensor
    """The valid ones [n, h, w, 3]."""
    places: tuple[int, ...] | None
    """Where they stand among rows and kept slots; None: everywhere."""
    num_cameras: int
    tokens: Tensor
    """[B, L]"""
    valid: Tensor | None
    """[B, T] of the prefix; None: all."""
    state: Tensor
    """[B, A]"""
    dim_valid: Tensor
    """[1 or B, A]: dimensions that the robot has."""
    given: Tensor | None = None
    """[B, H]: steps that are the previous chunk's."""
    previous: Tensor | None = None
    """[B, H, A]"""


class Prefix(NamedTuple):
    """What the suffix continues."""

    slots: list[Slots]
    """By layer."""
    length: int
    """Slots that are filled."""
    position_B1: Tensor
    """Of the next token."""
    bias: Tensor | None
    """[B, 1, 1, slots]"""
    last: Tensor
    """π0-FAST: output [B, 1, D] at each row's last token."""


class Engine(nn.Module):
    """Takes over the model's weights; where they keep their dtype it shares their memory.

    Args:
        num_steps: Euler steps of `sample`.
        quantization: how the transformers' matrices are kept.

    Raises:
        ConfigError: fp8 on a device without it, or a quirk of the reference's decoding that needs its cache.
    """

    quantization: Quantization

    def __init__(self, model: VLA, num_steps: int = 10, quantization: Quantization = "none"):
        super().__init__()
        _refuse_quirks(model)
        self.config, self.num_steps, self.quantization = model.config, num_steps, quantization
        self._flow = not isinstance(model.config, Pi0FastConfig)
        self.token_embedding, self.position_embedding = model.gemma.token_embedding, model.vision.position_embedding
        self._patches, self._vision_norm, self._vision_head = _ends(model.vision)
        self.dtype = compute_dtype(model.dtype, self._device)
        make = maker(quantization, self._device, model.dtype)
        self.vision = nn.ModuleList(FusedVisionLayer(cast(VisionBlock, one), make) for one in model.vision.blocks)
        layers = [_experts(block) for block in model.gemma.blocks]
        last = KeysValuesLayer if self._flow else FusedLayer
        self.vlm = nn.ModuleList(FusedLayer(one["vlm"], make) for one in layers[:-1])
        self.vlm.append(last(layers[-1]["vlm"], make))
        self._vlm_norms = [(_plain(one["vlm"].attention_norm), _plain(one["vlm"].mlp_norm)) for one in layers]
        self._vlm_final = _plain(model.gemma.final_norms["vlm"])
        self._graphs: Graphs | None = None
        if self._flow:
            self.action = nn.ModuleList(FusedLayer(one["action"], make) for one in layers)
            self._head = cast(FlowHead, model.head)
            norms = [norm for one in layers for norm in (one["action"].attention_norm, one["action"].mlp_norm)]
            self._tabulate([*norms, model.gemma.final_norms["action"]])

    @torch.no_grad()
    def _tabulate(self, norms: list[nn.Module]) -> None:
        """What depends on timesteps and weights alone, by step, and last for given actions: all norms [N, 1 or 3, D],
        and π0's share of the time in its tokens [D]."""
        times = [torch.ones(1, device=self._device)]
        for _ in range(self.num_steps - 1):
            times.append(times[-1] - 1.0 / self.num_steps)
        embedded_TD = timestep_embedding(
            torch.cat([*times, times[0].new_tensor([CLEAN])]), self._head.action_in.out_features
        )
        cond_TD = None
        if isinstance(self._head, Pi05Head):
            cond_TD = self._head.condition(embedded_TD).to(self.dtype)
        elif isinstance(self._head, Pi0Head):
            mlp, width = self._head.time_mlp_in, embedded_TD.shape[1]
            self._time_TD = F.linear(embedded_TD, mlp.weight[:, width:].float(), mlp.bias.float())
        self._norms_TN3D = torch.stack([_modulation(norm, cond_TD, len(embedded_TD)) for norm in norms], dim=1)

    @property
    def _device(self) -> torch.device:
        return self.token_embedding.device

    def compile(self, **options: Any) -> None:
        """Compile the layers, and on a GPU play one CUDA graph per shape from then on.

        Raises:
            ConfigError: nothing that compiles is installed; it says what is missing.
        """
        compile_layers([*self.vision, *self.vlm, *(self.action if self._flow else ())], self._device, **options)
        self._graphs = Graphs() if self._device.type == "cuda" else None

    # Flow policies ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, inputs: ModelInput, noise: Tensor, num_steps: int | None = None, max_delay: int = 0) -> Tensor:
        """Action chunks [B, (K,) H, A], as `VLA.sample` makes them.

        Args:
            max_delay: the longest prefix that the weights were trained with; longer delays are met by guidance.

        Raises:
            ConfigError: other steps than the engine's tables have, or guidance through matrices in 8 bits.
        """
        if num_steps not in (None, self.num_steps):
            raise ConfigError(
                expected=f"{self.num_steps} steps, for which the engine has tables",
                found=str(num_steps),
                where="Engine.sample",
                next="make another Engine with that num_steps",
            )
        if noise.ndim == 3:
            return self.sample(inputs, noise[:, None], num_steps, max_delay)[:, 0]
        batch = self.trim(inputs)
        if inputs.delay is not None:
            given = trained_prefix(inputs, max_delay, noise.shape[2])
            if given is None:
                return self._sample_guided(batch, inputs, noise)
            batch = batch._replace(given=given, previous=inputs.actions)
        # Placing the pictures of a ragged batch copies indices from the host, which no graph can hold.
        if self._graphs is None or batch.places is not None:
            return self.run(batch, noise)
        return self._graphs(self.run, batch, noise)

    def _sample_guided(self, batch: Trimmed, inputs: ModelInput, noise_BKHA: Tensor) -> Tensor:
        """After a previous chunk by gradients (`manipi.model.rtc`), which no CUDA graph holds."""
        if self.quantization != "none":
            raise ConfigError(
                expected="no previous chunk with matrices in 8 bits, through which no gradient passes",
                found="one",
                where="Engine.sample",
                next="serve the policy as it was trained, or let the client wait for its chunks",
            )
        return sample_on(self._field(batch, noise_BKHA), inputs, noise_BKHA, self.num_steps, max_delay=0)

    def run(self, batch: Trimmed, noise_BKHA: Tensor) -> Tensor:
        """All of `sample` but for guidance, tensors in and out; what a CUDA graph holds."""
        velocity = self._field(batch, noise_BKHA)
        if batch.given is None or batch.previous is None:
            return integrate(lambda x, t: velocity(x, t, None), noise_BKHA, self.num_steps)
        return sample_after_prefix(velocity, noise_BKHA, batch.previous, batch.given, self.num_steps)

    def _field(self, batch: Trimmed, noise_BKHA: Tensor) -> Velocity:
        """The velocity at any actions, after the prefix that is computed here, once."""
        prefix = self.prefix(batch, self.encode_images(batch), noise_BKHA.shape[1])
        place, dim_valid = self.suffix_place(prefix), batch.dim_valid[:, None, None]

        def velocity(x_BKHA: Tensor, timestep: float, given_BH: Tensor | None) -> Tensor:
            # Each step fills the suffix's slots anew, whose gradients must not reach into the step before.
            own = prefix._replace(slots=[Slots(*(one.detach() for one in layer)) for layer in prefix.slots])
            step = round((1 - timestep) * self.num_steps)
            given = None if given_BH is None else given_BH.repeat_interleave(x_BKHA.shape[1], dim=0)
            out = self.velocity(step, x_BKHA.flatten(0, 1), own, place, given).unflatten(0, noise_BKHA.shape[:2])
            return torch.where(dim_valid, out, noise_BKHA)

        return velocity

    def suffix_place(self, prefix: Prefix) -> Place:
        """Where the action tokens stand, the same in every step."""
        h = self.config.action_horizon
        position_BT = prefix.position_B1 + torch.arange(h, device=prefix.position_B1.device)
        bias = None if prefix.bias is None else prefix.bias[..., : prefix.length + h]
        return Place(prefix.length, rope(position_BT, self.config.vlm.head_dim), bias)

    def velocity(
        self, step: int, x_BHA: Tensor, prefix: Prefix, place: Place, given_BH: Tensor | None = None
    ) -> Tensor:
        """Velocity [B, H, A] of noisy actions at the step's timestep, but for those that are given, in float32."""
        tokens = self._head.action_in(x_BHA)
        if isinstance(self._head, Pi0Head):
            weight = self._head.time_mlp_in.weight
            time = _at(self._time_TD, step, given_BH)
            tokens = self._head.time_mlp_out(F.silu(F.linear(tokens, weight[:, : weight.shape[0]].float()) + time))
        norms, final = self._norms(step, given_BH)
        tokens = tokens.to(self.dtype).float()
        out = self._through(self.action, tokens, prefix.slots, place, norms)
        return self._head.action_out(final(out))

    def _norms(self, step: int, given_BH: Tensor | None = None) -> tuple[list[LayerNorms], Norm]:
        """The action expert's of its layers, and the final one."""
        if self._norms_TN3D.shape[2] == 1:
            given_BH = None  # that do not know the time
        *norms, final = (Norm(*one.unbind(0)) for one in _at(self._norms_TN3D, step, given_BH))
        return [*zip(norms[::2], norms[1::2], strict=True)], final

    # The prefix ------------------------------------------------------------------------------------------------------

    def trim(self, inputs: ModelInput) -> Trimmed:
        """The batch without what every row masks. Raises ConfigError for shapes that are not the model's."""
        inputs.check(self.config)
        assert inputs.token_causal is None or not inputs.token_causal.any(), "causal prompts are for training"
        kept, cameras = inputs.kept, len(self.config.cameras)
        pictures, everywhere = inputs.images.flatten(0, 1), inputs.batch_size * len(kept.cameras)
        if len(kept.pictures) < len(pictures):
            pictures = pictures[list(kept.pictures)]
        valid = None
        if not kept.plain:
            image_valid_BP = inputs.image_valid.repeat_interleave(self.config.vision.num_tokens, dim=1)
            index_T = kept.token_indices(cameras, self.config.vision.num_tokens, inputs.tokens.device)
            valid = torch.cat([image_valid_BP, inputs.token_valid], dim=1)[:, index_T]
        dims = inputs.action_dim_valid
        if dims is None or self.config.compat.unmasked_loss:
            dims = torch.ones(self.config.action_dim, dtype=torch.bool, device=inputs.state.device)
        return Trimmed(
            pictures=pictures,
            places=None if len(kept.places) == everywhere else kept.places,
            num_cameras=len(kept.cameras),
            tokens=inputs.tokens[:, : kept.prompt_len],
            valid=valid,
            state=inputs.state,
            dim_valid=dims.expand(inputs.batch_size, -1),
        )

    def encode_images(self, batch: Trimmed) -> Tensor:
        """Image tokens [B, P, D], one kept camera after the other; all pictures go through SigLIP at once."""
        pictures = batch.pictures
        if pictures.dtype == torch.uint8:
            pictures = pictures.float() / 255.0 * 2.0 - 1.0
        size = self.config.vision.patch_size
        x_NPD = embed_patches(pictures, size, self._patches, self.position_embedding)
        for layer in self.vision:
            x_NPD = layer(x_NPD, self.dtype)
        x_NPD = self._vision_head(self._vision_norm(x_NPD).to(self.dtype))
        rows = len(batch.tokens) * batch.num_cameras
        if batch.places is not None:
            place_N = torch.tensor(batch.places, dtype=torch.long, device=x_NPD.device)
            x_NPD = x_NPD.new_zeros(rows, *x_NPD.shape[1:]).index_copy(0, place_N, x_NPD)
        return (
            x_NPD.unflatten(0, (-1, batch.num_cameras)).flatten(1, 2)
            if batch.num_cameras
            else x_NPD.reshape(len(batch.tokens), 0, x_NPD.shape[-1])
        )

    def prefix(self, batch: Trimmed, images_BPD: Tensor, num_draws: int = 1, room: int | None = None) -> Prefix:
        """Keys and values of pictures, prompt and state, with room for what follows; for each noise draw its own copy.

        Args:
            room: slots after them; None: those of an action chunk.
        """
        x_BTD = torch.cat([images_BPD, embed_tokens(self.token_embedding, batch.tokens, self.dtype)], dim=1).float()
        (b, t, _), has_state = x_BTD.shape, isinstance(self.config, Pi0Config)
        valid_BT = torch.ones(b, t, dtype=torch.bool, device=x_BTD.device) if batch.valid is None else batch.valid
        room = self.config.action_horizon if room is None else room
        slots = self._empty(b, t + has_state + room)
        bias = None
        if batch.valid is not None:
            bias = torch.where(F.pad(valid_BT, (0, has_state + room), value=True), 0.0, MASKED).to(self.dtype)
            bias = bias[:, None, None]
        rotation = rope(valid_BT.cumsum(1) - 1, self.config.vlm.head_dim)
        place = Place(0, rotation, None if bias is None else bias[..., :t])
        last_B = None if self._flow else t - 1 - valid_BT.flip(1).long().argmax(1)
        out = self._through(self.vlm, x_BTD, slots, place, self._vlm_norms, last_B)
        position_B1 = valid_BT.sum(1, keepdim=True)
        if has_state:
            self._fill_state(batch.state, slots, t, position_B1, bias)
        if num_draws > 1:
            slots = [Slots(*(one.repeat_interleave(num_draws, dim=0) for one in layer)) for layer in slots]
            bias = None if bias is None else bias.repeat_interleave(num_draws, dim=0)
        position_B1 = (position_B1 + has_state).repeat_interleave(num_draws, dim=0)
        return Prefix(slots, t + has_state, position_B1, bias, out)

    def _fill_state(
        self, state_BA: Tensor, slots: list[Slots], start: int, position_B1: Tensor, bias: Tensor | None
    ) -> None:
        """π0's state token sees the prefix and itself, so that all steps and draws share it."""
        head = cast(Pi0Head, self._head)
        token_B1D = head.state_in(state_BA)[:, None].to(self.dtype).float()
        rotation = rope(position_B1, self.config.vlm.head_dim)
        place = Place(start, rotation, None if bias is None else bias[..., : start + 1])
        norms, _ = self._norms(0)
        self._through(self.action, token_B1D, slots, place, norms)

    def _through(
        self,
        layers: nn.ModuleList,
        x_BTD: Tensor,
        slots: list[Slots],
        place: Place,
        norms: list[LayerNorms],
        row_B: Tensor | None = None,
    ) -> Tensor:
        final = len(layers) - 1
        for index, layer in enumerate(layers):
            x_BTD = layer(x_BTD, slots[index], place, norms[index], row_B if index == final else None)
        return x_BTD

    def _empty(self, batch_size: int, length: int) -> list[Slots]:
        size = self.config.vlm
        shape, where = (
            (batch_size, size.num_kv_heads, length, size.head_dim),
            {"device": self._device, "dtype": self.dtype},
        )
        return [Slots(torch.empty(shape, **where), torch.empty(shape, **where)) for _ in self.vlm]

    # π0-FAST ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode_tokens(self, inputs: ModelInput, max_tokens: int, allowed: Allowed) -> Tensor:
        """Greedily decoded ids [B, max_tokens] of tokens that `allowed` lets pass; zeros follow a row's EOS.

        A token runs through the layers only once something is to be chosen after it, so that forced tokens wait and go
        together, and those at the end never go. Only the logits of tokens that are allowed are computed.
        """
        assert isinstance(self.config, Pi0FastConfig), "a flow policy writes no tokens"
        batch = self.trim(inputs)
        prefix = self.prefix(batch, self.encode_images(batch), room=max_tokens)
        out_BD, waiting = prefix.last[:, 0], 0
        ids: list[list[int]] = [[] for _ in range(inputs.batch_size)]
        while len(ids[0]) < max_tokens and not all(self.config.eos_token in row for row in ids):
            choices = [np.zeros(1, np.int64) if self.config.eos_token in row else allowed(row) for row in ids]
            if waiting and any(len(one) > 1 for one in choices):
                out_BD = self.append(torch.tensor([row[-waiting:] for row in ids], device=self._device), prefix)
                prefix, waiting = self._moved(prefix, waiting), 0
            for row, choice, out_D in zip(ids, choices, out_BD, strict=True):
                row.append(int(choice[self._best(out_D, choice)]) if len(choice) > 1 else int(choice[0]))
            waiting += 1
        done = [row + [0] * (max_tokens - len(row)) for row in ids]
        return torch.tensor(done, dtype=torch.long, device=self._device)

    def _best(self, out_D: Tensor, choice: np.ndarray) -> int:
        rows = self.token_embedding[torch.from_numpy(choice).to(self._device)]
        return int((rows.float() @ self._vlm_final(out_D).float()).argmax())

    def append(self, ids_BT: Tensor, prefix: Prefix) -> Tensor:
        """The layers' output [B, D] at the last of some tokens, each of which sees those before it."""
        t = ids_BT.shape[1]
        step_T = torch.arange(t, device=ids_BT.device)
        end, bias = prefix.length + t, prefix.bias
        bias = None if bias is None else bias[..., :end]
        if t > 1:
            later_TS = torch.arange(end, device=ids_BT.device) > prefix.length + step_T[:, None]
            causal = torch.where(later_TS, MASKED, 0.0).to(self.dtype).repeat_interleave(self._queries_per_key, dim=0)
            bias = causal if bias is None else torch.minimum(bias, causal)
        place = Place(prefix.length, rope(prefix.position_B1 + step_T, self.config.vlm.head_dim), bias)
        x_BTD = embed_tokens(self.token_embedding, ids_BT, self.dtype).float()
        return self._through(self.vlm, x_BTD, prefix.slots, place, self._vlm_norms)[:, -1]

    def _moved(self, prefix: Prefix, count: int) -> Prefix:
        return prefix._replace(length=prefix.length + count, position_B1=prefix.position_B1 + count)

    @property
    def _queries_per_key(self) -> int:
        return self.config.vlm.num_heads // self.config.vlm.num_kv_heads


def _ends(vision: SigLIP) -> tuple[Linear, LayerNorm, Linear]:
    return vision.patch_embedding, vision.final_norm, vision.head


def _experts(block: nn.Module) -> dict[str, ExpertLayer]:
    return {name: cast(ExpertLayer, layer) for name, layer in cast(Block, block).experts.items()}


def _at(table: Tensor, step: int, given_BH: Tensor | None) -> Tensor:
    """A step's rows [..., D] of a table whose last ones are for clean actions; [..., B, H, D] where some are given."""
    if given_BH is None:
        return table[step]
    return torch.where(given_BH[..., None], table[-1][..., None, None, :], table[step][..., None, None, :])


@torch.no_grad()
def _modulation(norm: nn.Module, cond_TD: Tensor | None, num_times: int) -> Tensor:
    """Factor, shift and gate [T, 3, D] of an adaptive norm, the factor [T, 1, D] of another one."""
    if isinstance(norm, AdaptiveRMSNorm):
        assert cond_TD is not None
        scale, shift, gate = norm.modulation(cond_TD).float().chunk(3, dim=-1)
        return torch.stack([1 + scale, shift, gate], dim=1)
    return _plain(norm).factor.expand(num_times, 1, -1)


@torch.no_grad()
def _plain(module: nn.Module) -> Norm:
    return Norm(1 + cast(RMSNorm, module).scale.detach().float())


def _refuse_quirks(model: VLA) -> None:
    quirks = ("fast_contiguous_cache", "fast_position_offset", "fast_writes_past_eos")
    found = [name for name in quirks if getattr(model.config.compat, name)]
    if isinstance(model.config, Pi0FastConfig) and found:
        raise ConfigError(
            expected="decoding without the quirks of the reference's cache",
            found=", ".join(found),
            where="Pi0FastConfig.compat",
            next="serve it without --compile, or without these quirks",
        )
