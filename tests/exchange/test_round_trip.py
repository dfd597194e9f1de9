"""Out and in again: every layout keeps every bit, and the certificate says so."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from manipi.checkpoints.initial import load_initial_weights
from manipi.checkpoints.native import read_checkpoint
from manipi.cli import main
from manipi.errors import ConfigError, IntegrityError, NormStatsError, WeightsMismatchError
from manipi.exchange.exporting import export_checkpoint
from manipi.exchange.importing import import_adapters, import_checkpoint
from manipi.model import VLA
from manipi.model.config import NO_ADAPTERS
from manipi.policy import Policy
from manipi.weights.stores import OrbaxStore

LAYOUTS = [
    *((kind, to) for kind in ("pi0", "pi05") for to in ("openpi-jax", "openpi-torch", "lerobot")),
    ("pi0_fast", "openpi-jax"),
    ("pi0_fast", "lerobot"),
    ("adapted", "openpi-jax"),
]
pytest.importorskip("tensorstore", reason="Orbax checkpoints need tensorstore: pip install 'manipi[openpi]'")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(("kind", "to"), LAYOUTS)
def test_every_bit_comes_back(checkpoints, exported, tmp_path, kind, to):
    certificate = import_checkpoint(exported(kind, to), tmp_path / "back")
    before, after = read_checkpoint(checkpoints(kind)), read_checkpoint(tmp_path / "back")
    assert same(dict(before.weights), dict(after.weights))
    assert (after.config, after.robot) == (before.config, before.robot)
    assert certificate.difference == 0
    assert certificate.magnitude > 0.01
    assert certificate.tensors == len(before.weights)
    # The expert's own output matrix is the one tensor that nobody reads.
    assert len(certificate.unused) == (to in ("openpi-torch", "lerobot") and kind != "pi0_fast")
    Policy.load(tmp_path / "back")  # replays the self-test


def test_an_orbax_tree_comes_back_bit_for_bit(exported, tmp_path):
    first = exported("adapted", "openpi-jax")
    import_checkpoint(first, tmp_path / "back")
    export_checkpoint(tmp_path / "back", "openpi-jax", tmp_path / "again")
    a, b = OrbaxStore(first / "params").tree(), OrbaxStore(tmp_path / "again/params").tree()
    assert a.keys() == b.keys()
    assert all(a[name].tobytes() == b[name].tobytes() and a[name].dtype == b[name].dtype for name in a)


def test_another_dtype_is_said_and_measured(exported, tmp_path):
    certificate = import_checkpoint(exported("pi05", "openpi-jax"), tmp_path / "half", dtype=torch.bfloat16)
    assert certificate.dtypes_before.keys() == {"float32"}
    assert certificate.dtypes_after.keys() == {"bfloat16"}
    assert 0 < certificate.difference < 0.1
    assert {w.dtype for w in read_checkpoint(tmp_path / "half").weights.values()} == {torch.bfloat16}


def test_adapters_travel_alone(adapted, exported, tmp_path):
    folder = exported("adapted", "adapters")
    with safe_open(folder / "adapters.safetensors", framework="pt") as file:
        assert all(".lora_" in name for name in file.keys())  # noqa: SIM118 (the file is no mapping)
    export_checkpoint(adapted, "manipi", tmp_path / "merged", merge=True)
    import_adapters(folder, adapted, tmp_path / "joined")
    assert same(dict(read_checkpoint(adapted).weights), dict(read_checkpoint(tmp_path / "joined").weights))
    with pytest.raises(IntegrityError, match="the weights that the adapters were trained on"):
        import_adapters(folder, tmp_path / "merged", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_merged_adapters_compute_the_same(adapted, tmp_path):
    certificate = export_checkpoint(adapted, "manipi", tmp_path / "merged", merge=True)
    merged = read_checkpoint(tmp_path / "merged").weights
    assert not any(".lora_" in name for name in merged)
    plain = {n: w for n, w in read_checkpoint(adapted).weights.items() if n in merged}
    assert not same(dict(plain), dict(merged))
    assert certificate.difference < 1e-4 * certificate.magnitude
    Policy.load(tmp_path / "merged")  # it can be served


@pytest.mark.parametrize("to", ["openpi-torch", "lerobot"])
def test_plain_layouts_refuse_adapters(adapted, tmp_path, to):
    with pytest.raises(ConfigError, match="--merge"):
        export_checkpoint(adapted, to, tmp_path / "x")
    assert export_checkpoint(adapted, to, tmp_path / "y", merge=True).difference < 1e-3
    assert list(tmp_path.iterdir()) == [tmp_path / "y"]


def test_a_full_model_takes_no_adapters_and_an_adapted_one_keeps_its_own(exported, adapted):
    with_adapters = read_checkpoint(adapted).config.model
    plain = VLA(replace(with_adapters, vlm_adapters=NO_ADAPTERS, action_adapters=NO_ADAPTERS))
    with pytest.raises(WeightsMismatchError, match=r"unexpected \['gemma\.blocks\.0.*lora_a'"):
        load_initial_weights(plain, str(exported("adapted", "openpi-jax")))
    model = VLA(with_adapters)
    before = {name: p.clone() for name, p in model.named_parameters()}
    kept = load_initial_weights(model, str(exported("pi0", "openpi-jax")))
    assert kept
    assert all(torch.equal(before[name], p) is (name in kept) for name, p in model.named_parameters() if p.any())
    assert all(".lora_" in name for name in kept)


def paligemma(folder, weights, root, head):
    """A checkpoint of the vision-language model alone, in transformers' layout, its vocabulary padded by 64 rows."""
    renamed = {}
    for name, tensor in weights.items():
        if ".paligemma.model." in name:
            renamed[root + name.split(".paligemma.model.")[1]] = tensor
    padding = torch.zeros(64, weights[head].shape[1])
    renamed[f"{root}language_model.embed_tokens.weight"] = torch.cat([weights[head], padding])
    folder.mkdir()
    save_file(renamed, folder / "model.safetensors")


def test_a_vlm_initialises_the_vlm_alone(exported, checkpoints, tmp_path):
    weights = load_file(exported("pi05", "lerobot") / "model.safetensors")
    paligemma(tmp_path / "vlm", weights, "model.", "model.paligemma_with_expert.paligemma.lm_head.weight")
    checkpoint = read_checkpoint(checkpoints("pi05"))
    model = VLA(checkpoint.config.model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = load_initial_weights(model, str(tmp_path / "vlm"))
    assert all(name.startswith("head.") or ".action." in name for name in kept)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] if name in kept else checkpoint.weights[name])


def test_a_vlm_from_big_vision(exported, checkpoints, tmp_path):
    tree = OrbaxStore(exported("pi05", "openpi-jax") / "params").tree()
    vlm = {
        name.replace("PaliGemma/", "params/", 1): values
        for name, values in tree.items()
        if name.startswith("PaliGemma/") and not ("/llm/" in name and "_1/" in f"{name}/")
    }
    np.savez(tmp_path / "pt.npz", **vlm)
    checkpoint = read_checkpoint(checkpoints("pi05"))
    model = VLA(checkpoint.config.model)
    kept = load_initial_weights(model, str(tmp_path / "pt.npz"))
    state = model.state_dict()
    assert all(torch.equal(state[name], w) for name, w in checkpoint.weights.items() if name not in kept)
    assert len(kept) < len(state) / 2


def test_the_commands(checkpoints, tmp_path, capsys):
    main(
        ["export", str(checkpoints("pi0")), str(tmp_path / "out"), "--to", "openpi-jax", "--json", f"{tmp_path}/e.json"]
    )
    main(["import", str(tmp_path / "out"), str(tmp_path / "in"), "--json", str(tmp_path / "i.json")])
    assert "all accounted for" in capsys.readouterr().out
    results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in "ei"]
    assert all(result["difference"] == 0 for result in results)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_norm_stats_come_back_from_lerobots_preprocessor(exported, checkpoints, recipe, tmp_path, kind):
    folder, before = lerobot_alone(exported(kind, "lerobot"), tmp_path), read_checkpoint(checkpoints(kind))
    import_checkpoint(folder, tmp_path / "back", recipe=recipe(kind))
    after = read_checkpoint(tmp_path / "back").norm_stats
    for field in ("state", "actions"):
        for name in ("mean", "std", "q01", "q99"):
            expected = getattr(getattr(before.norm_stats, field), name)
            np.testing.assert_array_equal(getattr(getattr(after, field), name), expected.astype(np.float32))


def test_a_recipe_says_what_weights_cannot(exported, checkpoints, recipe, tmp_path):
    before, fast = read_checkpoint(checkpoints("pi0_fast")), recipe("pi0_fast")
    folder = shutil.copytree(exported("pi0_fast", "openpi-jax"), tmp_path / "jax", ignore=lambda *_: ["manipi"])
    codes = str(checkpoints("pi0_fast") / "tokenizer/action")  # the recipe fits some to data that is not here
    import_checkpoint(folder, tmp_path / "back", recipe=fast, action_tokenizer=codes)
    after = read_checkpoint(tmp_path / "back")
    assert same(dict(before.weights), dict(after.weights))
    assert (after.config, after.robot) == (replace(before.config, model=fast.model, step=0), before.robot)
    assert after.tokenizers.action == before.tokenizers.action


def test_a_base_without_statistics_needs_some(exported, recipe, tmp_path):
    folder = lerobot_alone(exported("pi05", "lerobot"), tmp_path)
    pipeline = json.loads((folder / "policy_preprocessor.json").read_text())
    for step in pipeline["steps"]:
        step.pop("state_file", None)  # as a base is published, which was trained on no robot in particular
    (folder / "policy_preprocessor.json").write_text(json.dumps(pipeline))
    with pytest.raises(NormStatsError, match="with a state_file"):
        import_checkpoint(folder, tmp_path / "back", recipe=recipe("pi05"))
    stats = exported("pi05", "lerobot") / "assets/tabletop/norm_stats.json"
    import_checkpoint(folder, tmp_path / "back", recipe=recipe("pi05"), norm_stats=stats)


def test_fast_has_no_processors_that_would_decode_with_other_codes(exported):
    assert not list(exported("pi0_fast", "lerobot").glob("policy_*"))


def lerobot_alone(folder, tmp_path):
    """A copy with nothing in it that LeRobot does not write."""
    copy = tmp_path / "lerobot"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("manipi", "assets"))
    return copy
