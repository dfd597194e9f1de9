"""Other projects' checkpoints become ours: a folder that is enough to serve.

weights      the source's tensors, streamed one layer at a time; strict in both directions
norm stats   assets/<asset id>/norm_stats.json beside the weights, or LeRobot's policy_preprocessor.json
the rest     robot, tokenizers, and what the files beside the weights leave open: from a recipe or robot, or from the
             `manipi/` folder that our own exports carry; what contradicts those files (`Stated`) is refused
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

from manipi.checkpoints.adapters import read_adapters
from manipi.checkpoints.native import Checkpoint, PolicyConfig, read_checkpoint, read_description, write_checkpoint
from manipi.errors import CheckpointError, ConfigError, NormStatsError, WeightsMismatchError
from manipi.exchange.certificate import (
    Certificate,
    answer_of_foreign,
    answer_of_weights,
    certify,
    record_self_test,
    write_streamed,
)
from manipi.exchange.lerobot import CONFIG, DESCRIPTION, PREPROCESSOR, Stated, read_processor_stats, read_stated
from manipi.model.config import ModelConfig, NormMode, Pi0FastConfig
from manipi.robots.robot import Robot
from manipi.storage import atomic_directory, require_absent, require_room
from manipi.tokenizers import PALIGEMMA_VOCABULARY, SentencePieceTokenizer, Tokenizers, require_paligemma
from manipi.train.config import TrainConfig
from manipi.transforms.normalize import read_openpi_stats
from manipi.types import NormStats
from manipi.weights.layouts import ForeignWeights, open_weights
from manipi.weights.released import ASSETS
from manipi.weights.stores import ArrayInfo, bytes_of
from manipi.weights.tokenizers import open_action_tokenizer, open_text_tokenizer


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the weights cannot tell."""

    robot: Robot
    model: ModelConfig | None = None
    """Horizon, token budget, cameras, dtype, compat; None: the released policies' settings."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Fields of the model config that are other ones."""
    norm_mode: NormMode | None = None
    """The recipe's; None: what the files say, or z-score for π0 and quantiles for the others, as openpi trains."""
    normalization: NormMode | None = None
    """Named by the user, instead of the recipe's."""
    tokenizers: Tokenizers
    norm_stats: Path | None = None
    """Their file; None: the one in the checkpoint's assets, or its LeRobot preprocessor."""
    asset_id: str = ""
    """Which of several."""


def import_checkpoint(
    path: Path, target: Path, wanted: Wanted | None, *, dtype: torch.dtype | None = None
) -> Certificate:
    """Write our checkpoint folder; on any error nothing is left behind.

    Args:
        wanted: None where the source carries the description of our own export.
        dtype: of the weights written; None keeps each tensor's own.

    Raises:
        CheckpointError: see `manipi.weights.layouts` and `manipi.exchange.lerobot`.
        NormStatsError: no statistics, several to choose from, or statistics of another robot.
        ConfigError: the source does not describe itself, and nothing else does; or recipe, robot or flags contradict
            the files beside the weights.
        SelfTestError: the policy answers otherwise than before.
        StorageError: `target` exists, or there is no room for the weights.
    """
    source = open_weights(path)
    if source.layout.vlm_only:
        raise WeightsMismatchError(
            expected="the weights of a π policy",
            found="a PaliGemma, which is a language model without actions",
            where=str(path),
            next=f"train from it: manipi train RECIPE --init {path}",
        )
    stated = read_stated(source) if wanted is not None else Stated(folder=source.path)
    described = describe(source, wanted, stated)
    model = described.config.model
    source.check(model)
    infos = {
        name: ArrayInfo(array.our_shape, dtype or source.store.arrays[theirs].dtype)
        for theirs, array in source.arrays(model).items()
        for layer in array.names
        for name in layer
    }
    require_absent(target)
    require_room(target, bytes_of(infos))
    before = answer_of_foreign(source, described)
    with atomic_directory(target) as folder:
        bar = tqdm(source.tensors(model), total=len(infos), desc="weights", unit="tensor", disable=len(infos) < 500)
        tensors = ((name, tensor.to(infos[name].dtype)) for name, tensor in bar)
        whole = write_streamed(folder, described, infos, tensors)
        return certify(
            str(path),
            target,
            source.layout.name,
            before,
            answer_of_weights(whole.weights, whole),
            model=model,
            read=[info.dtype for name, info in source.store.arrays.items() if name not in source.unused],
            written=infos,
            unused=source.unused,
            said=stated.rows(),
        )


def import_adapters(path: Path, base: Path, target: Path) -> Certificate:
    """Write our checkpoint folder from adapters that were exported alone and the checkpoint that they belong to.

    Raises:
        CheckpointError: see `manipi.checkpoints.adapters.read_adapters`.
    """
    adapted = read_adapters(path, read_checkpoint(base))
    before = answer_of_weights(adapted.weights, adapted)
    write_checkpoint(target, replace(adapted, self_test=record_self_test(adapted)))
    after = answer_of_weights(read_checkpoint(target).weights, adapted)
    infos = {name: ArrayInfo(tuple(w.shape), w.dtype) for name, w in adapted.weights.items()}
    read = [w.dtype for w in adapted.weights.values()]
    return certify(
        f"{path} on {base}", target, "adapters", before, after, model=adapted.config.model, read=read, written=infos
    )


def describe(source: ForeignWeights, wanted: Wanted | None, stated: Stated) -> Checkpoint:
    """Everything but the weights; of our own export, what it carries counts alone."""
    carried = source.path / DESCRIPTION
    if wanted is None and carried.is_dir():
        described = read_description(carried)
        model = source.config(like=described.config.model)
        return replace(described, config=replace(described.config, model=model))
    if wanted is None:
        raise ConfigError(
            expected="what weights cannot tell: robot, horizon, prompt format",
            found="no recipe, no robot, and no description in the checkpoint",
            where=str(source.path),
            next="add --recipe NAME (manipi recipes), or --robot FILE.py:NAME",
        )
    model = source.config(like=wanted.model)
    if stated.kind not in (None, type(model)):
        raise CheckpointError(
            expected=f"the weights of a {stated.kind.__name__}, as {CONFIG} says",
            found=f"those of a {type(model).__name__}",
            where=str(stated.folder),
            next="copy or fetch the folder again; its files do not belong together",
        )
    if wanted.model is None:  # the files say what the released policies' settings would
        known = {f.name for f in fields(model)} - {"action_dim"}
        model = replace(model, **{name: said.value for name, said in stated.model.items() if name in known})
    model = replace(model, **wanted.sizes)
    stated.require_model(model, frozenset(wanted.sizes))
    stated.require_robot(wanted.robot, model.cameras)
    mode = stated.normalization(wanted.norm_mode, wanted.normalization, type(model))
    step = int(source.path.name) if source.path.name.isdigit() else 0
    sampling = {"num_steps": steps} if (steps := stated.get("num_steps")) else {}
    return Checkpoint(
        weights={},
        config=PolicyConfig(model=model, norm_mode=mode, step=step, **sampling),
        robot=wanted.robot,
        norm_stats=_norm_stats(stated.folder, wanted, model.action_horizon),
        tokenizers=wanted.tokenizers,
        self_test=None,
    )


def _norm_stats(path: Path, wanted: Wanted, horizon: int) -> NormStats:
    if wanted.norm_stats is not None:
        return read_openpi_stats(wanted.norm_stats, wanted.robot, horizon)
    root = path.parent if path.name == "params" else path
    found = {
        p.parent.relative_to(root / "assets").as_posix(): p for p in sorted(root.glob("assets/**/norm_stats.json"))
    }
    if not found and (root / PREPROCESSOR).is_file():
        return read_processor_stats(root, wanted.robot, horizon)
    names, wrong, next = ", ".join(found) or "none", "", ""
    if wanted.asset_id and wanted.asset_id not in found:
        wrong, next = f"norm stats of {wanted.asset_id!r}", "name one of them: --asset-id"
        names = f"those of {names}"
    elif len(found) != 1 and not wanted.asset_id:
        wrong, next = "one set of norm stats", "choose: --asset-id NAME, or --norm-stats FILE"
    if wrong:
        raise NormStatsError(expected=wrong, found=names, where=str(root / "assets"), next=next)
    return read_openpi_stats(found[wanted.asset_id or min(found)], wanted.robot, horizon)


def wanted_from(
    config: TrainConfig | None,
    robot: Robot | None,
    *,
    tokenizer: str,
    action_tokenizer: str,
    sizes: Mapping[str, int | None],
    normalization: NormMode | None,
    norm_stats: Path | None,
    asset_id: str,
) -> Wanted | None:
    """None where neither recipe nor robot is named.

    Args:
        tokenizer, action_tokenizer: empty: the recipe's, or the released policies'.
        sizes: fields of the model config that override the recipe's; None leaves them.

    Raises:
        TokenizerError: not PaliGemma's tokenizer, for a model with PaliGemma's vocabulary.
        FetchError: a tokenizer cannot be had.
    """
    chosen = robot or (config.robot if config is not None else None)
    if chosen is None:
        return None
    model = config.model if config is not None else None
    action = None
    if isinstance(model, Pi0FastConfig) or action_tokenizer:
        action_source = action_tokenizer or (config.action_tokenizer if config is not None else "fit")
        # There is nothing to fit it to; the released policies speak the published one.
        action = open_action_tokenizer(ASSETS["fast_tokenizer"] if action_source == "fit" else action_source)
    text_source = tokenizer or (config.tokenizer if config is not None else ASSETS["paligemma_tokenizer"])
    text = open_text_tokenizer(text_source, action)
    if isinstance(text, SentencePieceTokenizer) and (model is None or model.vocab_size == PALIGEMMA_VOCABULARY):
        require_paligemma(text)
    return Wanted(
        robot=chosen,
        model=model,
        sizes={name: value for name, value in sizes.items() if value is not None},
        norm_mode=config.norm_mode if config is not None else None,
        normalization=normalization,
        tokenizers=Tokenizers(text, action),
        norm_stats=norm_stats,
        asset_id=asset_id,
    )
