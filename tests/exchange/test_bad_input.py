"""Broken and foreign checkpoints: each a clear error, and nothing half-written left behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from manipi.errors import (
    CheckpointError,
    ConfigError,
    IntegrityError,
    NormStatsError,
    SelfTestError,
    StorageError,
    WeightsMismatchError,
)
from manipi.exchange.certificate import certify
from manipi.exchange.importing import import_checkpoint
from manipi.model.config import Pi05Config
from manipi.policy import Policy

pytest.importorskip("tensorstore", reason="Orbax checkpoints need tensorstore: pip install 'manipi[openpi]'")
QUERY = "paligemma_with_expert.gemma_expert.model.layers.1.self_attn.q_proj.weight"
GATE = "paligemma_with_expert.gemma_expert.model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def jax(exported, tmp_path) -> Path:
    return shutil.copytree(exported("pi0", "openpi-jax"), tmp_path / "source")


@pytest.fixture
def torch_copy(exported, tmp_path) -> Path:
    return shutil.copytree(exported("pi0", "openpi-torch"), tmp_path / "source")


@pytest.fixture
def refused(tmp_path):
    """Importing raises the error, with these words, and leaves nothing."""

    def check(source: Path, kind: type, *words: str, **settings: Any) -> None:
        with pytest.raises(kind) as caught:
            import_checkpoint(source, tmp_path / "target" / "policy", **settings)
        assert type(caught.value) is kind
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert not (tmp_path / "target").exists() or not list((tmp_path / "target").iterdir())

    return check


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()} | tensors
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path)


def weight(folder: Path, name: str) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[name].clone()


def test_a_truncated_file(torch_copy, refused):
    path = torch_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(torch_copy, IntegrityError, "model.safetensors", "copy or fetch it again")


def test_a_truncated_orbax_store(jax, refused):
    largest = max((jax / "params/d").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    refused(jax, IntegrityError, str(jax / "params"), "copy or fetch it again")


def test_a_missing_tensor(torch_copy, refused):
    change(torch_copy, **{QUERY: None})
    refused(torch_copy, WeightsMismatchError, f"missing ['{QUERY}']; unexpected []; mis-shaped []")


def test_a_missing_orbax_array(jax, refused):
    path = jax / "params/_METADATA"
    metadata = json.loads(path.read_text())
    leaf = next(key for key in metadata["tree_metadata"] if "'Dense_1', 'bias'" in key)
    del metadata["tree_metadata"][leaf]
    path.write_text(json.dumps(metadata))
    refused(jax, WeightsMismatchError, "missing ['PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_1/bias']")


def test_a_transposed_tensor(torch_copy, refused):
    gate = weight(torch_copy, GATE)
    change(torch_copy, **{GATE: gate.T.contiguous()})
    rows, columns = gate.shape
    refused(torch_copy, WeightsMismatchError, f"{GATE} ({columns}, {rows}) instead of ({rows}, {columns})")


def test_an_unexpected_tensor(torch_copy, refused):
    change(torch_copy, surplus=torch.zeros(3))
    refused(torch_copy, WeightsMismatchError, "unexpected ['surplus']")


def test_all_that_differs_is_listed(torch_copy, refused):
    change(torch_copy, **{QUERY: None, GATE: weight(torch_copy, GATE)[:, :-1].clone(), "surplus": torch.zeros(3)})
    refused(torch_copy, WeightsMismatchError, QUERY, GATE, "surplus")


def test_nan(torch_copy, refused):
    gate = weight(torch_copy, GATE)
    gate[3, 4] = float("nan")
    change(torch_copy, **{GATE: gate})
    refused(torch_copy, IntegrityError, "NaN or infinity", GATE)


def test_an_output_matrix_that_is_not_the_embedding(torch_copy, refused):
    lm_head = "paligemma_with_expert.paligemma.lm_head.weight"
    embedding = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    change(torch_copy, **{embedding: weight(torch_copy, lm_head)})
    import_checkpoint(torch_copy, torch_copy.parent / "both")
    change(torch_copy, **{embedding: weight(torch_copy, lm_head) + 1})
    refused(torch_copy, WeightsMismatchError, lm_head, embedding)


def test_another_answer_than_before_is_no_certificate(jax):
    model = Pi05Config()
    with pytest.raises(SelfTestError, match=r"a largest difference of 0\.5"):
        certify("a", jax, "openpi-jax", np.ones((2, 3)), np.full((2, 3), 1.5), model=model, read=[], written={})


def test_sizes_that_only_the_user_knows(jax, recipe, tmp_path):
    for horizon in (2, 5):
        stats = jax / "assets/tabletop/norm_stats.json"
        fields = json.loads(stats.read_text())
        fields.pop("manipi", None)  # as openpi writes it, which says nothing of a horizon
        stats.write_text(json.dumps(fields))
        target = tmp_path / f"horizon_{horizon}"
        import_checkpoint(jax, target, recipe=recipe("pi0"), action_horizon=horizon)
        assert Policy.load(target).config.model.action_horizon == horizon


def test_another_kind_of_policy(jax, refused, recipe):
    refused(jax, WeightsMismatchError, "a Pi05Config", "a Pi0Config", recipe=recipe("pi05"))


def test_nothing_that_says_what_weights_cannot(jax, refused):
    shutil.rmtree(jax / "manipi")
    refused(jax, ConfigError, "--recipe", "--robot")


def test_no_or_several_norm_stats(jax, refused, recipe):
    pi0 = recipe("pi0")
    shutil.copytree(jax / "assets/tabletop", jax / "assets/other")
    refused(jax, NormStatsError, "other, tabletop", "--asset-id", recipe=pi0)
    refused(jax, NormStatsError, "'third'", "other, tabletop", recipe=pi0, asset_id="third")
    shutil.rmtree(jax / "assets")
    refused(jax, NormStatsError, "found none", recipe=pi0)


def test_a_language_model_is_no_policy(torch_copy, refused):
    names = {n: t for n, t in load_file(torch_copy / "model.safetensors").items() if ".paligemma.model." in n}
    save_file(
        {f"model.{n.split('.paligemma.model.')[1]}": t.clone() for n, t in names.items()},
        torch_copy / "model.safetensors",
    )
    refused(torch_copy, WeightsMismatchError, "PaliGemma", "--init")


def test_nothing_there(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", CheckpointError, "an empty folder")


def test_the_target_exists(jax, tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(StorageError, match="does not exist yet"):
        import_checkpoint(jax, tmp_path / "target")
