"""What weights cannot tell, from a recipe, a robot and flags."""

from collections.abc import Mapping
from pathlib import Path

from manipi.exchange.importing import Wanted
from manipi.model.config import NormMode, Pi0FastConfig
from manipi.robots.robot import Robot
from manipi.tokenizers import PALIGEMMA_VOCABULARY, SentencePieceTokenizer, Tokenizers, require_paligemma
from manipi.train.config import TrainConfig
from manipi.weights.released import ASSETS
from manipi.weights.tokenizers import open_action_tokenizer, open_text_tokenizer


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
    if config is None and robot is None:
        return None
    model = config.model if config is not None else None
    speaks_codes = isinstance(model, Pi0FastConfig) or bool(action_tokenizer)
    action_source = action_tokenizer or (config.action_tokenizer if config is not None else "fit")
    if action_source == "fit":  # there is nothing to fit it to; the released policies speak the published one
        action_source = ASSETS["fast_tokenizer"]
    action = open_action_tokenizer(action_source) if speaks_codes else None
    text_source = tokenizer or (config.tokenizer if config is not None else ASSETS["paligemma_tokenizer"])
    text = open_text_tokenizer(text_source, action)
    if isinstance(text, SentencePieceTokenizer) and (model is None or model.vocab_size == PALIGEMMA_VOCABULARY):
        require_paligemma(text)
    chosen = robot if robot is not None else config.robot if config is not None else None
    assert chosen is not None
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
