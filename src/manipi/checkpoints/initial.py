"""Weights to go on from: of a checkpoint of ours, of openpi, of LeRobot, or of the vision-language model alone."""

from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from manipi.checkpoints.adapters import is_adapter, merge_adapters
from manipi.checkpoints.native import MANIFEST, read_description, verify
from manipi.errors import CheckpointError
from manipi.model import VLA
from manipi.model.device import fill
from manipi.remote.fetch import fetch
from manipi.tokenizers.text import PALIGEMMA_VOCABULARY, TextTokenizer, require_paligemma
from manipi.weights.layouts import open_weights
from manipi.weights.names import require_match
from manipi.weights.released import resolve


def load_initial_weights(model: VLA, source: str) -> list[str]:
    """Fill a model from a checkpoint. Returns the names that keep their own initial values.

    Those may be adapters that the checkpoint has not, and everything beyond the language model where it is a PaliGemma.

    Args:
        source: a released name, a folder, a file, or a URL. A run's folder stands for its newest checkpoint, and
            adapters that the model has not are merged into the matrices that they adapt.

    Raises:
        WeightsMismatchError: anything else is missing, and whatever is unexpected or mis-shaped.
        CheckpointError: no checkpoint, or a damaged one.
        FetchError: it cannot be had.
    """
    path = _folder(source)
    parameters = dict(model.named_parameters())
    tensors: Iterable[tuple[str, Tensor]]
    vlm_only = False
    if (path / MANIFEST).is_file():
        verify(path)
        if not (path / "model.safetensors").is_file():
            raise CheckpointError(
                expected="a checkpoint with all weights",
                found="adapters alone",
                where=str(path),
                next="join them with their base first: manipi import (see its --help)",
            )
        weights = load_file(path / "model.safetensors")
        if any(is_adapter(name) and name not in parameters for name in weights):
            weights = merge_adapters(weights, read_description(path).config.model, keep=parameters)
        theirs = {name: tuple(w.shape) for name, w in weights.items()}
        tensors = weights.items()
    else:
        foreign = open_weights(path)
        config, vlm_only = foreign.config(like=model.config), foreign.layout.vlm_only
        foreign.check(config)
        theirs = {name: a.our_shape for a in foreign.arrays(config).values() for layer in a.names for name in layer}
        tensors = foreign.tensors(config)
    kept = [name for name in parameters if name not in theirs and (vlm_only or is_adapter(name))]
    require_match({name: tuple(p.shape) for name, p in parameters.items() if name not in kept}, theirs, str(path))
    for name, tensor in tensors:
        fill(parameters[name], tensor)
    return kept


def require_tokenizer(source: str, vocab_size: int, text: TextTokenizer) -> None:
    """That a model of `vocab_size` reads prompts in the ids that the weights of `source` were trained with.

    Raises:
        TokenizerError: not PaliGemma's tokenizer, where another project's weights have its vocabulary.
        FetchError: the weights cannot be had.
    """
    # Our own checkpoints may have been trained with any tokenizer, whatever the size of their embedding.
    if vocab_size == PALIGEMMA_VOCABULARY and not (_folder(source) / MANIFEST).is_file():
        require_paligemma(text)


def _folder(source: str) -> Path:
    """Where the weights are: of a run's folder, its newest checkpoint."""
    path = fetch(resolve(source))
    checkpoints = path / "checkpoints"
    if not checkpoints.is_dir():
        return path
    steps = [int(one.name) for one in checkpoints.iterdir() if one.name.isdigit()]
    if not steps:
        raise CheckpointError(
            expected="a run with a checkpoint to start from",
            found="none yet",
            where=str(checkpoints),
            next="let that run reach its first checkpoint, or name other weights",
        )
    return checkpoints / str(max(steps))
