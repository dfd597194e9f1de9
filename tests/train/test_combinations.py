"""Settings of a step that have to work with each other: two steps, a save and a resumption for each."""

import importlib.util
from dataclasses import replace
from itertools import combinations, product

import pytest

from manipi.checkpoints.native import verify
from manipi.model.config import Adapters, LoRA
from manipi.records import read_json
from manipi.train.config import ComputeConfig, OptimizerConfig
from manipi.train.loop import train

PRECISION = ("bf16", "fp32", "pure_bf16")
TRAINED = ("full", "lora", "expert_only", "vision_frozen", "qlora")
SAVE, EMA, RECOMPUTE = ("sync", "async"), (0.0, 0.9), ("none", "elementwise", "full")
POLICY = ("pi05", "pi0", "pi0_fast", "joint")
FACTORS = (PRECISION, TRAINED, SAVE, EMA, RECOMPUTE, POLICY)

TABLE = [
    ("bf16", "full", "sync", 0.0, "full", "pi05"),
    ("fp32", "full", "async", 0.9, "none", "pi0_fast"),
    ("pure_bf16", "full", "async", 0.9, "elementwise", "pi0"),
    ("bf16", "lora", "async", 0.9, "none", "pi05"),
    ("fp32", "lora", "async", 0.9, "elementwise", "pi0"),
    ("pure_bf16", "lora", "sync", 0.0, "full", "pi0_fast"),
    ("bf16", "expert_only", "async", 0.0, "none", "pi0"),
    ("fp32", "expert_only", "sync", 0.9, "full", "pi0"),
    ("pure_bf16", "expert_only", "async", 0.0, "elementwise", "pi05"),
    ("bf16", "vision_frozen", "sync", 0.9, "elementwise", "pi0_fast"),
    ("fp32", "vision_frozen", "async", 0.0, "full", "pi05"),
    ("pure_bf16", "vision_frozen", "sync", 0.9, "none", "pi0"),
    ("bf16", "qlora", "sync", 0.0, "elementwise", "pi0"),
    ("fp32", "qlora", "sync", 0.9, "full", "pi05"),
    ("pure_bf16", "qlora", "sync", 0.0, "none", "pi0_fast"),
    ("bf16", "full", "async", 0.9, "elementwise", "joint"),
    ("fp32", "lora", "sync", 0.0, "none", "joint"),
    ("pure_bf16", "expert_only", "sync", 0.9, "full", "joint"),
    ("fp32", "vision_frozen", "async", 0.0, "elementwise", "joint"),
    ("bf16", "qlora", "sync", 0.9, "none", "joint"),
]
"""Every precision with every mode, and of all other factors each value of one with each value of another."""

LOW_RANK = Adapters(attention=LoRA(rank=2, alpha=2.0), feed_forward=LoRA(rank=2, alpha=2.0))


def possible(row: tuple) -> bool:
    """π0-FAST has no action expert, and matrices in 4 bits are saved while training waits, whatever is asked for."""
    _, trained, save, _, _, policy = row
    return (trained, policy) != ("expert_only", "pi0_fast") and (trained, save) != ("qlora", "async")


def pairs(rows) -> set[tuple]:
    return {((i, row[i]), (j, row[j])) for row in rows for i, j in combinations(range(len(FACTORS)), 2)}


def test_the_table_holds_every_pair():
    """Also without the rows that need a package which may be missing."""
    possible_rows = [row for row in product(*FACTORS) if possible(row)]
    assert all(map(possible, TABLE))
    assert {row[:2] for row in TABLE} == set(product(PRECISION, TRAINED))
    assert pairs(TABLE) == pairs(possible_rows)
    assert pairs(r for r in TABLE if r[1] != "qlora") == pairs(r for r in possible_rows if r[1] != "qlora")


def resumes(tiny, folder, precision, trained, save, ema, recompute, policy) -> None:
    """Two steps with a save in between equal two without, bit for bit."""
    if trained == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs manipi[low-bit]")
    config = tiny(policy, steps=2, save_every=2, ema_decay=ema)
    if trained in ("lora", "qlora"):
        names = ("vlm_adapters",) if policy == "pi0_fast" else ("vlm_adapters", "action_adapters")
        config = replace(config, model=replace(config.model, **dict.fromkeys(names, LOW_RANK)))
    config = replace(
        config,
        trained=trained,
        frozen_dtype="bfloat16" if precision == "pure_bf16" else "float32",
        compute=ComputeConfig(precision=precision, recompute=recompute),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0),
    )
    whole = train(config, folder / "whole", show=False)
    middle = train(replace(config, async_save=save == "async"), folder / "parts", stop_at=1, show=False)
    before = read_json(middle / "manifest.json")
    parts = train(config, folder / "parts", show=False)
    verify(parts)
    # Hashes of all files; that of DCP's index holds an id of its own.
    files = [read_json(one / "manifest.json") for one in (whole, parts)]
    assert files[0].keys() == files[1].keys()
    assert [n for n in files[0] if not n.endswith(".metadata") and files[0][n] != files[1][n]] == []
    assert before["model.safetensors"] != files[1]["model.safetensors"], "the second step changes nothing"


@pytest.mark.parametrize("row", TABLE, ids=lambda row: "-".join(map(str, row)))
def test_every_pair(row, tiny, tmp_path):
    resumes(tiny, tmp_path, *row)


@pytest.mark.long
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("ema", EMA)
@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("precision", PRECISION)
def test_every_combination(precision, trained, save, ema, recompute, tiny, tmp_path):
    for policy in POLICY:
        if possible((precision, trained, save, ema, recompute, policy)):
            resumes(tiny, tmp_path / policy, precision, trained, save, ema, recompute, policy)
