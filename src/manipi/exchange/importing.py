"""Other projects' checkpoints become ours: a folder that is enough to serve.

weights      the source's tensors, streamed one layer at a time; strict in both directions
norm stats   assets/<asset id>/norm_stats.json beside the weights, or LeRobot's policy_preprocessor.json
the rest     robot, tokenizers, and what the files beside the weights leave open: from a recipe or robot, or from the
             `manipi/` folder that our own exports carry; what contradicts those files (`Stated`) is refused
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

from manipi.checkpoints.initial import read_adapters
from manipi.checkpoints.native import Checkpoint, PolicyConfig, read_checkpoint, read_description
from manipi.errors import CheckpointError, ConfigError, NormStatsError, WeightsMismatchError
from manipi.exchange.certificate import (
    Certificate,
    answer_of_foreign,
    answer_of_weights,
    certify,
    write_streamed,
)
from manipi.exchange.lerobot import CONFIG, DESCRIPTION, PREPROCESSOR, Stated, read_processor_stats, read_stated
from manipi.model.config import NormMode, Pi0FastConfig
from manipi.robots.robot import Robot
from manipi.storage import atomic_directory, require_absent, require_room
from manipi.tokenizers import SentencePieceTokenizer, Tokenizers
from manipi.tokenizers.text import PALIGEMMA_VOCABULARY, require_paligemma
from manipi.train.config import TrainConfig
from manipi.transforms.normalize import read_openpi_stats
from manipi.types import NormStats
from manipi.weights.layouts import ForeignWeights, open_action_tokenizer, open_text_tokenizer, open_weights
from manipi.weights.released import ASSETS
from manipi.weights.stores import ArrayInfo, bytes_of


def import_checkpoint(
    path: Path,
    target: Path,
    *,
    recipe: TrainConfig | None = None,
    robot: Robot | None = None,
    norm_stats: Path | None = None,
    asset_id: str = "",
    normalization: NormMode | None = None,
    action_horizon: int | None = None,
    max_token_len: int | None = None,
    tokenizer: str = "",
    action_tokenizer: str = "",
    dtype: torch.dtype | None = None,
) -> Certificate:
    """Make another project's checkpoint ours, and prove that it answers as before; on any error nothing is left behind.

    What weights cannot tell comes from the files beside them, and from `recipe` or `robot`; without both, from the
    description that our own exports carry.

    Args:
        path: a folder or file in a layout of `manipi.weights.layouts`.
        target: the folder to write.
        recipe: what a recipe returns. Of it count robot, model, normalisation and tokenizers.
        robot: instead of the recipe's; without a recipe the released policies' settings are the model's.
        norm_stats: their file; None: the one in the checkpoint's assets, or its LeRobot preprocessor.
        asset_id: which of several in its assets.
        normalization: instead of the recipe's, where no file beside the weights says it.
        action_horizon: H of an action chunk, instead of the recipe's.
        max_token_len: tokens of a prompt, likewise.
        tokenizer: a SentencePiece model (file or URL) or `byte`; empty: the recipe's, or PaliGemma's.
        action_tokenizer: of π0-FAST: `binning`, or a folder or URL; empty: the recipe's, or the published FAST.
        dtype: of the weights written; None keeps each tensor's own.

    Raises:
        CheckpointError: see `manipi.weights.layouts` and `manipi.exchange.lerobot`.
        NormStatsError: no statistics, several to choose from, or statistics of another robot.
        ConfigError: the source does not describe itself, and nothing else does; or recipe, robot or what else is named
            contradict the files beside the weights.
        TokenizerError: not PaliGemma's tokenizer, for a model with PaliGemma's vocabulary.
        FetchError: a tokenizer cannot be had.
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
    robot = robot or (recipe.robot if recipe is not None else None)
    stated = Stated(folder=source.path)
    if robot is None:
        described = _carried(source)
    else:
        stated = read_stated(source)
        named = {"action_horizon": action_horizon, "max_token_len": max_token_len}
        sizes = {name: size for name, size in named.items() if size is not None}
        config = _policy_config(source, stated, recipe, sizes, normalization)
        stated.require_robot(robot, config.model.cameras)
        stats = _norm_stats(stated.folder, robot, config.model.action_horizon, norm_stats, asset_id)
        tokenizers = _tokenizers(recipe, tokenizer, action_tokenizer)
        described = Checkpoint(
            weights={}, config=config, robot=robot, norm_stats=stats, tokenizers=tokenizers, self_test=None
        )
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
        after = answer_of_weights(whole)
        read = [info.dtype for name, info in source.store.arrays.items() if name not in source.unused]
        proof = certify(str(path), target, source.layout.name, before, after, model=model, read=read, written=infos)
        return replace(proof, unused=source.unused, said=stated.rows())


def import_adapters(path: Path, base: Path, target: Path) -> Certificate:
    """Write our checkpoint folder from adapters that were exported alone and the checkpoint that they belong to.

    Raises:
        CheckpointError: see `manipi.checkpoints.initial.read_adapters`.
    """
    adapted = read_adapters(path, read_checkpoint(base))
    infos = {name: ArrayInfo(tuple(w.shape), w.dtype) for name, w in adapted.weights.items()}
    before, model, read = answer_of_weights(adapted), adapted.config.model, [info.dtype for info in infos.values()]
    with atomic_directory(target) as folder:
        after = answer_of_weights(write_streamed(folder, adapted, infos, adapted.weights.items()))
        return certify(f"{path} on {base}", target, "adapters", before, after, model=model, read=read, written=infos)


def _carried(source: ForeignWeights) -> Checkpoint:
    """The description that our own exports carry, for weights of these sizes."""
    folder = source.path / DESCRIPTION
    if not folder.is_dir():
        raise ConfigError(
            expected="what weights cannot tell: robot, horizon, prompt format",
            found="no recipe, no robot, and no description in the checkpoint",
            where=str(source.path),
            next="add --recipe NAME (manipi recipes), or --robot FILE.py:NAME",
        )
    described = read_description(folder)
    model = source.config(like=described.config.model)
    return replace(described, config=replace(described.config, model=model))


def _policy_config(
    source: ForeignWeights, stated: Stated, recipe: TrainConfig | None, sizes: Mapping[str, int], flag: NormMode | None
) -> PolicyConfig:
    """Of weights, files and recipe, which must agree. `sizes`, `flag` (of the normalisation): what the user named."""
    model = source.config(like=recipe.model if recipe is not None else None)
    if stated.kind not in (None, type(model)):
        raise CheckpointError(
            expected=f"the weights of a {stated.kind.__name__}, as {CONFIG} says",
            found=f"those of a {type(model).__name__}",
            where=str(stated.folder),
            next="copy or fetch the folder again; its files do not belong together",
        )
    if recipe is None:  # the files say what the released policies' settings would
        known = {f.name for f in fields(model)} - {"action_dim"}
        model = replace(model, **{name: said.value for name, said in stated.said.items() if name in known})
    model = replace(model, **sizes)
    stated.require_model(model, frozenset(sizes))
    mode = stated.normalization(recipe.norm_mode if recipe is not None else None, flag, type(model))
    step = int(source.path.name) if source.path.name.isdigit() else 0
    sampling = {"num_steps": steps} if (steps := stated.get("num_steps")) else {}
    return PolicyConfig(model=model, norm_mode=mode, step=step, **sampling)


def _norm_stats(path: Path, robot: Robot, horizon: int, file: Path | None, asset_id: str) -> NormStats:
    if file is not None:
        return read_openpi_stats(file, robot, horizon)
    root = path.parent if path.name == "params" else path
    files = sorted(root.glob("assets/**/norm_stats.json"))
    found = {path.parent.relative_to(root / "assets").as_posix(): path for path in files}
    if not found and (root / PREPROCESSOR).is_file():
        return read_processor_stats(root, robot, horizon)
    if asset_id in found or (len(found) == 1 and not asset_id):
        return read_openpi_stats(found[asset_id or min(found)], robot, horizon)
    names = ", ".join(found) or "none"
    expected, next = "one set of norm stats", "choose: --asset-id NAME, or --norm-stats FILE"
    if asset_id:
        expected, names, next = f"norm stats of {asset_id!r}", f"those of {names}", "name one of them: --asset-id"
    raise NormStatsError(expected=expected, found=names, where=str(root / "assets"), next=next)


def _tokenizers(recipe: TrainConfig | None, tokenizer: str, action_tokenizer: str) -> Tokenizers:
    """Those that the user names, or else the recipe's, or else the released policies'."""
    model, action = recipe.model if recipe is not None else None, None
    if isinstance(model, Pi0FastConfig) or action_tokenizer:
        named = action_tokenizer or (recipe.action_tokenizer if recipe is not None else "fit")
        # There is nothing to fit it to; the released policies speak the published one.
        action = open_action_tokenizer(ASSETS["fast_tokenizer"] if named == "fit" else named)
    released = ASSETS["paligemma_tokenizer"]
    text = open_text_tokenizer(tokenizer or (recipe.tokenizer if recipe is not None else released), action)
    if isinstance(text, SentencePieceTokenizer) and (model is None or model.vocab_size == PALIGEMMA_VOCABULARY):
        require_paligemma(text)
    return Tokenizers(text, action)
