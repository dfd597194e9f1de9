"""What others have published, by short name.

    pi05_droid            ──▶   gs://openpi-assets/checkpoints/pi05_droid
    paligemma_tokenizer   ──▶   gs://big_vision/paligemma_tokenizer.model#sha256=…

Only names and addresses: nothing is fetched here, and nothing slow is imported, so that `--help` can list them.
"""

from dataclasses import dataclass
from pathlib import Path

from manipi.errors import unknown_name

CHECKPOINTS = "gs://openpi-assets/checkpoints"

PRETRAINED = (
    "trossen",
    "trossen_mobile",
    "droid",
    "franka",
    "ur5e",
    "ur5e_dual",
    "arx",
    "arx_mobile",
    "fibocom_mobile",
)
"""Asset ids: the robots of the pre-training data whose norm stats lie in a base's `assets/`. ALOHA is `trossen`."""


@dataclass(frozen=True, kw_only=True)
class Released:
    """A checkpoint of openpi: `params/` in Orbax layout, and `assets/ASSET_ID/norm_stats.json`."""

    name: str
    url: str
    recipe: str | None
    """The recipe that serves it as it is; None for a base that has to be fine-tuned first."""
    asset_id: str | None
    """The norm stats that the recipe takes; None where a recipe has to choose."""
    asset_ids: tuple[str, ...]
    """All norm stats in it that openpi's documentation or configs name."""


def _base(name: str, recipe: str | None, asset_ids: tuple[str, ...]) -> Released:
    asset_id = "trossen" if recipe else None
    return Released(name=name, url=f"{CHECKPOINTS}/{name}", recipe=recipe, asset_id=asset_id, asset_ids=asset_ids)


def _tuned(path: str, asset_id: str) -> Released:
    """openpi's config of a fine-tuned checkpoint has the checkpoint's name."""
    name = path.rpartition("/")[2]
    return Released(name=name, url=f"{CHECKPOINTS}/{path}", recipe=name, asset_id=asset_id, asset_ids=(asset_id,))


RELEASED = {
    checkpoint.name: checkpoint
    for checkpoint in (
        _base("pi0_base", "pi0_aloha", PRETRAINED),
        _base("pi0_fast_base", None, PRETRAINED),
        _base("pi05_base", "pi05_aloha", ("trossen", "droid")),
        _tuned("pi0_droid", "droid"),
        _tuned("pi0_fast_droid", "droid"),
        _tuned("pi05_droid", "droid"),
        _tuned("pi05_libero", "physical-intelligence/libero"),
        _tuned("pi0_aloha_towel", "trossen"),
        _tuned("pi0_aloha_tupperware", "trossen"),
        _tuned("pi0_aloha_pen_uncap", "trossen"),
        _tuned("pi0_aloha_sim", "lerobot/aloha_sim_transfer_cube_human"),
        _tuned("roboarena/paligemma_binning_droid", "droid"),
        _tuned("roboarena/paligemma_diffusion_droid", "droid"),
        _tuned("roboarena/paligemma_fast_droid", "droid"),
        _tuned("roboarena/paligemma_fast_specialist_droid", "droid"),
        _tuned("roboarena/paligemma_vq_droid", "droid"),
        _tuned("polaris/pi05_droid_jointpos_polaris", "droid"),
        _tuned("polaris/pi0_fast_droid_jointpos_polaris", "droid"),
        _tuned("polaris/pi0_droid_jointpos_polaris", "droid"),
        _tuned("polaris/pi0_droid_jointpos_100k_polaris", "droid"),
    )
}

_TOKENIZER_SHA256 = "8986bb4f423f07f8c7f70d0dbe3526fb2316056c17bae71b1ea975e77a168fc6"
ASSETS = {
    "paligemma_pt_224": "gs://vertex-model-garden-paligemma-us/paligemma/pt_224.npz",
    "paligemma_tokenizer": f"gs://big_vision/paligemma_tokenizer.model#sha256={_TOKENIZER_SHA256}",
    "fast_tokenizer": "hf://physical-intelligence/fast",
    "fast_droid_specialist": "hf://KarlP/fast_droid_specialist",
    "droid_fsq_tokenizer": "gs://openpi-assets/tokenizers/droid_fsq_tokenizer",
    "droid_sample_ranges": "gs://openpi-assets/droid/droid_sample_ranges_v1_0_1.json",
    "polaris_sample_ranges": "gs://openpi-assets/droid/polaris_droid_cotrain_dataset_sample_ranges_v1_0_0.json",
}
"""Weights to start a VLM from, tokenizers, and the frames of DROID that are worth training on."""


def resolve(source: str) -> str:
    """The address that a short name stands for; an address or a path (`./pi05_base`) as it is.

    Raises:
        UnknownNameError: neither; with the closest names.
    """
    if source in RELEASED:
        return RELEASED[source].url
    if source in ASSETS:
        return ASSETS[source]
    if "/" in source or Path(source).exists():
        return source
    raise unknown_name(
        "released checkpoint or asset", source, (*RELEASED, *ASSETS), next="or give a path or an address"
    )
