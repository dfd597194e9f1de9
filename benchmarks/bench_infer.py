"""How much faster the engine answers than the plain path of a PyTorch port of openpi, on the same weights.

A slice of π0 at full width: two layers each of Gemma 2B, of its 300M expert and of SigLIP, random weights, ten steps,
one thread. The vocabulary has 1,024 rows, since embedding is a look-up. Two observations: three cameras with a full
prompt, and one shaped as LIBERO's, with two of three cameras and 16 of 48 tokens.

The plain path does what openpi's PyTorch code does: all three cameras one after the other and all prompt tokens,
masked or not; keys and values repeated for every head; masks of queries times keys, made again in every step; softmax
apart from its products; the cache extended by concatenation; the language model's last layer in full.

In a slice the last layer weighs more than in the whole model, and so does its part that the engine leaves out: half of
the language model at two layers, an eighteenth at full depth. --depth 6 shows where the ratios go.

Calls of all ways alternate within a round, and the median of their CPU time counts; their actions are compared.
Where a processor has no bfloat16 arithmetic, as the first line says, the plain path emulates it and the engine computes
in float32: --dtype float32 is the fairer comparison there. All ways share the weights; int8 adds a copy in 8 bits.

    python benchmarks/bench_infer.py [--dtype float32] [--depth 18 --vision-depth 27] [--rounds 5]
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from harness import Measure, report
from torch import Tensor
from torch.nn import functional as F

from manipi.model import VLA, ModelInput
from manipi.model.attention import MASKED
from manipi.model.config import GEMMA_2B, GEMMA_300M, SO400M_14, Pi0Config
from manipi.model.gemma import Block, ExpertLayer, rope
from manipi.model.inference.engine import Engine
from manipi.train.watch.progress import peak_memory

PROMPT, STEPS = 48, 10
GOALS = {"three cameras": (1.1, None), "LIBERO's shape": (1.5, 2.3)}
"""By observation: of the engine, and of the engine in int8."""

Call = Callable[[ModelInput, Tensor], Tensor]


@dataclass
class Plain:
    """The path without any of the engine's savings."""

    model: VLA

    @torch.no_grad()
    def __call__(self, inputs: ModelInput, noise_BHA: Tensor) -> Tensor:
        model, dtype = self.model, self.model.dtype
        pictures = inputs.images.float() / 255.0 * 2.0 - 1.0
        tokens = [model.vision(pictures[:, camera], dtype) for camera in range(pictures.shape[1])]
        prefix = torch.cat([*tokens, model.gemma.embed(inputs.tokens, dtype)], dim=1)
        per_camera = model.config.vision.num_tokens
        valid_BS = torch.cat([inputs.image_valid.repeat_interleave(per_camera, dim=1), inputs.token_valid], dim=1)
        _, cache = self._layers("vlm", prefix, valid_BS[:, None] & valid_BS[:, :, None], valid_BS.cumsum(1) - 1, None)
        x, t, offset_B1 = noise_BHA, torch.ones(len(noise_BHA)), valid_BS.sum(1, keepdim=True)
        for _ in range(STEPS):
            suffix = model.head.suffix(inputs.state, x[:, None], t[:, None], dtype).tokens_BTD
            length = suffix.shape[1]
            block_T = (torch.arange(length) > 0).long()
            own_TT = (block_T[None] <= block_T[:, None])[None]
            mask = torch.cat([valid_BS[:, None].expand(-1, length, -1), own_TT.expand(len(x), -1, -1)], dim=2)
            out, _ = self._layers("action", suffix, mask, offset_B1 + torch.arange(length), cache)
            out = model.gemma.final_norms["action"](out, None)[0]
            x, t = x - model.head.velocity(out, 1, x.shape[1])[:, 0] / STEPS, t - 1.0 / STEPS
        return x

    def _layers(
        self, name: str, tokens: Tensor, mask_BTS: Tensor, position_BT: Tensor, past: list[tuple[Tensor, Tensor]] | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x, dtype, cache = tokens.float(), tokens.dtype, []
        bias = torch.where(mask_BTS, 0.0, MASKED)[:, None]
        rotation = rope(position_BT, self.model.gemma.size.head_dim)
        for index, block in enumerate(self.model.gemma.blocks):
            layer = cast(ExpertLayer, cast(Block, block).experts[name])
            normed, gate = layer.attention_norm(x, None)
            q, k, v = layer.qkv(normed.to(dtype), x.shape[1], rotation)
            assert q is not None, "every token asks"
            if past is not None:
                k, v = (torch.cat(pair, dim=1) for pair in zip(past[index], (k, v), strict=True))
            cache.append((k, v))
            x = layer.finish(x, eager_attention(q, k, v, bias).flatten(2), gate, None)
        return x, cache


def eager_attention(q_BTNH: Tensor, k_BSGH: Tensor, v_BSGH: Tensor, bias: Tensor) -> Tensor:
    repeats = q_BTNH.shape[2] // k_BSGH.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q_BTNH, k_BSGH, v_BSGH))
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + bias.to(q.dtype)
    return (F.softmax(logits.float(), dim=-1).to(q.dtype) @ v).transpose(1, 2)


def observation(config: Pi0Config, num_cameras: int, prompt_len: int) -> ModelInput:
    generator = torch.Generator().manual_seed(1)
    size = config.vision.image_size
    return ModelInput(
        images=torch.randint(0, 256, (1, 3, size, size, 3), dtype=torch.uint8, generator=generator),
        image_valid=(torch.arange(3) < num_cameras)[None],
        tokens=torch.randint(0, config.vocab_size, (1, PROMPT), generator=generator),
        token_valid=(torch.arange(PROMPT) < prompt_len)[None],
        state=torch.randn(1, config.action_dim, generator=generator),
    )


def random_model(config: Pi0Config) -> VLA:
    """Weights in the compute dtype, as openpi keeps them."""
    with torch.device("meta"):
        model = VLA(config)
    model = model.to(model.dtype).to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def measures(calls: dict[str, Call], config: Pi0Config, rounds: int) -> Iterator[Measure]:
    noise = torch.randn(1, config.action_horizon, config.action_dim, generator=torch.Generator().manual_seed(2))
    for name, (cameras, length) in {"three cameras": (3, PROMPT), "LIBERO's shape": (2, 16)}.items():
        inputs = observation(config, cameras, length)
        answers: dict[str, Tensor] = {}
        times: dict[str, list[float]] = {way: [] for way in calls}
        for _ in range(rounds):
            for way, call in calls.items():
                began = time.process_time()
                answers[way] = call(inputs, noise).flatten()
                times[way].append(time.process_time() - began)
        cosines = {way: float(F.cosine_similarity(a, answers["plain"], dim=0)) for way, a in answers.items()}
        far = {way: float((a - answers["plain"]).abs().max()) for way, a in answers.items()}
        assert cosines["engine"] >= 0.999, cosines
        # Of random weights; roundings add up over 18 layers.
        assert cosines["int8"] >= 0.99, cosines
        seconds = {way: statistics.median(each) for way, each in times.items()}
        for way in calls:
            print(
                f"{name}, {way}: {seconds[way]:.3f} CPU-s, cosine {cosines[way]:.6f}, largest difference {far[way]:.2g}"
            )
        exact, int8 = GOALS[name]
        ratios = {"engine": exact} if int8 is None else {"engine": exact, "int8": int8}
        for way, goal in ratios.items():
            ratio = seconds["plain"] / seconds[way]
            yield Measure(name=f"plain / {way}, {name}", value=ratio, unit="times", goal=goal, at_most=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--depth", type=int, default=2, help="layers of Gemma and of its expert")
    parser.add_argument("--vision-depth", type=int, default=2, help="layers of SigLIP")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = Pi0Config(
        vlm=replace(GEMMA_2B, depth=args.depth),
        action_expert=replace(GEMMA_300M, depth=args.depth),
        vision=replace(SO400M_14, depth=args.vision_depth),
        vocab_size=1024,
        dtype=args.dtype,
    )
    bf16, vnni = torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_vnni_supported()
    print(f"{args.dtype}; arithmetic of this processor: bfloat16 {bf16}, VNNI {vnni}")
    model = random_model(config)
    int8 = Engine(model, STEPS, "int8")  # before the other one, which takes over the weights
    calls: dict[str, Call] = {"plain": Plain(model), "engine": Engine(model, STEPS).sample, "int8": int8.sample}
    found = list(measures(calls, config, args.rounds))
    print(f"peak memory {peak_memory(torch.device('cpu')) / 1e9:.2f} GB")
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {args.rounds} rounds")
    report(found)


if __name__ == "__main__":
    main()
