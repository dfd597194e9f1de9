import subprocess
import sys

import pytest

from manipi.errors import UnknownNameError
from manipi.weights.released import ASSETS, PRETRAINED, RELEASED, resolve


def test_every_checkpoint_of_the_reference_has_a_name_of_its_own():
    urls = {checkpoint.url for checkpoint in RELEASED.values()}
    assert len(urls) == len(RELEASED) == 3 + 8 + 5 + 4
    assert sum("/roboarena/" in url for url in urls) == 5
    assert sum("/polaris/" in url for url in urls) == 4
    assert all(url.endswith(f"/{name}") for name, url in zip(RELEASED, (c.url for c in RELEASED.values())))


def test_a_recipe_takes_norm_stats_that_are_there():
    for checkpoint in RELEASED.values():
        assert (checkpoint.recipe is None) == (checkpoint.asset_id is None)
        assert checkpoint.asset_id is None or checkpoint.asset_id in checkpoint.asset_ids
    assert RELEASED["pi0_base"].asset_ids == PRETRAINED


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("pi05_droid", "gs://openpi-assets/checkpoints/pi05_droid"),
        ("paligemma_vq_droid", "gs://openpi-assets/checkpoints/roboarena/paligemma_vq_droid"),
        ("fast_tokenizer", "hf://physical-intelligence/fast"),
        ("s3://bucket/mine", "s3://bucket/mine"),
        ("./pi05_droid", "./pi05_droid"),
    ],
)
def test_a_name_becomes_its_address_and_an_address_stays(source, address):
    assert resolve(source) == address


def test_a_folder_of_the_working_directory_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("mine") == "mine"


def test_an_unknown_name_comes_with_the_closest():
    with pytest.raises(UnknownNameError, match="did you mean pi05_droid"):
        resolve("pi05_droit")


def test_the_names_cost_no_slow_import():
    code = "import sys, manipi.weights.released as r; print([m for m in %r if m in sys.modules], len(r.ASSETS))"
    slow = ("torch", "numpy", "fsspec", "huggingface_hub", "aiohttp", "filelock")
    result = subprocess.run([sys.executable, "-c", code % (slow,)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"[] {len(ASSETS)}"
