import dataclasses
import json
import subprocess
import sys

import pytest

from manipi.errors import ConfigError
from manipi.model.config import (
    CONFIG_TYPES,
    GEMMA_2B,
    GEMMA_300M,
    GEMMA_TINY,
    SO400M_14,
    Compat,
    Pi0Config,
    Pi0FastConfig,
    Pi05Config,
)
from manipi.records import from_json, to_json


def test_defaults_are_those_of_the_released_weights():
    assert [c().max_token_len for c in (Pi0Config, Pi05Config, Pi0FastConfig)] == [48, 200, 250]
    assert [c().action_horizon for c in (Pi0Config, Pi05Config, Pi0FastConfig)] == [50, 50, 32]
    assert SO400M_14.num_tokens == 256
    assert not any(dataclasses.asdict(Compat()).values())


@pytest.mark.parametrize(
    "config",
    [
        Pi0Config(),
        Pi05Config(state_in_prompt=False, cameras=("base",)),
        Pi0FastConfig(compat=Compat(unmasked_loss=True)),
    ],
    ids=lambda config: type(config).__name__,
)
def test_json_round_trip(config):
    assert from_json(json.loads(json.dumps(to_json(config))), (type(config), *CONFIG_TYPES), "here") == config


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: Pi0Config(action_dim=0), "Pi0Config.action_dim"),
        (lambda: Pi05Config(dtype="float16"), "compute dtype"),
        (lambda: Pi05Config(cameras=()), "Pi05Config.cameras"),
        (lambda: Pi05Config(cameras=("base", "base")), "Pi05Config.cameras"),
        (lambda: Pi05Config(vlm=GEMMA_TINY), "Pi05Config.action_expert.depth"),
        (lambda: Pi0Config(action_expert=dataclasses.replace(GEMMA_300M, head_dim=128)), "action_expert.head_dim"),
        (lambda: dataclasses.replace(GEMMA_2B, head_dim=255), "GemmaSize"),
        (lambda: dataclasses.replace(GEMMA_2B, num_kv_heads=3), "GemmaSize"),
        (lambda: dataclasses.replace(GEMMA_2B, depth=1.5), "GemmaSize.depth"),
        (lambda: dataclasses.replace(SO400M_14, image_size=225), "VisionSize"),
        (lambda: dataclasses.replace(SO400M_14, num_heads=5), "VisionSize"),
    ],
)
def test_a_setting_that_cannot_be_names_itself(make, where):
    with pytest.raises(ConfigError) as error:
        make()
    assert where in error.value.where


def test_configs_do_not_import_torch():
    code = "import sys, manipi.model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
