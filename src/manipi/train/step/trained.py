"""What is trained of a model and at which rate, by group of parameters; and how its layers compute a step.

vision          the image encoder
vlm             the language model, its token embedding included
action_expert   the transformer that reads noisy actions (flow policies)
heads           the projections around the action expert (flow policies)

                full    lora, qlora                        expert_only   vision_frozen
vision          yes     yes                                no            no
vlm             yes     adapters alone, where it has any   no            yes
action_expert   yes     adapters alone, where it has any   yes           yes
heads           yes     yes                                yes           yes

What backward recomputes, and what is compiled, is applied from outside to the same model:

                        forward keeps for backward          backward computes once more
    none                everything                          nothing
    elementwise         results of matrices and attention   norms, GELU and gating, rotations, casts
    full                the input of each layer             each layer

The unit is one Gemma block with all its experts, or one SigLIP layer. Names and values of parameters stay, and so does
every number (Chen et al. 2016; which results to keep, Korthikanti et al. 2022).
"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from manipi.errors import ConfigError
from manipi.model import VLA
from manipi.model.config import NO_ADAPTERS, ModelConfig, Pi0FastConfig
from manipi.model.device import many_variants
from manipi.model.layers import AdaptedLinear, NF4Matrix
from manipi.train.config import ComputeConfig, OptimizerConfig, TrainConfig, Trained


def group_of(name: str) -> str:
    """The group of a parameter, by its name."""
    if name.startswith("vision."):
        return "vision"
    if name.startswith("head."):
        return "heads"
    return "action_expert" if ".action." in name else "vlm"


def is_trained(name: str, model: ModelConfig, trained: Trained) -> bool:
    """Whether the mode trains this parameter, if a loss reaches it.

    With `lora`, as in openpi, an expert with adapters keeps everything else, and vision and heads are trained. `qlora`
    trains the same, with the adapted matrices in 4 bits.
    """
    group = group_of(name)
    if trained == "expert_only":
        return group in ("action_expert", "heads")
    if trained == "vision_frozen":
        return group != "vision"
    if trained == "full":
        return True
    adapters = {"vlm": model.vlm_adapters, "action_expert": getattr(model, "action_adapters", NO_ADAPTERS)}
    return not adapters.get(group) or name.rpartition(".")[2].startswith("lora_")


def trainable_parameters(model: VLA, trained: Trained) -> dict[str, nn.Parameter]:
    """The parameters that the mode trains and the loss can reach, by name.

    A flow loss reads the language model's last layer through its keys and values alone, so that layer's queries, output
    projection and MLP, and the norm behind it, never get a gradient.
    """
    dead: tuple[str, ...] = ()
    if not isinstance(model.config, Pi0FastConfig):
        last = f"gemma.blocks.{len(model.gemma.blocks) - 1}.experts.vlm."
        dead = (f"{last}q_proj.", f"{last}out_proj.", f"{last}mlp_norm.", f"{last}mlp.", "gemma.final_norms.vlm.")
    reached = {name: p for name, p in model.named_parameters() if not (dead and name.startswith(dead))}
    return {name: p for name, p in reached.items() if is_trained(name, model.config, trained)}


def keep(model: VLA, config: TrainConfig) -> None:
    """Keep what is not trained as `frozen_dtype` and the rest as the precision says; ask gradients of what is."""
    frozen, kept = getattr(torch, config.frozen_dtype), getattr(torch, config.compute.master_dtype)
    parameters = trainable_parameters(model, config.trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in parameters)
        parameter.data = parameter.data.to(kept if is_trained(name, model.config, config.trained) else frozen)


def compress(model: VLA, config: TrainConfig) -> None:
    """With `qlora`, what adapters adapt goes to 4 bits."""
    for module in model.modules() if config.trained == "qlora" else ():
        if isinstance(module, AdaptedLinear):
            module.compress(getattr(torch, config.frozen_dtype))


def by_rate(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    """The parameters as an optimizer's groups, one for each multiplier of the learning rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(asdict(config.lr_scale)[group_of(name)], []).append(parameter)
    return [{"params": members, "lr_scale": scale} for scale, members in groups.items()]


class ParameterRow(NamedTuple):
    """One line of the table: the parameters of a group that are kept alike."""

    group: str
    parameters: int
    """How many numbers."""
    trained: bool
    dtype: str
    peak_lr: float
    """0 where nothing is trained."""


def parameter_table(model: VLA, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> list[ParameterRow]:
    """Every parameter of the model, summed by group, dtype, and whether it is trained."""
    counts: dict[tuple[str, bool, str], int] = {}
    for name, parameter in model.named_parameters():
        key = group_of(name), name in parameters, str(parameter.dtype).removeprefix("torch.")
        counts[key] = counts.get(key, 0) + parameter.numel()
    for name, module in model.named_modules():
        if isinstance(module, NF4Matrix):
            key = group_of(name), False, "nf4"
            counts[key] = counts.get(key, 0) + module.shape.numel()
    rates = {group: config.lr * scale for group, scale in asdict(config.lr_scale).items()}
    return [
        ParameterRow(group, count, trained, dtype, rates[group] * trained)
        for (group, trained, dtype), count in sorted(counts.items(), key=lambda row: (row[0][0], not row[0][1]))
    ]


def format_table(rows: Iterable[ParameterRow]) -> str:
    """The table as text, one line per row, and the sum of what is trained."""
    rows = list(rows)
    lines = [f"{'group':<14} {'parameters':>14}  {'trained':<7}  {'kept as':<8}  peak lr"]
    for row in rows:
        rate = f"{row.peak_lr:.3g}" if row.trained else "–"
        said = "yes" if row.trained else "no"
        lines.append(f"{row.group:<14} {row.parameters:>14,}  {said:<7}  {row.dtype:<8}  {rate}")
    trained, whole = sum(row.parameters for row in rows if row.trained), sum(row.parameters for row in rows)
    return "\n".join([*lines, f"{'trained':<14} {trained:>14,}  of {whole:,}"])


def require_packages(config: TrainConfig) -> None:
    """Raises ConfigError where a setting needs a package that is not installed."""
    needed = {"optimizer.state_bits": "torchao"} if config.optimizer.state_bits == 8 else {}
    needed |= {"trained": "bitsandbytes"} if config.trained == "qlora" else {}
    for setting, package in needed.items():
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                expected=f"the package {package}, which this setting needs",
                found="no such package",
                where=f"TrainConfig.{setting}",
                next=f"pip install 'manipi[low-bit]', or choose another --{setting.replace('_', '-')}",
            )


# How a step computes --------------------------------------------------------------------------------------------------


_KEPT_OPS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


def apply_compute(model: VLA, config: ComputeConfig) -> None:
    """Give the layers of `model` another `forward`; once, before training."""
    for layer in [*model.vision.blocks, *model.gemma.blocks]:
        if config.recompute != "none":
            layer.forward = _recomputing(layer.forward, config.recompute)
        if config.compile:
            layer.forward = torch.compile(layer.forward, **many_variants())


def _recomputing(forward: Callable[..., Any], recompute: str) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # the layers draw nothing
    if recompute == "elementwise":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _kept_ops())

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

    return recomputed


def _kept_ops() -> list[Any]:
    kept: list[Any] = [getattr(torch.ops.aten, name).default for name in _KEPT_OPS if hasattr(torch.ops.aten, name)]
    return [*kept, torch.ops.higher_order.flex_attention]
