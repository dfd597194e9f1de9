"""Files that are not as their project writes them: whatever stands in them, an error of ours, and never a traceback."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from manipi.checkpoints.initial import load_initial_weights
from manipi.checkpoints.native import read_checkpoint
from manipi.errors import CheckpointError, ConfigError, ManipiError
from manipi.exchange.exporting import export_checkpoint
from manipi.exchange.importing import import_checkpoint
from manipi.model import VLA
from manipi.train.config import TrainConfig
from manipi.transforms import pipeline

pytest.importorskip("tensorstore", reason="Orbax checkpoints need tensorstore: pip install 'manipi[openpi]'")
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
LAYOUTS = ("lerobot", "openpi-torch", "openpi-jax", "ours")
VALUES = (
    None,
    0,
    -1,
    1.5,
    10**30,
    float("nan"),
    "x",
    "",
    "../x",
    [],
    [None],
    ["x"],
    {},
    {"x": 1},
    {"type": "Robot"},
    True,
)
GONE = object()
"""Instead of a value: the field is not there at all."""


@pytest.fixture(scope="session")
def sources(exported, tmp_path_factory) -> dict[str, Path]:
    """A folder of each layout, for everyone: as its project writes it, or with our description ("ours")."""
    made = {}
    for layout in LAYOUTS:
        made[layout] = tmp_path_factory.mktemp(layout) / "folder"
        origin = exported("pi05", "lerobot" if layout == "ours" else layout)
        ours = shutil.ignore_patterns() if layout == "ours" else shutil.ignore_patterns("manipi")
        shutil.copytree(origin, made[layout], ignore=ours)
    for path in made["openpi-jax"].glob("assets/*/norm_stats.json"):
        stats = json.loads(path.read_text())
        path.write_text(json.dumps({"norm_stats": stats["norm_stats"]}))  # as openpi writes it
    shutil.rmtree(made["lerobot"] / "assets")
    split(made["lerobot"])
    return made


def split(folder: Path) -> None:
    """Two files of weights and an index instead of one."""
    weights = load_file(folder / "model.safetensors")
    parts = {f"model-0000{n}-of-00002.safetensors": dict(sorted(weights.items())[n - 1 :: 2]) for n in (1, 2)}
    for name, part in parts.items():
        save_file(part, folder / name)
    where = {key: name for name, part in parts.items() for key in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()


@pytest.fixture(scope="session")
def pi05(recipe) -> TrainConfig:
    return recipe("pi05")


def read(folder: Path, recipe: TrainConfig | None) -> None:
    """All that an import reads, but for the numbers of the weights."""
    with patch("manipi.exchange.importing.answer_of_foreign", side_effect=StopIteration) as answer:
        with pytest.raises((ManipiError, StopIteration)) as stopped:
            import_checkpoint(folder, folder.with_name("never"), recipe=recipe)
        if isinstance(stopped.value, ManipiError):
            raise stopped.value
    (_, d), _ = answer.call_args
    pipeline.build(d.robot, d.config.model, d.norm_stats, d.tokenizers, d.config.norm_mode)


def places(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield from places(value, (*place, key))


def changed(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value if value is not GONE else {}
    data = copy.deepcopy(data)
    node = data
    for key in place[:-1]:
        node = node[key]
    if value is GONE:
        del node[place[-1]]
    else:
        node[place[-1]] = value
    return data


def files_of(folder: Path) -> list[Path]:
    """Every JSON that the import reads, with few of many places that are alike."""
    found = [path for path in sorted(folder.rglob("*")) if path.suffix == ".json" or path.name == "_METADATA"]
    return [path for path in found if path.name != "manifest.json"]


def attempt(
    sources: dict[str, Path], layout: str, recipe: TrainConfig, path: Path, place: tuple[Any, ...], value: Any
) -> None:
    folder, whole = sources[layout], path.read_text()
    try:
        path.write_text(json.dumps(changed(json.loads(whole), place, value)))
        said = refusal(folder, None if layout == "ours" else recipe)
    except Exception as error:
        raise AssertionError(f"{path.name}, {place} = {value!r}: {error!r}") from error
    finally:
        path.write_text(whole)
    assert len(said) < 4000, f"{path.name}, {place} = {value!r}"


def refusal(folder: Path, recipe: TrainConfig | None) -> str:
    """What the import says of it; empty where it finds nothing wrong."""
    try:
        read(folder, recipe)
    except ManipiError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60)
@given(data=st.data())
def test_whatever_stands_in_a_file_is_an_error_of_ours(sources, pi05, layout, data):
    path = data.draw(st.sampled_from(files_of(sources[layout])))
    place = data.draw(st.sampled_from(list(places(json.loads(path.read_text())))))
    attempt(sources, layout, pi05, path, place, data.draw(st.sampled_from((*VALUES, GONE))))


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_value_in_every_place(sources, pi05, layout):
    for path in files_of(sources[layout]):
        for place in list(places(json.loads(path.read_text())))[:400]:
            for value in (*VALUES, GONE):
                attempt(sources, layout, pi05, path, place, value)


@pytest.fixture
def folder(sources, tmp_path) -> Path:
    """openpi's PyTorch layout, to change."""
    return shutil.copytree(sources["openpi-torch"], tmp_path / "folder")


def refused(folder: Path, recipe: TrainConfig, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read(folder, recipe)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_quantized_weights_are_refused_by_type_and_name(folder, pi05, dtype):
    path = folder / "model.safetensors"
    weights = load_file(path)
    names = [name for name in weights if "q_proj" in name]
    save_file({**weights, **{name: weights[name].to(dtype) for name in names}}, path)
    refused(folder, pi05, f"in {len(names)} tensors", min(names), "float32, bfloat16")


def test_quantized_weights_of_openpi_are_refused(sources, pi05, tmp_path):
    ts = pytest.importorskip("tensorstore")
    folder = shutil.copytree(sources["openpi-jax"], tmp_path / "folder")
    path = "PaliGemma.img.embedding.kernel"
    store = {"driver": "ocdbt", "base": f"file://{folder}/params/", "path": f"params.{path}/"}
    spec = {"driver": "zarr", "kvstore": store}
    shape = ts.open(spec).result().shape
    ts.open(spec, create=True, delete_existing=True, dtype="int8", shape=shape).result().write(1).result()
    refused(folder, pi05, "int8 in 1 tensors", "PaliGemma/img/embedding/kernel")


def test_half_precision_weights_are_read(folder, pi05, tmp_path):
    path = folder / "model.safetensors"
    save_file({name: weight.half() for name, weight in load_file(path).items()}, path)
    import_checkpoint(folder, tmp_path / "ours", recipe=pi05)
    assert {w.dtype for w in read_checkpoint(tmp_path / "ours").weights.values()} == {torch.float16}
    with pytest.raises(ConfigError, match=r"(?s)openpi-jax.*float16.*--dtype"):
        export_checkpoint(tmp_path / "ours", "openpi-jax", tmp_path / "jax")
    export_checkpoint(tmp_path / "ours", "openpi-jax", tmp_path / "jax", dtype=torch.float32)


def test_an_index_that_says_nothing_or_leads_elsewhere(folder, pi05, tmp_path):
    split(folder)
    read(folder, pi05)
    index = json.loads((folder / INDEX).read_text())
    whole = index["weight_map"]
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(
        (folder / "model-00001-of-00002.safetensors").read_bytes()
    )
    for value, words in (
        ({"metadata": {}}, ("weight_map", "no value")),
        ({"weight_map": {**whole, "a": "../model-00001-of-00002.safetensors"}}, ("same folder", "../model")),
        ({"weight_map": {**whole, "a": str(tmp_path / "model-00001-of-00002.safetensors")}}, ("same folder",)),
        ({"weight_map": {**whole, "a": "gone.safetensors"}}, ("'gone.safetensors'", "no such file")),
        ({"weight_map": {**whole, "a": 7}}, ("a text", "found 7")),
    ):
        (folder / INDEX).write_text(json.dumps(value))
        refused(folder, pi05, INDEX, *words)
    (folder / INDEX).write_text(json.dumps(index))
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "again.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {**whole, "a": "again.safetensors"}}))
    refused(folder, pi05, "a second ")
    shutil.copy(folder / "again.safetensors", folder / "model.safetensors")
    refused(folder, pi05, "model.safetensors and model.safetensors.index.json")


def test_a_tensor_of_another_rank(folder, pi05):
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name in [name for name in weights if name.endswith(("patch_embedding.weight", "q_proj.weight"))]:
        save_file({**weights, name: weights[name].reshape(-1)}, path)
        refused(folder, pi05, name)


def adapter(folder: Path, where: str = ".") -> None:
    inner = folder / where
    inner.mkdir(exist_ok=True)
    (inner / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "lerobot/pi05_base", "r": 16}))
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 3)}, inner / "adapter_model.safetensors")


@pytest.mark.parametrize("layout", ["lerobot", "openpi-torch", "openpi-jax"])
@pytest.mark.parametrize("where", [".", "adapter"])
def test_adapters_of_peft_are_never_passed_over(sources, pi05, tmp_path, layout, where):
    folder = shutil.copytree(sources[layout], tmp_path / "folder")
    adapter(folder, where)
    refused(folder, pi05, "PEFT's adapters beside them", "adapter", "merge_and_unload")
    with pytest.raises(CheckpointError, match="PEFT's adapters beside them"):  # nor by training
        load_initial_weights(VLA(pi05.model), str(folder))


def test_adapters_of_peft_alone_are_refused_by_their_name(pi05, tmp_path):
    adapter(tmp_path)
    alone = ("PEFT's adapters alone", "adapter_config.json, adapter_model.safetensors", "'lerobot/pi05_base'")
    refused(tmp_path, pi05, *alone)
    refused(tmp_path / "adapter_model.safetensors", pi05, *alone)
    (tmp_path / "adapter_config.json").unlink()
    refused(tmp_path, pi05, "PEFT's adapters alone", "adapter_model.safetensors")
